"""Muon, the optimiser that lets the demo's small convolutions learn within minutes (Jordan et al. 2024).

A step's direction is its momentum with all singular values set to about one, by five Newton-Schulz iterations;
convolution kernels count as matrices of one row per output channel. On this training it halves the loss of
AdamW's first hundred steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """[R, C] with the singular vectors of `matrix` and singular values near one."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for parameters of two or more axes."""

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, momentum: float = 0.9
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002 (the base class has it)
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(gradient))
                velocity.mul_(group["momentum"]).add_(gradient)
                ahead = (gradient + group["momentum"] * velocity).flatten(1)
                scale = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                parameter.add_(orthogonalised(ahead).view(parameter.shape), alpha=-group["lr"] * scale)
