"""Other ways to learn the same 1,024 numbers on the same loss, which were tried against `fast` and lost to it.

Each takes a task and a number of text passes it may use, and gives back the context. `benchmarks.learn` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rpl.lbfgs import LBFGS
from rpl.learning import Task
from rpl.learning.fast import WEIGHT_DECAY
from rpl.objective import CachedViews, score

Optimiser = Callable[[Task, int, int], Tensor]
"""(task, text passes it may use, seed) to the context [K, W]."""


class _Found(NamedTuple):
    loss: float
    gradient: Tensor


def _evaluate(task: Task, context: Tensor, views: CachedViews) -> _Found:
    text_CD, pullback = task.bank.features_and_pullback(context)
    scores = score(text_CD, views, task.logit_scale, with_gradient=True)
    assert scores.gradient is not None
    return _Found(scores.loss, pullback(scores.gradient))


def _adam(task: Task, steps: int, next_views: Callable[[], CachedViews], rate: float) -> Tensor:
    context = task.starts[0].clone().requires_grad_()
    optimiser = torch.optim.Adam([context], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        context.grad = _evaluate(task, context.detach(), next_views()).gradient
        optimiser.step()
        schedule.step()
    return context.detach()


def adam_full(task: Task, passes: int, seed: int) -> Tensor:  # noqa: ARG001
    """Adam on all images at once, cosine."""
    return _adam(task, passes, lambda: task.train, 0.02)


def adam_large_batch(task: Task, passes: int, seed: int) -> Tensor:
    """Adam on batches of 2,048 images."""
    draws = np.random.default_rng(seed)

    def batch() -> CachedViews:
        rows = draws.choice(len(task.train), min(2048, len(task.train)), replace=False)
        return task.train.select(torch.from_numpy(rows))

    return _adam(task, passes, batch, 0.02)


def adam_some_categories(task: Task, passes: int, seed: int) -> Tensor:
    """POMP (Ren et al. 2023): each step among a quarter of the categories, so four times as many steps."""
    draws = np.random.default_rng(seed)
    context = task.starts[0].clone().requires_grad_()
    steps = 4 * passes
    optimiser = torch.optim.Adam([context], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        chosen = np.sort(draws.choice(len(task.bank), max(2, len(task.bank) // 4), replace=False))
        small = task.narrowed(chosen)
        context.grad = _evaluate(small, context.detach(), small.train).gradient
        optimiser.step()
        schedule.step()
    return context.detach()


def lbfgs_one_start(task: Task, passes: int, seed: int) -> Tensor:  # noqa: ARG001
    """L-BFGS on all images from the first start alone."""
    used = 0

    def function(x: np.ndarray) -> tuple[float, np.ndarray, None]:  # type: ignore[type-arg]
        nonlocal used
        used += 1
        found = _evaluate(task, torch.from_numpy(x).float().reshape(task.starts[0].shape), task.train)
        gradient = found.gradient.double().numpy().ravel() + WEIGHT_DECAY * x
        return found.loss + WEIGHT_DECAY / 2 * float(x @ x), gradient, None

    optimiser: LBFGS[None] = LBFGS(function, task.starts[0].double().numpy().ravel())
    while used < passes and optimiser.step():
        pass
    return torch.from_numpy(optimiser.point.x).float().reshape(task.starts[0].shape)


def gauss_newton(task: Task, passes: int, seed: int) -> Tensor:
    """Levenberg-Marquardt on the Gauss-Newton matrix, each step solved by conjugate gradients.

    A product with the matrix takes a pass forward and back, as an evaluation does: curvature is bought with passes.
    The products see a sample of the images, which changes nothing in the number of passes.
    """
    draws = np.random.default_rng(seed)
    sample = task.train.select(
        torch.from_numpy(draws.choice(len(task.train), min(2048, len(task.train)), replace=False))
    )
    context, damping, used = task.starts[0].clone(), 1e-3, 0
    here = _evaluate(task, context, task.train)
    used += 1
    while used + 8 < passes:
        product = _curvature(task, context, sample)
        step, products = _conjugate_gradients(lambda v, p=product, d=damping: p(v) + d * v, -here.gradient, 6)  # type: ignore[misc]
        there = _evaluate(task, context + step, task.train)
        used += products + 1
        if there.loss < here.loss:
            context, here, damping = context + step, there, damping / 3
        else:
            damping *= 6
    return context


def _curvature(task: Task, context: Tensor, views: CachedViews) -> Callable[[Tensor], Tensor]:
    """v to J'HJv, J: of the normalised text features by the context, H: of the loss by them."""
    small = 1e-3
    unit_CD = functional.normalize(task.bank.features(context), dim=1)
    x_ND = views.features[:, 0].float()
    p_NC = (task.logit_scale * x_ND @ unit_CD.T).softmax(1)
    share_N1 = (views.weights / views.weights.sum())[:, None]

    def product(v: Tensor) -> Tensor:
        ahead_CD = task.bank.features(context + small * v / v.norm())  # J v by a difference: one pass forward
        tangent_CD = (functional.normalize(ahead_CD, dim=1) - unit_CD) * (v.norm() / small)
        z_NC = task.logit_scale * x_ND @ tangent_CD.T
        hz_NC = p_NC * (z_NC - (p_NC * z_NC).sum(1, keepdim=True))
        by_unit_CD = task.logit_scale * (hz_NC * share_N1).T @ x_ND
        text_CD, pullback = task.bank.features_and_pullback(context)
        along_C1 = (by_unit_CD * unit_CD).sum(1, keepdim=True)
        return pullback((by_unit_CD - along_C1 * unit_CD) / text_CD.norm(dim=1, keepdim=True))

    return product


def _conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor, most: int) -> tuple[Tensor, int]:
    solution = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    size = float((residual * residual).sum())
    for used in range(1, most + 1):
        along = product(direction)
        curvature = float((direction * along).sum())
        if curvature <= 0:
            return (solution if used > 1 else right), used
        solution = solution + (size / curvature) * direction
        residual = residual - (size / curvature) * along
        new = float((residual * residual).sum())
        direction, size = residual + (new / size) * direction, new
    return solution, most


OPTIMISERS: dict[str, Optimiser] = {
    "L-BFGS, one start": lbfgs_one_start,
    "Adam, all images": adam_full,
    "Adam, batches of 2,048": adam_large_batch,
    "Adam, a quarter of the categories": adam_some_categories,
    "Gauss-Newton, conjugate gradients": gauss_newton,
}
