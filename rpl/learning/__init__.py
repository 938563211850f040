"""Learning the prompt's context vectors on cached image features, by one of two schedules on the same loss.

`fast` (the default) sees every crop in every step and needs well under a hundred text passes; `reference` is
PromptDet's own schedule. Knows nothing of images, files or stages; `rpl.prompts` makes the text features,
`rpl.objective` the loss. What a schedule has measured can be kept in a journal, from which another attempt goes on.
"""

from __future__ import annotations

from rpl.config import Learn
from rpl.learning import fast, reference
from rpl.learning.journal import FileJournal, Journal, NoJournal
from rpl.learning.task import Learned, OnStep, Step, Task, hold_out, initial_contexts

__all__ = [
    "FileJournal", "Journal", "Learned", "NoJournal", "OnStep", "Step", "Task", "hold_out", "initial_contexts", "learn",
    "step_limit",
]  # fmt: skip


def learn(task: Task, settings: Learn, seed: int, on_step: OnStep, journal: Journal | None = None) -> Learned:
    """Learn by the schedule that `settings` names; `on_step` is called after each step.

    Raises:
        BadInput: the loss is not a finite number.
        TryAgain: another of the bank's ranks is gone.
    """
    journal = NoJournal() if journal is None else journal  # an empty one is not "none"
    if settings.schedule == "reference":
        return reference.learn_reference(task, seed, on_step, journal)
    return fast.learn_fast(task, settings.max_iterations, seed, on_step, journal)


def step_limit(task: Task, settings: Learn, seed: int) -> int:
    """The number of steps after which `learn` stops at the latest."""
    if settings.schedule == "reference":
        return reference.step_limit(task)
    return fast.step_limit(task, settings.max_iterations, seed)
