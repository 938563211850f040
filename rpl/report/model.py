"""What a report holds, as plain immutable data between gathering and drawing.

Everything here is a function of the run's inputs and seed, except `seconds` wherever it stands: wall time per stage,
summed over shards. Fractions are 0..1, None where nothing could be measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["base", "novel"]
SPLITS: tuple[Split, ...] = ("base", "novel")

STATUSES = ("kept", "spare", "refused", "failed", "not_needed")
"""What became of a candidate, in the order of the page's bars."""


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on validation crops: base among base, novel among novel."""

    base: float | None
    novel: float | None

    def of(self, split: Split) -> float | None:
        return self.base if split == "base" else self.novel


@dataclass(frozen=True)
class PromptAccuracy:
    """The learned prompt of one round beside the hand-written ones, on the same crops."""

    learned: Accuracy
    manual: Accuracy
    best_manual: Accuracy
    best_template: str
    ensemble: Accuracy
    templates: tuple[tuple[str, Accuracy], ...]
    """Every hand-written prompt; the first is `manual`."""

    def gain(self, split: Split) -> float | None:
        """The learned prompt's accuracy less the hand-written one's; None where one was not measured."""
        learned, manual = self.learned.of(split), self.manual.of(split)
        return None if learned is None or manual is None else learned - manual


@dataclass(frozen=True)
class CurvePoint:
    """One step of learning. `passes`: text passes over all prompts so far; a holdout may be absent."""

    passes: float
    loss: float
    accuracy: float | None
    holdout_loss: float | None
    holdout_accuracy: float | None


@dataclass(frozen=True)
class Sourcing:
    """One walk from candidates to kept pictures: a round's (base categories) or the novel pass's."""

    kept: int
    target: int
    categories: int
    categories_full: int
    statuses: Mapping[str, int]
    """Candidates by status, one of `STATUSES`."""
    refusals: Mapping[str, int]
    """Distinct URLs by the reason for which they were refused or failed."""
    retrieval_precision: float | None
    purity: float | None
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class RoundReport:
    number: int
    accuracy: PromptAccuracy
    curve: tuple[CurvePoint, ...]
    learn: Mapping[str, Any]
    """Facts of learning: schedule, steps, text passes, loss, crops and sourced pictures used."""
    sourcing: Sourcing


@dataclass(frozen=True)
class Picture:
    """A kept picture on the contact sheet. `thumbnail`: JPEG bytes. `rank` from 0; scores are cosines."""

    thumbnail: bytes = field(repr=False)
    width: int
    height: int
    rank: int
    score: float
    image_score: float | None
    url: str
    caption: str


@dataclass(frozen=True)
class CategorySheet:
    """A category with its yield and some of its kept pictures, by rank. `category`: its row."""

    category: int
    name: str
    description: str
    split: Split
    candidates: int
    downloaded: int
    kept: int
    target: int
    refused: Mapping[str, int]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class DataCounts:
    """What the run started from."""

    base: int
    novel: int
    train_crops: int
    val_crops: int
    skipped_boxes: Mapping[str, int]
    """Boxes that gave no crop, by reason."""
    base_without_crops: int
    pool_rows: int
    pool_dim: int
    pool_index: str

    @property
    def categories(self) -> int:
        return self.base + self.novel


@dataclass(frozen=True)
class Move:
    """A picture that both runs kept at another rank, from 0."""

    category: str
    url: str
    then: int
    now: int


@dataclass(frozen=True)
class CategoryChange:
    """A category's kept pictures: those that are new, gone, in both, and of the last those at another rank."""

    name: str
    new: int
    gone: int
    stayed: int
    moved: int

    @property
    def then(self) -> int:
        return self.stayed + self.gone

    @property
    def now(self) -> int:
        return self.stayed + self.new


@dataclass(frozen=True)
class Changes:
    """Kept pictures of two runs side by side."""

    new: int
    gone: int
    stayed: int
    moved: int
    gone_because: Mapping[str, int]
    """Gone ones by what became of them: a reason, a status of `STATUSES`, or "not_a_candidate"; the commonest first."""
    moves: tuple[Move, ...]
    """The largest ones."""
    categories: tuple[CategoryChange, ...]
    """Those with most change, in that order."""
    categories_changed: int
    """All in which anything changed, also those that `categories` has no room for."""


@dataclass(frozen=True)
class Standing:
    """How well a run did: accuracy of its prompts, and its novel pass."""

    accuracy: Accuracy
    retrieval_precision: float | None
    purity: float | None
    kept: int
    target: int


@dataclass(frozen=True)
class Since:
    """This run beside the previous one, `uri`."""

    uri: str
    changes: Changes
    """Of novel categories."""
    then: Standing
    now: Standing
    addresses: Mapping[str, int]
    """Verdicts of the previous run that were "reused", judged addresses that were "asked_again", and of these the
    "revived" ones, which had failed. In all passes; an address counts in each that needed it."""


@dataclass(frozen=True)
class ReportData:
    """A whole run. `rounds` in order and never empty; `sheets` in row order of the categories."""

    uri: str
    encoder: Mapping[str, Any]
    prompts_digest: str
    best_round: int
    data: DataCounts
    rounds: tuple[RoundReport, ...]
    novel: Sourcing
    sheets: tuple[CategorySheet, ...]
    export: Mapping[str, int]
    """Facts of the export: images, annotations, categories."""
    export_files: tuple[tuple[str, int], ...]
    """Name and bytes of each exported file."""
    settings_yaml: str
    attribution: str
    """Text about the sources' licences, shown as it is; empty where the data set brought none."""
    seconds: Mapping[str, float]
    """Stages that ran once, before and after the rounds."""
    since: Since | None = None
    """Where the run sources again from another one."""

    @property
    def name(self) -> str:
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def best(self) -> RoundReport:
        """The round whose prompts sourced the novel categories."""
        return next(r for r in self.rounds if r.number == self.best_round)

    def sheets_of(self, split: Split) -> tuple[CategorySheet, ...]:
        return tuple(sheet for sheet in self.sheets if sheet.split == split)
