"""Learning the prompt's context vectors on cached image features, by one of two schedules on the same loss.

`fast` (the default) sees every crop in every step: full-batch L-BFGS from the best of a few starts, stopped by
held-out crops; it needs about a hundred text passes. `reference` is PromptDet's own schedule, kept as the yardstick:
SGD over batches of 32, an epoch per view, each step a text pass. Knows nothing of images, files or stages;
`rpl.prompts` makes the text features, `rpl.objective` the loss.

Letters: N images, V views, C categories, K context vectors, W width of the text tower, D dimension of the space.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rpl.config import Learn
from rpl.errors import BadInput
from rpl.lbfgs import LBFGS, Vector
from rpl.objective import CachedViews, score
from rpl.prompts import PromptBank

WEIGHT_DECAY = 5e-4  # Dassl's default, which the reference leaves in place
RACE_ITERATIONS = 10  # fast: of each start, before the best of them goes on
PATIENCE = 10  # fast: iterations without a better held-out loss
BATCH = 32  # reference, as the next four
LEARNING_RATE = 0.002
WARM_UP_RATE = 1e-5
MOMENTUM = 0.9
SHUFFLE_SEED = 1  # added to the run's, so that the order of images and the start are drawn apart


@dataclass(frozen=True)
class Task:
    """What is to be learned, and from what; tensors of `train` and `holdout` are on the bank's device."""

    bank: PromptBank
    starts: Tensor
    """float32 [S, K, W] on the CPU, the context vectors to start from; `reference` takes the first."""
    train: CachedViews
    holdout: CachedViews | None
    """Images that only tell when to stop; the reference's schedule has no use for them."""
    logit_scale: float


@dataclass(frozen=True)
class Step:
    """A line of the history. Step 0 is the start; losses are cross-entropies, accuracies fractions."""

    step: int
    passes: int
    loss: float
    accuracy: float
    holdout_loss: float | None = None
    holdout_accuracy: float | None = None

    @property
    def loss_to_judge_by(self) -> float:
        return self.loss if self.holdout_loss is None else self.holdout_loss

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 7) if isinstance(value, float) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Learned:
    """The context vectors [K, W] that were kept, float32 on the CPU, and how it came to them."""

    context: Tensor
    history: list[Step]
    kept: Step
    """The line of the history whose context was kept."""


class _Objective:
    """Loss of context vectors; counts the text passes it takes."""

    def __init__(self, bank: PromptBank, logit_scale: float) -> None:
        self._bank, self._logit_scale = bank, logit_scale
        self.passes = 0

    def __call__(self, context_KW: Tensor, views: CachedViews) -> tuple[float, float, Tensor, Tensor]:
        """Loss, accuracy, gradient [K, W] and text features [C, D].

        Raises:
            BadInput: the loss is not a finite number.
        """
        text_CD, pullback = self._bank.features_and_pullback(context_KW)
        self.passes += 1
        scores = score(text_CD, views, self._logit_scale, with_gradient=True)
        if scores.gradient is None or not math.isfinite(scores.loss) or not bool(scores.gradient.isfinite().all()):
            raise BadInput(
                f"learning: the loss is {scores.loss} in text pass {self.passes}; set clip.precision to fp32, and if "
                "it is, look for broken weights in clip.pretrained."
            )
        return scores.loss, scores.accuracy, pullback(scores.gradient), text_CD

    def hold_out(self, text_CD: Tensor, views: CachedViews | None) -> tuple[float | None, float | None]:
        """Loss and accuracy on held-out views; no text pass."""
        if views is None:
            return None, None
        scores = score(text_CD, views, self._logit_scale)
        return scores.loss, scores.accuracy


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
    return torch.stack([torch.randn((count, width), generator=generator) * 0.02 for _ in range(starts)])


def learn(task: Task, settings: Learn, seed: int, on_step: Callable[[Step], None]) -> Learned:
    """Learn by the schedule that `settings` names; `on_step` is called after each step.

    Raises:
        BadInput: the loss is not a finite number.
    """
    if settings.schedule == "reference":
        return learn_reference(task, seed, on_step)
    return learn_fast(task, settings.max_iterations, on_step)


def learn_fast(task: Task, max_iterations: int, on_step: Callable[[Step], None]) -> Learned:
    """Full-batch L-BFGS; keeps the step with the least held-out loss, or the last one where nothing is held out.

    The loss has minima of very different worth (on the demo's world one start in eight ends 0.2 higher and loses
    seven points of accuracy), and ten iterations tell them apart: so the starts race, and the best goes on alone.
    """
    objective = _Objective(task.bank, task.logit_scale)
    descents = [_Descent(objective, task, start_KW, on_step) for start_KW in task.starts]
    if len(descents) > 1:
        for descent in descents:
            descent.advance(min(RACE_ITERATIONS, max_iterations))
    best = min(descents, key=lambda descent: descent.kept.loss_to_judge_by)
    best.advance(max_iterations)
    return best.result()


class _Descent:
    """L-BFGS from one start, with its history and the best context on the way."""

    def __init__(self, objective: _Objective, task: Task, start_KW: Tensor, on_step: Callable[[Step], None]) -> None:
        self._objective, self._task, self._on_step = objective, task, on_step
        self._shape, self._device = start_KW.shape, task.train.features.device
        self._optimiser = LBFGS(self._evaluate, start_KW.double().numpy().ravel())
        self._history: list[Step] = []
        self._is_over = False
        self.kept = self._record()
        self._kept_x = self._optimiser.point.x

    def advance(self, iterations: int) -> None:
        """Go on until `iterations` were made in all, or no better step has come for `PATIENCE` ones."""
        while not self._is_over and self._history[-1].step < iterations:
            if not self._optimiser.step():
                self._is_over = True
                return
            step = self._record()
            if step.holdout_loss is None or step.loss_to_judge_by < self.kept.loss_to_judge_by:
                self.kept, self._kept_x = step, self._optimiser.point.x
            self._is_over = step.step - self.kept.step >= PATIENCE

    def result(self) -> Learned:
        return Learned(torch.from_numpy(self._kept_x).float().reshape(self._shape), self._history, self.kept)

    def _evaluate(self, x: Vector) -> tuple[float, Vector, tuple[float, float, Tensor]]:
        context_KW = torch.from_numpy(x).float().reshape(self._shape).to(self._device)
        loss, accuracy, gradient_KW, text_CD = self._objective(context_KW, self._task.train)
        gradient = gradient_KW.double().cpu().numpy().ravel() + WEIGHT_DECAY * x
        return loss + WEIGHT_DECAY / 2 * float(x @ x), gradient, (loss, accuracy, text_CD)

    def _record(self) -> Step:
        loss, accuracy, text_CD = self._optimiser.point.found
        held_loss, held_accuracy = self._objective.hold_out(text_CD, self._task.holdout)
        step = Step(len(self._history), self._objective.passes, loss, accuracy, held_loss, held_accuracy)
        self._history.append(step)
        self._on_step(step)
        return step


def learn_reference(task: Task, seed: int, on_step: Callable[[Step], None]) -> Learned:
    """The reference's schedule: SGD with momentum, shuffled batches of 32, epoch e on view e, its rate from `rate`."""
    objective, train = _Objective(task.bank, task.logit_scale), task.train
    device, epochs = train.features.device, train.features.shape[1]
    context_KW = task.starts[0].clone().to(device).requires_grad_()
    optimiser = torch.optim.SGD([context_KW], lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed + SHUFFLE_SEED)
    history: list[Step] = []
    for epoch in range(epochs):
        optimiser.param_groups[0]["lr"] = rate(epoch, epochs)
        for rows_N in torch.split(torch.randperm(len(train), generator=generator), BATCH):
            if len(rows_N) < BATCH <= len(train):
                continue  # the reference drops an incomplete batch
            rows_N = rows_N.to(device)
            batch = CachedViews(train.features[rows_N, epoch : epoch + 1], train.labels[rows_N], train.weights[rows_N])
            loss, accuracy, context_KW.grad, _ = objective(context_KW, batch)
            optimiser.step()
            history.append(Step(len(history) + 1, objective.passes, loss, accuracy))
            on_step(history[-1])
    return Learned(context_KW.detach().cpu(), history, history[-1])


def step_limit(task: Task, settings: Learn) -> int:
    """The number of steps after which `learn` stops at the latest."""
    if settings.schedule == "fast":
        losers = (len(task.starts) - 1) * min(RACE_ITERATIONS, settings.max_iterations)
        return settings.max_iterations + losers
    return task.train.features.shape[1] * max(1, len(task.train) // BATCH)


def rate(epoch: int, epochs: int) -> float:
    """The reference's learning rate: a warm-up epoch, then a cosine that starts over from the full rate."""
    if epoch == 0:
        return WARM_UP_RATE
    return LEARNING_RATE * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
