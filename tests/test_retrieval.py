"""Streamed search against brute force in double precision, bit for bit, however the pool is cut into blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpl.retrieval import in_order, rounding_margin, search_blocks

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} (public test data) is not here")


def unit(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    return array / np.sqrt((array * array).sum(axis=1, keepdims=True))


def cut(vectors: np.ndarray, *bounds: int) -> Iterator[tuple[int, np.ndarray]]:
    edges = [0, *sorted(bounds), len(vectors)]
    return ((start, vectors[start:end]) for start, end in itertools.pairwise(edges) if end > start)


def brute_force(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair in double precision, rounded once; ties by row."""
    scores = (queries.astype(np.float64)[:, None] * vectors.astype(np.float64)[None]).sum(axis=2).astype(np.float32)
    rows = np.broadcast_to(np.arange(len(vectors)), scores.shape)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    found = np.full((len(queries), k), -1, np.int64)
    best = np.full((len(queries), k), -np.inf, np.float32)
    found[:, : order.shape[1]] = order
    best[:, : order.shape[1]] = np.take_along_axis(scores, order, 1)
    return best, found


@given(st.data())
def test_equals_brute_force_to_the_bit(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows, dim, count = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 5))
    k = data.draw(st.integers(1, 70))
    # Few distinct small values: many equal and nearly equal scores, and copies of rows.
    vectors = unit(rng.integers(1, 4, (rows, dim)) * data.draw(st.sampled_from([1.0, 0.3])))
    vectors = vectors[rng.integers(0, rows, rows)]
    queries = unit(rng.normal(size=(count, dim)))
    bounds = data.draw(st.lists(st.integers(0, rows), max_size=6))
    scores, found = search_blocks(queries, cut(vectors, *bounds), k)
    expected_scores, expected = brute_force(queries, vectors, k)
    assert np.array_equal(found, expected)
    assert np.array_equal(scores, expected_scores)
    assert scores.dtype == np.float32 and found.dtype == np.int64


def test_larger_pools_and_every_block_size_agree_with_brute_force() -> None:
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng.normal(size=(3000, 96))), unit(rng.normal(size=(40, 96)))
    vectors[1000:1400] = vectors[7]  # a placeholder picture, behind 400 URLs
    queries[0] = vectors[7]
    expected = brute_force(queries, vectors, 50)
    for size in (64, 999, 3000):
        found = search_blocks(queries, cut(vectors, *range(0, 3000, size)), 50)
        assert np.array_equal(found[1], expected[1])
        assert np.array_equal(found[0], expected[0])
    assert expected[1][0].tolist() == [7, *range(1000, 1049)]


def test_blocks_may_come_in_any_order() -> None:
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng.integers(0, 2, (200, 12)) + 0.1), unit(rng.normal(size=(3, 12)))
    blocks = list(cut(vectors, 50, 100, 150))
    one, other = search_blocks(queries, blocks, 20), search_blocks(queries, blocks[::-1], 20)
    assert np.array_equal(one[1], other[1])


def test_a_pool_smaller_than_k_fills_with_minus_one() -> None:
    scores, rows = search_blocks(unit(np.eye(3)), [(5, unit(np.eye(3)[:2]))], 4)
    assert rows.tolist() == [[5, 6, -1, -1], [6, 5, -1, -1], [5, 6, -1, -1]]
    assert np.isneginf(scores[:, 2:]).all()
    assert search_blocks(unit(np.eye(3)), [], 2)[1].tolist() == [[-1, -1]] * 3


def test_no_queries_no_results() -> None:
    scores, rows = search_blocks(np.zeros((0, 3), np.float32), [(0, unit(np.eye(3)))], 2)
    assert scores.shape == rows.shape == (0, 2)


def test_the_margin_covers_what_single_precision_loses() -> None:
    rng = np.random.default_rng(0)
    for dim in (4, 64, 512, 1024):
        a, b = unit(rng.normal(size=(200, dim)) + 0.5), unit(rng.normal(size=(200, dim)) + 0.5)
        error = np.abs((a @ b.T) - a.astype(np.float64) @ b.astype(np.float64).T).max()
        assert error < rounding_margin(dim) / 4


def test_in_order_sorts_ties_by_row_and_puts_missing_entries_last() -> None:
    scores = np.array([[0.5, 0.9, 0.9, 2.0]], np.float32)
    sorted_scores, rows = in_order(scores, np.array([[3, 8, 2, -1]]))
    assert rows.tolist() == [[2, 8, 3, -1]]
    assert sorted_scores.tolist() == [[np.float32(0.9), np.float32(0.9), 0.5, -np.inf]]


@needs_data
def test_real_features_agree_with_faiss_and_look_right() -> None:
    vectors = unit(np.load(DATA / "clip_unsplash_features/features_vitb32_fp16.npy"))
    queries = unit(np.load(DATA / "detic/lvis_v1_clip_a+cname.npy"))
    scores, rows = search_blocks(queries, cut(vectors, 1000, 2000), 20)
    index = faiss.IndexFlatIP(512)
    index.add(vectors)
    faiss_scores, faiss_rows = index.search(queries, 20)
    assert np.abs(scores - faiss_scores).max() < 1e-6
    assert (np.sort(rows) == np.sort(faiss_rows)).mean() > 0.99  # the pool holds copies: ties, which faiss leaves open
    expected_scores, expected = brute_force(queries[:50], vectors, 20)
    assert np.array_equal(rows[:50], expected)
    assert np.array_equal(scores[:50], expected_scores)
    assert 0.2 < scores[:, 0].mean() < 0.35  # where ViT-B/32's text-image cosines of matches lie
