"""Which downloaded pictures are kept: placeholders, weak and repeated ones out, then the first good ones by rank.

Functions on arrays and tables; the same answer whatever the order of arrival or the number of threads. Knows nothing
of downloading or of CLIP: pictures come with their hashes and features. Pictures are copies where their 64-bit pHash
(DCT of the 32 x 32 greys against its median) differs in few bits.

Copies of the data set's own pictures are not looked for: a crop and the whole photograph it came from have unlike
hashes and unlike features, so a search among crops would promise what it cannot find.

Letters: N pictures, C categories, D dimension of the features.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rpl.categories import Category
from rpl.config import Curate
from rpl.reasons import Reason

Bools = npt.NDArray[np.bool_]

_BLOCK = 8192
_BITS = 64
_BITS_SET = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@dataclass(frozen=True)
class Pictures:
    """Good downloads in order of category and rank; all of length N.

    `phash` is uint64, `score` the cosine of the picture itself with its category.
    """

    category: npt.NDArray[np.int32]
    url: Sequence[str]
    sha256: Sequence[str]
    phash: npt.NDArray[np.uint64]
    score: npt.NDArray[np.float32]


class Outcome(NamedTuple):
    """What becomes of a picture, and its cosine with its category."""

    reason: Reason | None
    is_kept: bool
    score: float


def image_scores(
    features_ND: npt.NDArray[Any], text_CD: npt.NDArray[Any], category_N: npt.NDArray[np.integer[Any]]
) -> npt.NDArray[np.float32]:
    """Cosine of each picture with its own category; neither side need be normalised."""
    text_CD = _unit(text_CD)
    scores_N = np.empty(len(features_ND), np.float32)
    for start in range(0, len(features_ND), _BLOCK):
        rows = slice(start, start + _BLOCK)
        scores_N[rows] = np.einsum("nd,nd->n", _unit(features_ND[rows]), text_CD[category_N[rows]])
    return scores_N


def curate(pictures: Pictures, settings: Curate, kept: int) -> list[Outcome]:
    """What becomes of each picture: the first `kept` good ones of each category are kept, further ones are spare."""
    reasons = refusals(pictures, settings)
    good_N: Bools = np.array([reason is None for reason in reasons], bool)
    kept_N = first_good(pictures.category, good_N, kept)
    columns = (reasons, kept_N.tolist(), pictures.score.tolist())
    return [Outcome(*values) for values in zip(*columns, strict=True)]


def refusals(pictures: Pictures, settings: Curate) -> list[Reason | None]:
    """Why each picture is not good, or None.

    In this order: bytes that came from too many addresses; a score that is too low; a copy of a better-ranked good
    picture of the category; a copy of a good picture that has a higher score in another category.
    """
    reasons: list[Reason | None] = [None] * len(pictures.url)
    good_N: Bools = np.ones(len(reasons), bool)

    def refuse(refused_N: Bools, reason: Reason) -> None:
        for row in np.flatnonzero(refused_N & good_N):
            reasons[row] = reason
        good_N[refused_N] = False

    refuse(placeholders(pictures.sha256, pictures.url, settings.max_urls_per_picture), Reason.PLACEHOLDER)
    refuse(pictures.score < settings.min_score, Reason.LOW_SCORE)
    rows = np.flatnonzero(good_N)
    refuse(_repeats(pictures.phash, rows, pictures.category, settings.phash_distance), Reason.DUPLICATE)
    rows = np.flatnonzero(good_N)
    best_first = rows[np.argsort(-pictures.score[rows], kind="stable")]  # of two that tie, the first row
    all_one = np.zeros_like(pictures.category)
    refuse(_repeats(pictures.phash, best_first, all_one, settings.phash_distance), Reason.DUPLICATE_ELSEWHERE)
    return reasons


def first_good(category_N: npt.NDArray[np.integer[Any]], good_N: Bools, kept: int) -> Bools:
    """The first `kept` good pictures of each category; rows are in order of category and rank."""
    chosen_N: Bools = np.zeros(len(good_N), bool)
    rows = np.flatnonzero(good_N)
    for category in np.unique(category_N[rows]):
        chosen_N[rows[category_N[rows] == category][:kept]] = True
    return chosen_N


def placeholders(sha256: Sequence[str], url: Sequence[str], most: int) -> Bools:
    """Pictures whose very bytes came from more than `most` different addresses, over all categories."""
    addresses: dict[str, set[str]] = defaultdict(set)
    for digest, address in zip(sha256, url, strict=True):
        addresses[digest].add(address)
    return np.array([len(addresses[digest]) > most for digest in sha256], bool)


def near_pairs(hashes: npt.NDArray[np.uint64], distance: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All pairs i < j of different 64-bit hashes that differ in at most `distance` bits, each once, in order.

    Hashes that near agree entirely in at least one of `distance + 1` bands of bits (pigeonhole), so only hashes that
    share a band are compared: of 200,000 random ones 1 in 1,400 pairs at distance 4. Bands below eight bits would
    save nothing; there all pairs are compared.
    """
    found: set[int] = set()
    count = len(hashes)
    for shift, width in _bands(distance):
        band = (hashes >> np.uint64(shift)) & np.uint64((1 << width) - 1)
        order = np.argsort(band, kind="stable")
        band = band[order]
        for step in range(1, count):
            same = np.flatnonzero(band[:-step] == band[step:])
            if not same.size:
                break  # sorted: no group is longer than `step`
            one, other = order[same], order[same + step]
            near = _bits_set(hashes[one] ^ hashes[other]) <= distance
            first, second = np.minimum(one, other)[near], np.maximum(one, other)[near]
            found.update((first * count + second).tolist())
    pairs = np.array(sorted(found), np.int64)
    return pairs // max(count, 1), pairs % max(count, 1)


def record(
    downloads: pa.Table, outcomes: Sequence[Outcome], categories: Sequence[Category], made_by: Mapping[str, str]
) -> pa.Table:
    """The record of a sourcing run: what the download recorded, with curation's verdict.

    Args:
        downloads: in order of category and rank.
        outcomes: of its rows with status "ok", in their order.
        made_by: constant columns: round, encoder, prompts_digest.
    """
    rows = downloads["category"].to_pylist()
    status, why = downloads["status"].to_pylist(), downloads["reason"].to_pylist()
    scores: list[float | None] = [None] * len(rows)
    ok_rows = [row for row, word in enumerate(status) if word == "ok"]
    for row, outcome in zip(ok_rows, outcomes, strict=True):
        scores[row] = outcome.score
        status[row] = "refused" if outcome.reason is not None else "kept" if outcome.is_kept else "spare"
        why[row] = outcome.reason.value if outcome.reason is not None else None
    columns = {
        "category": downloads["category"],
        "category_id": pa.array([categories[row].id for row in rows], pa.int64()),
        "category_name": pa.array([categories[row].name for row in rows], pa.string()),
        **{name: downloads[name] for name in downloads.column_names if name != "category"},
        "status": pa.array(status, pa.string()),
        "reason": pa.array(why, pa.string()),
        "image_score": pa.array(scores, pa.float32()),
        **{name: pa.array([value] * len(rows), pa.string()) for name, value in made_by.items()},
    }
    return pa.table(columns)


def yields(sourced: pa.Table, categories: Sequence[Category], of: Sequence[int], target: int) -> list[dict[str, Any]]:
    """What each category of `of` (rows of `categories`) got; one JSON object each."""
    candidates, downloaded, kept = Counter[int](), Counter[int](), Counter[int]()
    refused: dict[int, Counter[str]] = defaultdict(Counter)
    for row in sourced.select(["category", "status", "reason", "key"]).to_pylist():
        category = row["category"]
        candidates[category] += 1
        downloaded[category] += row["key"] is not None
        kept[category] += row["status"] == "kept"
        if row["reason"] is not None:
            refused[category][row["reason"]] += 1
    return [
        {
            "category": category,
            "name": categories[category].name,
            "split": categories[category].split,
            "target": target,
            "candidates": candidates[category],
            "downloaded": downloaded[category],
            "kept": kept[category],
            "refused": dict(sorted(refused[category].items())),
        }
        for category in of
    ]


def by_reason(sourced: pa.Table) -> dict[str, int]:
    """Different addresses by the reason for which they were refused or failed, in some category at least."""
    pairs = set(zip(sourced["reason"].to_pylist(), sourced["url"].to_pylist(), strict=True))
    return dict(sorted(Counter(reason for reason, _ in pairs if reason is not None).items()))


def _repeats(
    phash_N: npt.NDArray[np.uint64], order: npt.NDArray[np.intp], group_N: npt.NDArray[np.int32], distance: int
) -> Bools:
    """Which pictures, taken in `order`, are copies of one that was taken before in the same group and is no copy."""
    hashes, number = np.unique(phash_N[order], return_inverse=True)
    near: dict[int, list[int]] = defaultdict(list)
    for one, other in zip(*near_pairs(hashes, distance), strict=True):
        near[int(one)].append(int(other))
        near[int(other)].append(int(one))
    taken: set[tuple[int, int]] = set()
    repeats_N: Bools = np.zeros(len(phash_N), bool)
    for row, own in zip(order.tolist(), number.tolist(), strict=True):
        group = int(group_N[row])
        if any((group, other) in taken for other in (own, *near.get(own, ()))):
            repeats_N[row] = True
        else:
            taken.add((group, own))
    return repeats_N


def _bands(distance: int) -> list[tuple[int, int]]:
    """Shift and width of bands of which two hashes within `distance` share one."""
    count = distance + 1
    if _BITS // count < 8:
        return [(0, 0)]  # a band of no bits, shared by all
    edges = [_BITS * number // count for number in range(count + 1)]
    return [(low, high - low) for low, high in itertools.pairwise(edges)]


def _bits_set(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    counts: npt.NDArray[np.int64] = _BITS_SET[values.view(np.uint8).reshape(-1, 8)].sum(axis=1, dtype=np.int64)
    return counts


def _unit(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: npt.NDArray[np.float64] = rows / np.maximum(norms, np.finfo(np.float64).tiny)
    return unit
