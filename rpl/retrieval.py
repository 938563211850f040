"""The k nearest pool rows of every category at once, exactly, in one pass over blocks of vectors.

Receives queries and an iterator of `(first_row, vectors)`; has no idea where blocks come from. The order is that of
exact cosines with ties by row, so the answer is the same to the bit whatever the block size, the number of threads or
the BLAS: matrix products only nominate rows, with a margin larger than their rounding; nominated rows are scored again
one by one in double precision.

    C queries (categories), N rows of a block, D dimension, K kept, P nominated pairs
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_PAIRS_AT_ONCE = 256
"""Pairs scored in double precision at once: few enough for the cache, three times as fast as 8,192."""


@dataclass(frozen=True)
class Pairs:
    """P query and pool row pairs with their exact scores."""

    queries_P: Ints  # noqa: N815 - names carry shapes
    rows_P: Ints  # noqa: N815
    scores_P: Floats  # noqa: N815


def search_blocks(queries_CD: Floats, blocks: Iterable[tuple[int, Floats]], k: int) -> tuple[Floats, Ints]:
    """The `k` rows with the largest dot product for each query, best first, equal scores by row.

    Args:
        queries_CD: float32, rows of length 1.
        blocks: `(first_row, vectors_ND)`, float32 with rows of length 1; row numbers must not repeat.
        k: rows wanted per query; where there are fewer, the rest has score -inf and row -1.

    Returns:
        scores float32 [C, k] and rows int64 [C, k].
    """
    queries_CD = np.ascontiguousarray(queries_CD, np.float32)
    best = _Best(len(queries_CD), k)
    margin = rounding_margin(queries_CD.shape[1])
    for first_row, vectors_ND in blocks:
        scores_CN = queries_CD @ vectors_ND.T
        query_P, column_P = np.nonzero(_nominated(scores_CN, best.worst_C, k, margin))
        scores_P = exact_scores(queries_CD, vectors_ND, query_P, column_P)
        best.add(Pairs(query_P, column_P + first_row, scores_P))
    return best.result()


def exact_scores(queries_CD: Floats, vectors_ND: Floats, query_P: Ints, column_P: Ints) -> Floats:
    """Dot products of the given pairs, summed in double precision in an order that depends on D alone; float32 [P]."""
    scores_P = np.empty(len(query_P), np.float32)
    for start in range(0, len(query_P), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        products_PD = queries_CD[query_P[some]].astype(np.float64) * vectors_ND[column_P[some]]
        scores_P[some] = products_PD.sum(axis=1)
    return scores_P


def rounding_margin(dim: int) -> float:
    """A bound on the error of a float32 dot product of two vectors of length 1, in any order of summation.

    |error| <= dim * 2^-24 * sum |a_i b_i| to first order (Higham, Accuracy and Stability of Numerical Algorithms,
    section 3.1); twice that, which leaves room for vectors whose length is 1 to rounding only.
    """
    return (dim + 4) * 2.0**-23


def in_order(scores: Floats, rows: Ints) -> tuple[Floats, Ints]:
    """[C, k] results with each line sorted by falling score, then row; missing entries (row -1) last, at -inf."""
    scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
    order = np.lexsort((rows, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


class _Best:
    """The k best pairs of each query so far, and newer ones that wait to be merged."""

    def __init__(self, queries: int, k: int) -> None:
        self._k = k
        self._scores_CK = np.full((queries, k), -np.inf, np.float32)
        self._rows_CK = np.full((queries, k), -1, np.int64)
        self._waiting: list[Pairs] = []
        self._waiting_count = 0

    @property
    def worst_C(self) -> Floats:  # noqa: N802
        """What a pair must reach to matter; it may lag behind pairs that wait, which costs time and no correctness."""
        return self._scores_CK[:, -1]

    def add(self, pairs: Pairs) -> None:
        self._waiting.append(pairs)
        self._waiting_count += len(pairs.scores_P)
        if self._waiting_count > self._scores_CK.size // 4:  # merging sorts everything, so it is worth waiting
            self._merge()

    def result(self) -> tuple[Floats, Ints]:
        self._merge()
        return self._scores_CK, self._rows_CK

    def _merge(self) -> None:
        queries, k = self._scores_CK.shape
        kept_C, kept_K = np.nonzero(self._rows_CK >= 0)
        query_P = np.concatenate([kept_C, *(pairs.queries_P for pairs in self._waiting)])
        rows_P = np.concatenate([self._rows_CK[kept_C, kept_K], *(pairs.rows_P for pairs in self._waiting)])
        scores_P = np.concatenate([self._scores_CK[kept_C, kept_K], *(pairs.scores_P for pairs in self._waiting)])
        self._waiting, self._waiting_count = [], 0
        order_P = np.lexsort((rows_P, -scores_P, query_P))
        query_P = query_P[order_P]
        counts_C = np.bincount(query_P, minlength=queries)
        place_P = np.arange(len(query_P)) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
        won_P = place_P < k
        at = (query_P[won_P], place_P[won_P])
        self._scores_CK[at] = scores_P[order_P][won_P]
        self._rows_CK[at] = rows_P[order_P][won_P]


def _nominated(scores_CN: Floats, worst_C: Floats, k: int, margin: float) -> npt.NDArray[np.bool_]:
    """[C, N]: every row that may be among a query's k best so far, and few others.

    A score is off by `margin` at most, on either side of a comparison: hence twice.
    """
    slack = np.float32(2 * margin)
    nominated_CN: npt.NDArray[np.bool_] = scores_CN >= (worst_C - slack)[:, None]
    crowded_C = np.flatnonzero(np.count_nonzero(nominated_CN, axis=1) > k)
    if len(crowded_C):
        # More than k of this block alone qualify, so its own k-th best is a better bound.
        crowded_scores = scores_CN[crowded_C]
        kth_C = np.partition(crowded_scores, -k, axis=1)[:, -k]
        nominated_CN[crowded_C] = crowded_scores >= (kth_C - slack)[:, None]
    return nominated_CN
