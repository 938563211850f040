"""Pool indexes: when to build one, how to build it, how to ask it.

An inverted file (faiss IVF) with vectors in half precision, its number of probed lists chosen by measured recall.
Receives blocks of vectors; knows nothing of files. Below some millions of rows no index is needed:
`rpl.retrieval.search_blocks` streams the pool once for all categories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from rpl.errors import BadInput
from rpl.retrieval import Floats, Ints, in_order

INDEX_FROM_ROWS = 2_000_000
"""`auto` builds an index from here on; smaller pools are streamed in less time than an index takes to build."""

RECALL, RECALL_AT, RECALL_QUERIES = 0.99, 300, 256
"""Probe enough lists to find this share of the true nearest 300, the reference's number of candidates."""

QUERY_COSINE = 0.15
"""How near a query made up for measuring is to the picture it comes from.

Text lies off the pictures' cloud, and its neighbours are spread over more lists than a picture's. Pictures moved this
far in a random direction need as many probes as true category embeddings do (ViT-B/32, 3,045 photographs, 76 lists,
recall at 100 with 8, 16, 32, 48 probes: 0.56, 0.77, 0.93, 0.98 for these; 0.55, 0.77, 0.93, 0.98 for LVIS's names),
unmoved ones a third of that.
"""

_TRAINING_ROWS_PER_LIST = 40
"""faiss warns below 39."""

_SEED = 0

Blocks = Callable[[], Iterable[tuple[int, Floats]]]
"""Starts a new pass over `(first_row, vectors)`; vectors are float32 [n, D] of length 1."""


@dataclass(frozen=True)
class BuiltIndex:
    """A faiss index that is ready to be searched, and how it was measured."""

    index: Any
    lists: int
    probes: int
    recall: float
    """Share of the `RECALL_AT` nearest rows that is found with so many probes, by queries as far off as text."""


def chosen_kind(setting: Literal["auto", "exact", "ivf"], rows: int) -> Literal["exact", "ivf"]:
    """What `pool.index` means for a pool of `rows` vectors."""
    if setting == "auto":
        return "ivf" if rows >= INDEX_FROM_ROWS else "exact"
    return setting


def build_ivf(blocks: Blocks, rows: int, dim: int) -> BuiltIndex:
    """An inverted file over all vectors, the same bytes for the same vectors.

    Takes two passes: one for a sample to train on, one to add. Recall is measured against the same index with every
    list probed, by queries made from pool vectors that were not trained on.
    """
    lists = max(1, min(int(4 * rows**0.5), rows // _TRAINING_ROWS_PER_LIST))
    training, held_out = _samples(blocks(), rows, lists * _TRAINING_ROWS_PER_LIST, dim)
    index: Any = faiss.index_factory(dim, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = _SEED
    index.cp.spherical = True  # centres of unit vectors under the inner product
    clustering = _on_gpus(dim)
    if clustering is not None:
        index.clustering_index = clustering  # k-means alone: nearly all of the training, and the rest stays portable
    index.train(training)
    for _, vectors in blocks():
        index.add(vectors)
    recall = _set_probes(index, _as_far_as_text(held_out), min(RECALL_AT, rows))
    return BuiltIndex(index, lists, int(index.nprobe), recall)


def search_index(index: Any, queries_CD: Floats, k: int) -> tuple[Floats, Ints]:
    """As `rpl.retrieval.search_blocks`, approximately: scores float32 [C, k], rows int64 [C, k], -1 where too few."""
    scores, rows = index.search(np.ascontiguousarray(queries_CD, np.float32), k)
    return in_order(scores, rows)


def write_index(index: Any, path: Path) -> None:
    faiss.write_index(index, str(path))


def read_index(path: Path) -> Any:
    """The index that `write_index` wrote, mapped into memory. Raises BadInput where the file is none."""
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise BadInput(f"{path}: is not a whole faiss index; run the stage `index` again.") from error


def _on_gpus(dim: int) -> Any:
    """A flat index on all GPUs, which k-means asks for nearest centres; None without GPUs that faiss can use."""
    if getattr(faiss, "get_num_gpus", int)() == 0:
        return None
    return faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(dim))


def _samples(blocks: Iterable[tuple[int, Floats]], rows: int, training: int, dim: int) -> tuple[Floats, Floats]:
    """Vectors to train on, and others to make queries of (the same, where the pool has no others), drawn at random."""
    training = min(training, rows)
    queries = min(RECALL_QUERIES, rows - training) or min(RECALL_QUERIES, rows)
    drawn = np.random.default_rng(_SEED).choice(rows, min(training + queries, rows), replace=False)
    wanted = (np.sort(drawn[:training]), np.sort(drawn[-queries:]))
    found = tuple(np.empty((len(numbers), dim), np.float32) for numbers in wanted)
    for first_row, vectors in blocks:
        for numbers, gathered in zip(wanted, found, strict=True):
            start, end = np.searchsorted(numbers, (first_row, first_row + len(vectors)))
            gathered[start:end] = vectors[numbers[start:end] - first_row]
    return found[0], found[1]


def _as_far_as_text(vectors: Floats) -> Floats:
    noise = np.random.default_rng(_SEED).normal(size=vectors.shape)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    queries: Floats = (QUERY_COSINE * vectors + (1 - QUERY_COSINE**2) ** 0.5 * noise).astype(np.float32)
    return queries


def _set_probes(index: Any, queries: Floats, k: int) -> float:
    """Set `nprobe` to the first power of two, or all lists, that reaches `RECALL`; the recall that it has.

    A row counts as found by its score, since copies of one picture may take each other's place.
    """
    index.nprobe = index.nlist
    worst_true = index.search(queries, k)[0][:, -1:]
    probes = 1
    while True:
        index.nprobe = min(probes, index.nlist)
        scores, rows = index.search(queries, k)
        recall = float(((scores >= worst_true) & (rows >= 0)).mean())
        if recall >= RECALL or probes >= index.nlist:
            return recall
        probes *= 2
