"""`ReportData` → one self-contained HTML page. Pure: equal data give equal text.

The page loads nothing and runs nothing: style, drawings and thumbnails are inside it, there is no script, and its
content security policy says so to the browser. Every text that came from outside is escaped by the template, every
link goes out only as http(s). All that depends on the clock stands in the section `time`.
"""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from rpl import __version__
from rpl.reasons import Reason
from rpl.report import text
from rpl.report.advice import advice
from rpl.report.charts import Axis, Dot, Line, dot_chart, line_chart, nice_axis
from rpl.report.model import SPLITS, STATUSES, CategorySheet, ReportData, RoundReport, Since, Sourcing, Split
from rpl.report.since import NOT_A_CANDIDATE
from rpl.rounds import STAGES

BARS_SHOWN = 36
"""Yield bars before the rest is folded away."""

STATUS_TITLES: Mapping[str, str] = {
    "kept": "kept",
    "spare": "good but spare",
    "refused": "refused",
    "failed": "unavailable",
    "not_needed": "not fetched",
}

GONE: Mapping[str, str] = {
    "spare": "Still good, but others fill the number wanted.",
    "not_needed": "Not looked at again: others fill the number wanted.",
    NOT_A_CANDIDATE: "Not among the category's candidates any more.",
}
"""What became of a picture that is gone for no reason of its own."""

STAGE_TITLES: Mapping[str, str] = {
    "fetch": "While fetching",
    "picture": "In the picture itself",
    "curate": "Compared with other pictures",
}

SKIPPED_BOXES: Mapping[str, str] = {
    "small": "too small",
    "sub_pixel": "without a whole pixel",
    "unlisted": "of categories that are not in the list",
    "novel": "of novel categories, which learning must not see",
    "not_drawn": "beyond the number per category",
    "crowd": "around crowds",
    "bad": "without area or outside their image",
}

FILE_NOTES: Mapping[str, str] = {
    "category_embeddings.pt": "classifier weights for an open-vocabulary detector: a tensor, one row per category",
    "category_embeddings.npy": "the same for numpy",
    "categories.json": "the rows: names, descriptions, base or novel",
    "sourced_novel.json": "the kept pictures in COCO form, with true sizes",
    "sourced_novel_reference.json": "the same as PromptDet's converter writes it, for its training code",
    "sourced.parquet": "the record: every candidate with its source, scores and fate",
    "images.tar": "the kept pictures as a WebDataset; `rpl fetch` unpacks them to images/",
}


_ADDRESS = re.compile(
    r"\[(?P<label>[^\[\]\n]+)\]\((?P<target>https?://[^\s<>()\"']+)\)"
    r"|(?P<bare>https?://[^\s<>()\[\]\"']*[^\s<>()\[\]\"'.,;:!?])"
)


@dataclass(frozen=True)
class KeyFigure:
    label: str
    value: str
    note: str
    css_class: str = ""


@dataclass(frozen=True)
class Pass:
    """A walk from candidates to kept pictures under the name the page gives it."""

    title: str
    split: Split
    sourcing: Sourcing


@dataclass(frozen=True)
class RefusalGroup:
    title: str
    rows: tuple[tuple[str, tuple[int, ...]], ...]
    """Sentence, and distinct URLs per pass."""


def render(data: ReportData) -> str:
    """The page."""
    files = resources.files("rpl.report") / "templates"
    passes = _passes(data)
    return (
        _environment()
        .get_template("page.html")
        .render(
            data=data,
            version=__version__,
            style=Markup((files / "style.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
            headline=headline(data),
            advice=advice(data),
            figures=key_figures(data),
            accuracy_charts=accuracy_charts(data),
            curves=learning_curves(data.rounds),
            passes=passes,
            refusals=refusal_groups([p.sourcing.refusals for p in passes]),
            yields=[(split, _worst_first(data.sheets_of(split))) for split in reversed(SPLITS)],
            clocks=[title for title, _ in _clocks(data)],
            time_rows=time_rows([spent for _, spent in _clocks(data)]),
            attribution=paragraphs(data.attribution),
            statuses=STATUSES,
            status_titles=STATUS_TITLES,
            file_notes=FILE_NOTES,
            skipped_titles=SKIPPED_BOXES,
            standings=standings(data.since),
            gone=gone_because(data.since),
            encoder=encoder_facts(data.encoder),
            fetch_command=shlex.join(["rpl", "fetch", data.uri, "results"]),
            bars_shown=BARS_SHOWN,
        )
    )


def headline(data: ReportData) -> str:
    """The result in one sentence."""
    accuracy = data.best.accuracy
    crops: Mapping[Split, str] = {"novel": "objects in categories it never saw", "base": "objects it was not shown"}
    for split, objects in crops.items():
        learned, manual = accuracy.learned.of(split), accuracy.manual.of(split)
        if learned is not None and manual is not None:
            return (
                f"Of {objects}, the learned prompt names {text.percent(learned, 0)} right, "
                f"the hand-written one {text.percent(manual, 0)}."
            )
    pictures = text.plural(data.novel.kept, "picture")
    return f"{pictures} kept for {text.plural(data.novel.categories, 'novel category', 'novel categories')}."


def key_figures(data: ReportData) -> list[KeyFigure]:
    accuracy, novel = data.best.accuracy, data.novel
    figures = []
    for split in reversed(SPLITS):
        gain = accuracy.gain(split)
        if gain is None:
            note = "no validation crops"
        elif gain < 0:
            note = f"{-100 * gain:.1f} points below the hand-written prompt"
        else:
            note = f"{text.points(gain)} points over the hand-written prompt"
        learned = text.percent(accuracy.learned.of(split))
        figures.append(KeyFigure(f"Accuracy on {split} categories", learned, note, split))
    precision = "the pool has no true labels to compare with"
    if novel.retrieval_precision is not None:
        precision = "of the candidates show their category"
        if novel.purity is not None:
            precision += f"; {text.percent(novel.purity)} of the kept ones"
    figures.append(KeyFigure("Retrieval precision", text.percent(novel.retrieval_precision), precision))
    wanted = f"of {text.count(novel.target)} wanted; {novel.categories_full} of {novel.categories} categories full"
    figures.append(KeyFigure("Novel pictures kept", text.count(novel.kept), wanted))
    return figures


def accuracy_charts(data: ReportData) -> list[tuple[Split, Markup]]:
    """A chart per split, on the same axis, hand-written prompts in grey and learned ones in the split's colour."""
    first = data.rounds[0].accuracy
    compared = [first.manual, first.best_manual, first.ensemble, *(r.accuracy.learned for r in data.rounds)]
    values = [value for accuracy in compared for split in SPLITS if (value := accuracy.of(split)) is not None]
    axis = nice_axis(values, from_zero=True)
    count = len(first.templates)
    charts: list[tuple[Split, Markup]] = []
    for split in SPLITS:
        rows = [
            Dot("hand-written", first.manual.of(split), "manual"),
            Dot(f"best of {count}", first.best_manual.of(split), "manual"),
            Dot(f"ensemble of {count}", first.ensemble.of(split), "manual"),
        ]
        rows += [
            Dot(f"learned, round {r.number}", r.accuracy.learned.of(split), split, gap=r is data.rounds[0])
            for r in data.rounds
        ]
        title = f"Accuracy on {split} categories: " + ", ".join(f"{r.label} {text.percent(r.value)}" for r in rows)
        charts.append((split, dot_chart(rows, axis, first.manual.of(split), title)))
    return charts


def learning_curves(rounds: Sequence[RoundReport]) -> list[tuple[RoundReport, Markup, Markup]]:
    """Loss and accuracy of each round over the text passes, all on the same axes."""
    points = [point for r in rounds for point in r.curve]
    passes = nice_axis([0.0, *(float(point.passes) for point in points)], tight=True, ticks=3)
    loss = nice_axis(_known(value for p in points for value in (p.loss, p.holdout_loss)))
    accuracy = nice_axis(_known(value for p in points for value in (p.accuracy, p.holdout_accuracy)))
    return [
        (
            r,
            _curve(r, "Loss", ("loss", "holdout_loss"), passes, loss),
            _curve(r, "Accuracy", ("accuracy", "holdout_accuracy"), passes, accuracy),
        )
        for r in rounds
    ]


def refusal_groups(refusals: Sequence[Mapping[str, int]]) -> list[RefusalGroup]:
    """Reasons that occurred, grouped by where they show and by number; unknown words stand as they are."""
    totals = {word: sum(p.get(word, 0) for p in refusals) for p in refusals for word in p}
    known = {str(reason): reason for reason in Reason}
    groups: dict[str, list[str]] = {}
    for word in sorted(totals, key=lambda word: (-totals[word], word)):
        groups.setdefault(known[word].stage if word in known else "other", []).append(word)
    return [
        RefusalGroup(
            STAGE_TITLES.get(stage, "Other"),
            tuple(
                (known[word].sentence if word in known else word, tuple(p.get(word, 0) for p in refusals))
                for word in groups[stage]
            ),
        )
        for stage in (*STAGE_TITLES, "other")
        if stage in groups
    ]


def standings(since: Since | None) -> list[tuple[str, str, str, str]]:
    """What is measured, then, now, and the change in points."""
    if since is None:
        return []
    then, now = since.then, since.now
    rows = [
        (f"Accuracy on {split} categories", then.accuracy.of(split), now.accuracy.of(split))
        for split in reversed(SPLITS)
    ]
    rows += [
        ("Retrieval precision", then.retrieval_precision, now.retrieval_precision),
        ("Purity", then.purity, now.purity),
        ("Novel pictures kept of those wanted", _share(then.kept, then.target), _share(now.kept, now.target)),
    ]
    return [
        (what, text.percent(a), text.percent(b), text.points(None if a is None or b is None else b - a))
        for what, a, b in rows
    ]


def gone_because(since: Since | None) -> list[tuple[str, int]]:
    """Sentences with numbers of pictures, the commonest first; unknown words stand as they are."""
    sentences = {**GONE, **{reason.value: reason.sentence for reason in Reason}}
    found = {} if since is None else since.changes.gone_because
    return [(sentences.get(word, word), number) for word, number in found.items()]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def encoder_facts(encoder: Mapping[str, object]) -> list[tuple[str, str]]:
    """What names the CLIP, most telling first; digests shortened, the summary has them whole."""
    order = [name for name in ("model", "pretrained", "dim") if name in encoder]
    order += [name for name in sorted(encoder) if name not in order]
    return [(name, short_digest(str(encoder[name]))) for name in order]


def short_digest(value: str) -> str:
    return f"{value[:16]}…" if re.fullmatch(r"[0-9a-f]{32,}", value) else value


def time_rows(clocks: Sequence[Mapping[str, float]]) -> list[tuple[str, list[float | None]]]:
    """Per stage its seconds on each clock and in all; the last row adds them up."""
    rows: list[tuple[str, list[float | None]]] = []
    for stage in STAGES:
        spent = [clock.get(stage) for clock in clocks]
        if any(value is not None for value in spent):
            rows.append((stage, [*spent, sum(_known(spent))]))
    totals = [sum(clock.values()) for clock in clocks]
    return [*rows, ("all", [*totals, sum(totals)])]


def paragraphs(markdown: str) -> list[str]:
    """What blank lines separate, without the marks of headings."""
    return [re.sub(r"^#+ ", "", part.strip(), flags=re.M) for part in re.split(r"\n\s*\n", markdown) if part.strip()]


def linkified(paragraph: str) -> Markup:
    """A paragraph of Markdown as plain text, its http(s) addresses and `[label](address)` as links, nothing else."""
    parts: list[Markup] = []
    end = 0
    for found in _ADDRESS.finditer(paragraph):
        target = text.web_link(found["target"] or found["bare"])
        if target is not None:
            anchor = Markup('<a href="{}" rel="noopener noreferrer">{}</a>').format(target, found["label"] or target)
            parts += [escape(paragraph[end : found.start()]), anchor]
            end = found.end()
    return Markup("").join([*parts, escape(paragraph[end:])])


def _passes(data: ReportData) -> list[Pass]:
    rounds = [Pass(f"Round {r.number}", "base", r.sourcing) for r in data.rounds]
    return [*rounds, Pass("Novel", "novel", data.novel)]


def _clocks(data: ReportData) -> list[tuple[str, Mapping[str, float]]]:
    return [("Once", data.seconds), *((p.title, p.sourcing.seconds) for p in _passes(data))]


def _worst_first(sheets: Iterable[CategorySheet]) -> list[CategorySheet]:
    return sorted(sheets, key=lambda sheet: (sheet.kept / max(1, sheet.target), sheet.name))


def _curve(r: RoundReport, name: str, fields: tuple[str, str], x_axis: Axis, y_axis: Axis) -> Markup:
    lines = [
        Line(label, css_class, [(point.passes, getattr(point, field)) for point in r.curve])
        for label, css_class, field in zip(("training", "held out"), ("train", "heldout"), fields, strict=True)
    ]
    if not any(y is not None for line in lines for _, y in line.points):
        return Markup("")
    return line_chart(
        lines,
        x_axis,
        y_axis,
        x_label="text passes",
        as_percent=name == "Accuracy",
        title=f"{name} against text passes, round {r.number}",
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rpl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": text.count,
        "data_uri": _data_uri,
        "decimal": text.decimal,
        "duration": text.duration,
        "host": text.host,
        "linkified": linkified,
        "percent": text.percent,
        "plain": text.plain,
        "plural": text.plural,
        "seconds": text.seconds,
        "short_digest": short_digest,
        "size": text.size,
        "web_link": text.web_link,
    }
    return environment
