"""L-BFGS: agrees with torch's, reaches the minimum of hard functions, and is the same twice to the bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rpl.lbfgs import LBFGS, Vector


def rosenbrock(x: Vector) -> tuple[float, Vector, None]:
    a, b = x[:-1], x[1:]
    gradient = np.zeros_like(x)
    gradient[:-1] += -400 * a * (b - a**2) - 2 * (1 - a)
    gradient[1:] += 200 * (b - a**2)
    return float((100 * (b - a**2) ** 2 + (1 - a) ** 2).sum()), gradient, None


def stretched(x: Vector) -> tuple[float, Vector, int]:
    """A bowl 100 times as steep in one direction as in another, whose floor is at 1."""
    scale = np.geomspace(1, 1e2, len(x))
    return float(1 + 0.5 * (scale * x) @ x), scale * x, len(x)


def run(optimiser: LBFGS[None], most: int) -> int:
    return next((step for step in range(most) if not optimiser.step()), most)


def test_it_finds_the_floor_of_a_curved_valley() -> None:
    calls = 0

    def counted(x: Vector) -> tuple[float, Vector, None]:
        nonlocal calls
        calls += 1
        return rosenbrock(x)

    optimiser = LBFGS(counted, np.full(10, -1.2))
    run(optimiser, 200)
    np.testing.assert_allclose(optimiser.point.x, np.ones(10), atol=1e-6)
    assert calls < 200


def test_no_step_rises_and_a_minimum_ends_it() -> None:
    optimiser = LBFGS(stretched, np.ones(30))
    values = [optimiser.point.value]
    while optimiser.step():
        values.append(optimiser.point.value)
        assert len(values) < 500
    assert all(after < before for before, after in itertools.pairwise(values))
    assert values[-1] == pytest.approx(1, abs=1e-12)
    assert optimiser.point.found == 30


def test_it_needs_no_more_evaluations_than_torchs() -> None:
    start = np.full(20, -1.2)
    calls = {"ours": 0, "torch": 0}

    def ours(x: Vector) -> tuple[float, Vector, None]:
        calls["ours"] += 1
        return rosenbrock(x)

    optimiser = LBFGS(ours, start)
    while optimiser.point.value > 1e-8:
        assert optimiser.step()

    x = torch.tensor(start, requires_grad=True)
    theirs = torch.optim.LBFGS([x], max_iter=1000, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-4)

    def closure() -> float:
        calls["torch"] += 1
        value, gradient, _ = rosenbrock(x.detach().numpy())
        x.grad = torch.from_numpy(gradient)
        return value

    theirs.step(closure)  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(x.detach().numpy(), optimiser.point.x, atol=1e-3)
    assert calls["ours"] <= 1.2 * calls["torch"]


def test_the_same_twice_to_the_bit() -> None:
    ends = []
    for _ in range(2):
        optimiser = LBFGS(rosenbrock, np.linspace(-2, 2, 12))
        run(optimiser, 25)
        ends.append(optimiser.point.x.tobytes())
    assert ends[0] == ends[1]


@pytest.mark.parametrize("start", [-3.0, 0.7])
def test_a_function_without_a_minimum_in_reach_still_falls(start: float) -> None:
    optimiser = LBFGS(lambda x: (float(-np.log1p(x @ x)), -2 * x / (1 + x @ x), None), np.array([start, 0.1]))
    first = optimiser.point.value
    run(optimiser, 10)
    assert optimiser.point.value < first - 5
