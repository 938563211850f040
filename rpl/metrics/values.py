"""Values of the metrics, as pure functions of a manifest, an exit kind, a run's outcome. Knows nothing of pushing.

What a shard computed is read from its manifest alone, so a shard that was found done reports the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from rpl.errors import BadInput, RplError, TryAgain
from rpl.manifests import Manifest, base_accuracy
from rpl.metrics import declared as m
from rpl.metrics.declared import Metric, Sample
from rpl.reasons import BY_WORD
from rpl.rounds import Node
from rpl.stage import Run

ExitKind = Literal["done", "bad_input", "try_again", "bug"]


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended. `finished` is Unix time; None and missing keys: not known, so not pushed."""

    succeeded: bool
    finished: float
    seconds: float | None = None
    rounds: int = 0
    best_accuracy: Mapping[str, float] = field(default_factory=dict)
    """Fractions by split, base and novel, of the round with the best prompts."""
    novel_kept: int | None = None
    novel_target: int | None = None


def exit_kind(error: BaseException | None) -> ExitKind:
    """How an attempt ended that raised `error`, or nothing."""
    if error is None:
        return "done"
    if isinstance(error, BadInput):
        return "bad_input"
    # What is no Exception is a signal: SIGTERM, Ctrl-C. The same command goes on after it.
    if isinstance(error, TryAgain) or not isinstance(error, Exception):
        return "try_again"
    return "bug"


def ended(kind: ExitKind, now: float) -> list[Sample]:
    """That an attempt ended at `now` (Unix time), and how."""
    exits = [m.EXIT(each == kind, kind=each) for each in get_args(ExitKind)]
    return [m.COMPLETION(now), m.SUCCESS(kind == "done"), *exits]


def stage_metrics(manifest: Manifest, inputs: Iterable[Manifest]) -> list[Sample]:
    """What a committed shard reports.

    Args:
        manifest: the shard's.
        inputs: the manifests that it read; the size of their files is not in its own.
    """
    read = {file.path: file.size for each in inputs for file in each.files.values()}
    return [
        m.DURATION(manifest.wall_s),
        m.ROWS(manifest.rows),
        m.INPUT(sum(read.values())),
        m.OUTPUT(sum(file.size for file in manifest.files.values())),
        m.MEMORY(manifest.peak_memory_bytes),
        *_FACTS.get(manifest.stage, _no_facts)(manifest.facts),
    ]


def run_outcome(run: Run, *, succeeded: bool, finished: float, seconds: float | None = None) -> RunOutcome:
    """The outcome of `run`, from what it has committed: a run that failed half-way has less to tell.

    Args:
        run: opened after its last stage.
        finished: Unix time.
        seconds: wall time of the run, where the caller knows it.
    """
    ended_so = RunOutcome(succeeded=succeeded, finished=finished, seconds=seconds)
    try:
        rounds = list(run.embedded_rounds())
        curated = run.manifests(Node("curate", "novel")) or []
    except RplError:  # what broke the run, a missing file say, may well be in the way here too
        return ended_so
    # The earliest of equals, as the novel pass chooses.
    best = max(rounds, key=lambda embedded: base_accuracy(embedded) or 0.0, default=None)
    accuracy = {} if best is None else best.facts["accuracy"]["learned"]
    facts = curated[0].facts if curated else {}
    return replace(
        ended_so,
        rounds=len(rounds),
        best_accuracy={split: value for split, value in accuracy.items() if value is not None},
        novel_kept=facts.get("kept"),
        novel_target=facts.get("target"),
    )


def run_metrics(outcome: RunOutcome) -> list[Sample]:
    """What a run reports at its end."""
    return [
        m.RUN_SUCCESS(outcome.succeeded),
        m.RUN_COMPLETION(outcome.finished),
        m.RUN_ROUNDS(outcome.rounds),
        *known(m.RUN_DURATION, outcome.seconds),
        *(m.RUN_ACCURACY(value, split=split) for split, value in outcome.best_accuracy.items()),
        *known(m.RUN_KEPT, outcome.novel_kept),
        *known(m.RUN_TARGET, outcome.novel_target),
    ]


def known(metric: Metric, value: float | None, **labels: str) -> list[Sample]:
    """The value as a list of one; of none where it is not known."""
    return [] if value is None else [metric(value, **labels)]


Facts = Mapping[str, Any]


def _no_facts(_facts: Facts) -> list[Sample]:
    return []


def _download(facts: Facts) -> list[Sample]:
    return [*known(m.IMAGES, facts.get("ok"), outcome="ok", reason=""), *_by_reason(facts)]


def _curate(facts: Facts) -> list[Sample]:
    return [
        *known(m.IMAGES, facts.get("kept"), outcome="kept", reason=""),
        *_by_reason(facts),
        *known(m.KEPT, facts.get("kept")),
        *known(m.TARGET, facts.get("target")),
        *known(m.FULL, facts.get("categories_full")),
        *known(m.PRECISION, facts.get("retrieval_precision")),
        *known(m.PURITY, facts.get("purity")),
    ]


def _by_reason(facts: Facts) -> list[Sample]:
    counts: Mapping[str, int] = facts.get("by_reason", {})
    return [m.IMAGES(count, outcome=BY_WORD[word].kind, reason=word) for word, count in counts.items()]


def _learn(facts: Facts) -> list[Sample]:
    return [*known(m.LOSS, facts.get("loss")), *known(m.PASSES, facts.get("text_passes"))]


def _embed(facts: Facts) -> list[Sample]:
    accuracy: Mapping[str, Any] = facts.get("accuracy", {})
    return [
        sample
        for prompt in ("learned", "manual", "best_manual", "ensemble")
        for split in ("base", "novel")
        for sample in known(m.ACCURACY, accuracy.get(prompt, {}).get(split), prompt=prompt, split=split)
    ]


_FACTS: dict[str, Callable[[Facts], list[Sample]]] = {
    "download": _download, "curate": _curate, "learn": _learn, "embed": _embed,
}  # fmt: skip
