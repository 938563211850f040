"""Accuracy, precision and purity against cases small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rpl.evaluation import accuracy, purity, retrieval_precision

TEXT_CD = np.eye(4, dtype=np.float32)
ALL = np.ones(4, dtype=bool)


def test_accuracy_counts_the_nearest_category() -> None:
    features_ND = np.array([[1, 0.1, 0, 0], [0.2, 1, 0, 0], [1, 0, 0.5, 0], [0, 0, 0, 1]], dtype=np.float16)
    assert accuracy(features_ND, np.array([0, 1, 2, 3]), TEXT_CD, ALL) == 0.75


def test_accuracy_is_of_cosines_not_of_dot_products() -> None:
    long_but_off = np.array([[10.0, 0.0], [0.6, 0.8]])
    assert accuracy(np.array([[0.6, 0.8]]), np.array([1]), long_but_off, np.ones(2, dtype=bool)) == 1.0
    assert accuracy(np.array([[60.0, 80.0]]), np.array([1]), long_but_off, np.ones(2, dtype=bool)) == 1.0


def test_only_categories_of_the_mask_compete_and_count() -> None:
    features_ND = np.array([[0, 1, 0.9, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float32)
    labels_N = np.array([2, 0, -1])
    assert accuracy(features_ND, labels_N, TEXT_CD, ALL) == 0.5
    assert accuracy(features_ND, labels_N, TEXT_CD, np.array([False, False, True, True])) == 1.0


def test_accuracy_of_nothing_is_unknown() -> None:
    assert accuracy(np.zeros((0, 4)), np.zeros(0, dtype=int), TEXT_CD, ALL) is None
    assert accuracy(np.ones((1, 4)), np.array([0]), TEXT_CD, np.array([False, True, True, True])) is None


def test_equal_embeddings_tie_and_the_first_wins() -> None:
    rng = np.random.default_rng(0)
    row = rng.normal(size=(1, 512))
    text_CD = np.repeat(row, 37, axis=0)
    features_ND = rng.normal(size=(64, 512))
    assert accuracy(features_ND, np.zeros(64, dtype=int), text_CD, np.ones(37, dtype=bool)) == 1.0


def test_accuracy_agrees_with_a_plain_loop_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpl.evaluation._BLOCK", 7)
    rng = np.random.default_rng(1)
    features_ND, text_CD = rng.normal(size=(50, 8)), rng.normal(size=(6, 8))
    labels_N, among_C = rng.integers(0, 6, size=50), np.array([True, True, False, True, True, False])
    counted = hits = 0
    for feature, label in zip(features_ND, labels_N, strict=True):
        if among_C[label]:
            lengths = np.linalg.norm(text_CD, axis=1)
            cosines = {c: float(feature @ text_CD[c] / lengths[c]) for c in np.flatnonzero(among_C)}
            counted += 1
            hits += max(cosines, key=lambda c: cosines[c]) == label
    assert accuracy(features_ND, labels_N, text_CD, among_C) == hits / counted


def test_precision_counts_known_pictures_only() -> None:
    truth = {"http://a/1": "cat", "http://a/2": "dog", "http://a/3": None}
    names = ["cat", "cat", "cat", "cat"]
    urls = ["http://a/1", "http://a/2", "http://a/3", "http://a/4"]
    assert retrieval_precision(names, urls, truth) == 1 / 3
    assert purity(names[:1], ["http://a/1"], truth) == 1.0
    assert retrieval_precision(names[:1], ["http://a/4"], truth) is None
    assert retrieval_precision([], [], truth) is None
