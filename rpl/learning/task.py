"""What is learned from what, and the objective that every schedule asks: one text pass, one loss, one gradient.

Knows nothing of optimisers.

Letters: N images, V views, C categories, K context vectors, W width of the text tower, S starts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rpl.errors import BadInput
from rpl.learning.journal import Journal, Measured
from rpl.objective import CachedViews, score
from rpl.prompts import PromptBank


@dataclass(frozen=True)
class Task:
    """What is to be learned, and from what; tensors of `train` and `holdout` are on the bank's device."""

    bank: PromptBank
    starts: Tensor
    """float32 [S, K, W] on the CPU, the context vectors to start from, shared by all categories; or [S, C, K, W]."""
    train: CachedViews
    holdout: CachedViews | None
    """Images that only tell when to stop; the reference's schedule has no use for them."""
    logit_scale: float

    def narrowed(self, categories: npt.NDArray[np.int64]) -> Task:
        """The task among some categories only, with their images; they are renumbered in the given order."""
        bank = PromptBank(self.bank.tower, self.bank.tokens.select(categories), ranks=self.bank.ranks)
        starts = self.starts if self.starts.ndim == 3 else self.starts[:, torch.from_numpy(categories)]
        holdout = None if self.holdout is None else self.holdout.narrowed(categories)
        if holdout is not None and not len(holdout):
            holdout = None
        return replace(self, bank=bank, starts=starts, train=self.train.narrowed(categories), holdout=holdout)


@dataclass(frozen=True)
class Step:
    """A line of the history. Step 0 is the start; losses are cross-entropies, accuracies fractions."""

    step: int
    passes: float
    """Text passes so far; one among some of the categories counts as its share of the tokens."""
    loss: float
    accuracy: float
    holdout_loss: float | None = None
    holdout_accuracy: float | None = None

    @property
    def loss_to_judge_by(self) -> float:
        return self.loss if self.holdout_loss is None else self.holdout_loss

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 7) if isinstance(value, float) else value for key, value in asdict(self).items()}


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Learned:
    """The context vectors [K, W] or [C, K, W] that were kept, float32 on the CPU, and how it came to them."""

    context: Tensor
    history: list[Step]
    kept: Step
    """The line of the history whose context was kept."""
    race: list[list[Step]] = field(default_factory=list)
    """Histories of the starts that raced before; among a sample of the categories losses are lower."""


class Meter:
    """Counts text passes in units of one over all of the task's prompts."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._used = tokens, 0

    def add(self, tokens: int) -> None:
        self._used += tokens

    @property
    def passes(self) -> float:
        return self._used / self._tokens


class Objective:
    """Loss of context vectors on a task's images, by one text pass; what the journal knows is not taken again."""

    def __init__(self, task: Task, meter: Meter, journal: Journal, name: str) -> None:
        """`name` tells this task's passes from those of another in the same journal."""
        self._task, self._meter, self._journal, self._name = task, meter, journal, name

    def __call__(self, context: Tensor, views: CachedViews, part: str, *, hold_out: bool) -> Measured:
        """Measured at `context` (float32, on the CPU).

        Args:
            part: tells `views` from others of the same task.
            hold_out: measure on the held-out views too, which takes no further pass.

        Raises:
            BadInput: the loss is not a finite number.
        """
        bank = self._task.bank
        self._meter.add(bank.token_count)
        key = hashlib.sha256(f"{self._name} {part} ".encode() + context.numpy().tobytes()).digest()
        measured = self._journal.find(key)
        if measured is None:
            measured = self._measure(context.to(bank.tower.device), views, hold_out=hold_out)
            self._journal.add(key, measured)
        return measured

    def _measure(self, context: Tensor, views: CachedViews, *, hold_out: bool) -> Measured:
        bank, scale = self._task.bank, self._task.logit_scale
        text_CD, pullback = bank.features_and_pullback(context)
        found = score(text_CD, views, scale, with_gradient=True, ranks=bank.ranks)
        if found.gradient is None or not math.isfinite(found.loss) or not bool(found.gradient.isfinite().all()):
            raise BadInput(
                f"learning: the loss is {found.loss} in text pass {self._meter.passes:.0f}; set clip.precision to "
                "fp32, and if it is, look for broken weights in clip.pretrained."
            )
        held_loss = held_accuracy = None
        if hold_out and self._task.holdout is not None:
            held = score(text_CD, self._task.holdout, scale, ranks=bank.ranks)
            held_loss, held_accuracy = held.loss, held.accuracy
        return Measured(found.loss, found.accuracy, held_loss, held_accuracy, pullback(found.gradient).cpu())


def hold_out(labels_N: npt.NDArray[np.integer], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """bool [N]: a `share` of the images, drawn evenly over categories (of each its share, rounded up or down)."""
    draws = np.random.default_rng(seed)
    order = draws.permutation(len(labels_N))
    by_label = order[np.argsort(labels_N[order], kind="stable")]
    # Systematic sampling: walking through the images by category, one is taken at each whole number that is passed.
    passed = np.floor(np.arange(len(labels_N) + 1) * share + draws.random())
    held = np.zeros(len(labels_N), dtype=bool)
    held[by_label[np.diff(passed) > 0]] = True
    return held


def initial_contexts(starts: int, count: int, width: int, seed: int) -> Tensor:
    """Context vectors [S, K, W] drawn from N(0, 0.02), as in CoOp and the reference; more leave the first ones."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn((1, count, width), generator=generator) * 0.02 for _ in range(starts)]
    return torch.cat([torch.empty((0, count, width)), *drawn])
