"""Every metric, declared once: name, unit, labels, meaning. The page docs/metrics.md is made from this table.

All are gauges: a stage is a batch job that pushes what it found and ends, and another attempt begins again at nothing,
which a counter must not. Base units, spelled at the end of the name. Which run, round, stage and shard a value belongs
to is said by the group it is pushed under, never by a label here; nor is a URL or a category ever one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Scope = Literal["stage", "run"]
"""Pushed under run, round, stage and shard, or under the run alone."""


class Sample(NamedTuple):
    """A metric's value, with the values of its labels in the order in which they were declared."""

    metric: Metric
    labels: tuple[str, ...]
    value: float


@dataclass(frozen=True)
class Metric:
    """One metric. `unit` is what the value counts; `text` its meaning, one sentence or two."""

    name: str
    scope: Scope
    unit: str
    text: str
    labels: tuple[str, ...] = ()
    kind: Literal["gauge"] = "gauge"

    def __call__(self, value: float, **labels: str) -> Sample:
        """The value under these labels, which must be the declared ones."""
        assert set(labels) == set(self.labels), self.name
        return Sample(self, tuple(labels[name] for name in self.labels), float(value))


METRICS: list[Metric] = []
"""All of them, in reading order."""


def _stage(name: str, unit: str, text: str, *labels: str) -> Metric:
    METRICS.append(Metric(name, "stage", unit, text, labels))
    return METRICS[-1]


def _run(name: str, unit: str, text: str, *labels: str) -> Metric:
    METRICS.append(Metric(name, "run", unit, text, labels))
    return METRICS[-1]


START = _stage("rpl_stage_start_timestamp_seconds", "seconds", "Unix time at which this attempt at the shard started.")
LAST_PROGRESS = _stage(
    "rpl_stage_last_progress_timestamp_seconds", "seconds",
    "Unix time of the last progress that was pushed: at most every 15 seconds, and at start and end.",
)  # fmt: skip
COMPLETION = _stage(
    "rpl_stage_completion_timestamp_seconds", "seconds",
    "Unix time at which the attempt ended, well or not. Absent while it runs, and after a kill that left no time.",
)  # fmt: skip
SUCCESS = _stage("rpl_stage_success", "0 or 1", "1 where the attempt ended with the shard committed, else 0.")
EXIT = _stage(
    "rpl_stage_exit", "0 or 1",
    "1 for how the attempt ended, 0 for the others: done (exit code 0), bad_input (2), try_again (75, or stopped by a "
    "signal), bug (1).",
    "kind",
)  # fmt: skip
RETRIES = _stage("rpl_stage_retries", "attempts", "Attempts at the shard before this one (RPL_ATTEMPT).")
DURATION = _stage(
    "rpl_stage_duration_seconds", "seconds",
    "Wall time of the attempt that committed the shard; of a failed one, how long it took to fail.",
)  # fmt: skip
ITEMS_DONE = _stage(
    "rpl_stage_items_done",
    "items",
    "How far a running attempt is, in the stage's own items (pictures, addresses, steps).",
)
ITEMS_EXPECTED = _stage(
    "rpl_stage_items_expected", "items", "How many items it will be, at most. Absent where unknown."
)
ROWS = _stage("rpl_stage_rows", "rows", "Rows of the shard's output: crops, pictures, candidates, by the stage.")
INPUT = _stage(
    "rpl_stage_input_bytes",
    "bytes",
    "Size of the committed files that the shard's inputs hold; a file twice counts once.",
)
OUTPUT = _stage("rpl_stage_output_bytes", "bytes", "Size of the files that the shard committed.")
MEMORY = _stage(
    "rpl_stage_peak_memory_bytes", "bytes", "Peak resident memory of the stage's process, without its worker processes."
)
DEVICE_MEMORY = _stage(
    "rpl_stage_peak_device_memory_bytes", "bytes",
    "Peak of what tensors held on the GPU. Absent without one, and where the shard was found done.",
)  # fmt: skip
IMAGES = _stage(
    "rpl_stage_images", "images",
    "Different addresses by what became of them. download: ok, failed (the web did not give it), refused (we did not "
    "take it). curate: kept (pictures, each in each of its categories), failed, refused. The reasons are a closed "
    "list, explained in every report; empty for ok and kept.",
    "outcome", "reason",
)  # fmt: skip
KEPT = _stage("rpl_sourcing_kept_images", "images", "Pictures that curate kept, over all categories of its split.")
TARGET = _stage("rpl_sourcing_target_images", "images", "Pictures that it was to keep: rounds.kept for each category.")
FULL = _stage("rpl_sourcing_full_categories", "categories", "Categories that got all the pictures they were to get.")
PRECISION = _stage(
    "rpl_sourcing_precision_ratio", "ratio", "Candidates that truly show their category. Only with pool.truth."
)
PURITY = _stage(
    "rpl_sourcing_purity_ratio", "ratio", "Kept pictures that truly show their category. Only with pool.truth."
)
LOSS = _stage(
    "rpl_learning_loss", "nats",
    "Cross-entropy on the training crops: of the step just made while learning runs (starts that race are among them), "
    "of the kept step afterwards.",
)  # fmt: skip
PASSES = _stage("rpl_learning_text_passes", "passes", "Text passes, forward and back, that learning took.")
ACCURACY = _stage(
    "rpl_validation_accuracy_ratio", "ratio",
    "Top-1 accuracy on validation crops, base among base or novel among novel, by prompt: learned, manual (the first "
    "hand-written one), best_manual (the best of them on base), ensemble.",
    "prompt", "split",
)  # fmt: skip

RUN_SUCCESS = _run("rpl_run_success", "0 or 1", "1 where the whole run ended well, 0 where it failed or was stopped.")
RUN_COMPLETION = _run(
    "rpl_run_completion_timestamp_seconds", "seconds", "Unix time at which the run ended, well or not."
)
RUN_DURATION = _run("rpl_run_duration_seconds", "seconds", "Wall time from the run's start to its end.")
RUN_ROUNDS = _run("rpl_run_rounds", "rounds", "Rounds whose accuracy was measured.")
RUN_ACCURACY = _run(
    "rpl_run_best_accuracy_ratio", "ratio",
    "Top-1 validation accuracy of the learned prompt in the round that is best on base categories.",
    "split",
)  # fmt: skip
RUN_KEPT = _run("rpl_run_novel_kept_images", "images", "Pictures of novel categories that the run hands over.")
RUN_TARGET = _run("rpl_run_novel_target_images", "images", "Pictures of novel categories that it was to hand over.")
