"""The loss on cached views: its closed form against autograd, its blocks, its weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rpl import objective
from rpl.objective import CachedViews, score

SCALE = 20.0


def make(n: int = 37, views: int = 3, categories: int = 5, dim: int = 8) -> tuple[Tensor, CachedViews]:
    generator = torch.Generator().manual_seed(0)
    features = functional.normalize(torch.randn((n, views, dim), generator=generator), dim=2).half()
    labels = torch.randint(categories, (n,), generator=generator)
    weights = torch.rand((n,), generator=generator) + 0.1
    return torch.randn((categories, dim), generator=generator) * 3, CachedViews(features, labels, weights)


def plain_loss(text_CD: Tensor, views: CachedViews) -> Tensor:
    """One image and view at a time, by torch's own cross-entropy."""
    total = torch.zeros((), dtype=torch.float64)
    for features_VD, label, weight in zip(views.features, views.labels, views.weights, strict=True):
        for view_D in features_VD:
            logits = SCALE * functional.normalize(text_CD, dim=1) @ view_D.double()
            total = total + weight * functional.cross_entropy(logits[None], label[None]) / len(features_VD)
    return total / views.weights.double().sum()


def test_loss_and_gradient_equal_autograd() -> None:
    text_CD, views = make()
    exact_CD = text_CD.double().requires_grad_()
    loss = plain_loss(exact_CD, views)
    (gradient,) = torch.autograd.grad(loss, exact_CD)
    found = score(text_CD, views, SCALE, with_gradient=True)
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.gradient is not None and gradient.abs().max() > 1e-3
    torch.testing.assert_close(found.gradient.double(), gradient, rtol=1e-4, atol=1e-6)
    assert score(text_CD, views, SCALE).gradient is None


def test_accuracy_is_the_weighted_share_of_nearest_categories() -> None:
    text_CD = torch.eye(3)
    features = functional.normalize(torch.tensor([[[1.0, 0.1, 0], [0, 1, 0]], [[0, 0, 1], [0, 0.1, 1]]]), dim=2)
    views = CachedViews(features, torch.tensor([0, 2]), torch.tensor([3.0, 1.0]))
    assert score(text_CD, views, SCALE).accuracy == pytest.approx((3 * 0.5 + 1 * 1.0) / 4)


def test_blocks_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    text_CD, views = make()
    whole = score(text_CD, views, SCALE, with_gradient=True)
    monkeypatch.setattr(objective, "_LOGITS_AT_ONCE", {"cpu": 50})
    blocks = score(text_CD, views, SCALE, with_gradient=True)
    assert blocks.loss == pytest.approx(whole.loss, rel=1e-6)
    assert whole.gradient is not None and blocks.gradient is not None
    torch.testing.assert_close(blocks.gradient, whole.gradient, rtol=1e-4, atol=1e-7)


def test_an_image_of_weight_two_counts_as_two() -> None:
    text_CD, views = make(n=4)
    double = CachedViews(views.features, views.labels, torch.tensor([2.0, 1.0, 1.0, 1.0]))
    twice = CachedViews(views.features, views.labels, torch.ones(4)).select(torch.tensor([0, 0, 1, 2, 3]))
    assert score(text_CD, double, SCALE).loss == pytest.approx(score(text_CD, twice, SCALE).loss, rel=1e-6)


def test_the_length_of_text_features_does_not_count() -> None:
    text_CD, views = make()
    assert score(text_CD * 7, views, SCALE).loss == pytest.approx(score(text_CD, views, SCALE).loss, rel=1e-6)


def test_thinned_views_are_other_ones_by_turns() -> None:
    features = torch.arange(5 * 3).reshape(5, 3, 1).float()
    views = CachedViews(features, torch.arange(5), torch.ones(5))
    assert views.thinned(15) is views and views.thinned(10**9) is views
    assert views.thinned(14).features[:, :, 0].tolist() == [[0, 1], [4, 5], [8, 6], [9, 10], [13, 14]]
    for most in (9, 5, 1):
        assert views.thinned(most).features[:, :, 0].tolist() == [[0], [4], [8], [9], [13]]
