"""L-BFGS with a strong Wolfe line search, for smooth functions whose every evaluation is dear.

Nocedal and Wright, Numerical Optimization (2006): algorithm 7.4 (two loops) for the direction, 3.5 and 3.6 for the
step. Knows nothing of prompts or torch. One call of `step` is one iteration, so that the caller may record it, stop
early or keep an earlier point; arithmetic is float64, and equal values and gradients give equal bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
T = TypeVar("T")

_SUFFICIENT = 1e-4  # c1: the least decrease, as a share of what the slope promises
_FLAT = 0.9  # c2: the slope that may be left, as a share of the first; the usual value for quasi-Newton methods
_EVALUATIONS = 20  # in one line search


@dataclass(frozen=True)
class Point(Generic[T]):
    """The function at `x`. `found` is what the function returned beside value and gradient."""

    x: Vector
    value: float
    gradient: Vector
    found: T


class LBFGS(Generic[T]):
    """Minimises a function from a start; `point` is where it stands.

    Args:
        function: of a vector, to (value, gradient, anything). Values must be finite.
        memory: pairs of steps and gradient changes kept.
    """

    def __init__(self, function: Callable[[Vector], tuple[float, Vector, T]], x: Vector, memory: int = 20) -> None:
        self._function = function
        self._pairs: deque[tuple[Vector, Vector]] = deque(maxlen=memory)
        self.point: Point[T] = self._at(x)

    def step(self) -> bool:
        """One iteration. False: nothing lower was found, so this is a minimum as far as the arithmetic can tell."""
        while True:
            direction = self._direction()
            first = 1.0 if self._pairs else min(1.0, 1.0 / max(float(np.abs(self.point.gradient).sum()), 1e-300))
            slope = float(self.point.gradient @ direction)
            if slope < 0 and (lower := _line_search(self._along(direction), self.point, direction, first)) is not None:
                self._remember(lower)
                return True
            if not self._pairs:
                return False
            self._pairs.clear()  # a stale curvature led astray: once more along the gradient

    def _at(self, x: Vector) -> Point[T]:
        value, gradient, found = self._function(x)
        return Point(x, value, gradient, found)

    def _along(self, direction: Vector) -> Callable[[float], Point[T]]:
        start = self.point.x
        return lambda step: self._at(start + step * direction)

    def _remember(self, new: Point[T]) -> None:
        moved, turned = new.x - self.point.x, new.gradient - self.point.gradient
        if moved @ turned > 1e-10 * (turned @ turned):  # else the inverse Hessian would lose its sign
            self._pairs.append((moved, turned))
        self.point = new

    def _direction(self) -> Vector:
        """Minus the approximate inverse Hessian times the gradient."""
        direction = -self.point.gradient
        shares = []
        for moved, turned in reversed(self._pairs):
            share = (moved @ direction) / (moved @ turned)
            shares.append(share)
            direction = direction - share * turned
        if self._pairs:
            moved, turned = self._pairs[-1]
            direction = direction * ((moved @ turned) / (turned @ turned))
        for (moved, turned), share in zip(self._pairs, reversed(shares), strict=True):
            direction = direction + (share - (turned @ direction) / (moved @ turned)) * moved
        return direction


def _line_search(
    along: Callable[[float], Point[T]], start: Point[T], direction: Vector, step: float
) -> Point[T] | None:
    """A point along `direction` that satisfies the strong Wolfe conditions, or the lowest one found, or None."""
    slope = float(start.gradient @ direction)
    low, low_step = start, 0.0
    high: Point[T] | None = None
    high_step = np.inf
    for _ in range(_EVALUATIONS):
        point = along(step)
        if point.value > start.value + _SUFFICIENT * step * slope or point.value >= low.value:
            high, high_step = point, step
        else:
            here = float(point.gradient @ direction)
            if abs(here) <= -_FLAT * slope:
                return point
            # The minimum lies behind the lower end if the function rises from here towards the other end.
            if here * (high_step - low_step) >= 0:
                high, high_step = low, low_step
            before, before_step = low, low_step
            low, low_step = point, step
            if high is None:
                ahead = _cubic_minimum(before_step, before, low_step, low, direction)
                step = float(np.clip(ahead, 1.1 * low_step, 10 * low_step))
                continue
        # Kept a tenth away from both ends, so that the bracket shrinks.
        ends = sorted((low_step, high_step))
        margin = 0.1 * (ends[1] - ends[0])
        step = float(
            np.clip(
                _cubic_minimum(low_step, low, high_step, high, direction), ends[0] + margin, ends[1] - margin
            )
        )  # fmt: skip
    return low if low_step > 0 else None


def _cubic_minimum(a: float, at_a: Point[T], b: float, at_b: Point[T], direction: Vector) -> float:
    """Minimum of the cubic with the values and slopes of two points (Nocedal and Wright, equation 3.59)."""
    slope_a, slope_b = float(at_a.gradient @ direction), float(at_b.gradient @ direction)
    d1 = slope_a + slope_b - 3 * (at_a.value - at_b.value) / (a - b)
    inside = d1 * d1 - slope_a * slope_b
    if inside < 0:
        return (a + b) / 2
    d2 = float(np.sign(b - a) * np.sqrt(inside))
    below = slope_b - slope_a + 2 * d2
    return b - (b - a) * (slope_b + d2 - d1) / below if below else (a + b) / 2
