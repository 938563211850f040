"""The table of candidates: for each category its nearest pool images, best first, each URL once.

Knows nothing of how they were found. Categories are rows of `categories.json`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rpl.errors import BadInput
from rpl.pool import Pool
from rpl.retrieval import Floats, Ints

SCHEMA = pa.schema(
    [
        ("category", pa.int32()),
        ("rank", pa.int32()),
        ("score", pa.float32()),
        ("pool_row", pa.int64()),
        ("url", pa.string()),
        ("caption", pa.string()),
    ]
)
"""Columns of `candidates.parquet`: rank from 0 within a category, score the cosine."""


def query_vectors(embeddings_CD: Floats, rows: Sequence[int], source: str) -> Floats:
    """The embeddings at `rows` as float32 with length 1.

    Raises:
        BadInput: one has no direction (NaN, infinite, all zeros).
    """
    chosen = embeddings_CD[list(rows)].astype(np.float32)
    lengths = np.sqrt((chosen * chosen).sum(axis=1))
    wrong = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if len(wrong):
        raise BadInput(f"{source}: the embedding of category {rows[wrong[0]]} is no direction; learn and embed again.")
    queries: Floats = chosen / lengths[:, None]
    return queries


def candidate_table(categories: Sequence[int], scores_CK: Floats, rows_CK: Ints, pool: Pool) -> pa.Table:
    """The table of `SCHEMA`, by category, then rank.

    Args:
        categories: the C categories, rising.
        scores_CK: float32, best first.
        rows_CK: pool rows; -1 ends a category's list early.

    As in the reference, a URL that the pool holds several times is listed once for a category, at its best rank.
    """
    place_C, place_K = np.nonzero(rows_CK >= 0)
    rows, scores = rows_CK[place_C, place_K], scores_CK[place_C, place_K]
    distinct, inverse = np.unique(rows, return_inverse=True)
    urls, captions = pool.records(distinct)
    kept, ranks = _first_of_each_url(place_C, [urls[place] for place in inverse])
    found = inverse[kept]
    return pa.table(
        [
            np.asarray(categories, np.int32)[place_C[kept]],
            ranks.astype(np.int32),
            scores[kept],
            rows[kept],
            [urls[place] for place in found],
            [captions[place] for place in found],
        ],
        schema=SCHEMA,
    )


def _first_of_each_url(groups: Ints, urls: Sequence[str]) -> tuple[Ints, Ints]:
    """Places of the first row of each URL in each group, and their ranks in the group, from 0."""
    seen: set[tuple[int, str]] = set()
    kept = []
    for place, key in enumerate(zip(groups.tolist(), urls, strict=True)):
        if key not in seen:
            seen.add(key)
            kept.append(place)
    places = np.array(kept, np.int64)
    counts = np.bincount(groups[places]) if len(places) else np.zeros(0, np.int64)
    ranks = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places, ranks
