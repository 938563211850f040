"""The report for programs (`summary.json`) and for a terminal (a text table), both pure functions.

Fractions have six digits. Everything but what stands under a key `seconds` is the same for the same inputs and seed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rpl.report.advice import advice
from rpl.report.model import SPLITS, Accuracy, PromptAccuracy, ReportData, Since, Sourcing
from rpl.report.text import plain
from rpl.rounds import STAGES


def summarise(data: ReportData) -> dict[str, Any]:
    """The content of `summary.json`."""
    everything = [data.seconds, data.novel.seconds, *(r.sourcing.seconds for r in data.rounds)]
    found: dict[str, Any] = {
        "run": data.uri,
        "encoder": dict(data.encoder),
        "prompts_digest": data.prompts_digest,
        "data": {
            "categories": data.data.categories,
            "base": data.data.base,
            "novel": data.data.novel,
            "crops": {"train": data.data.train_crops, "val": data.data.val_crops},
            "skipped_boxes": dict(data.data.skipped_boxes),
            "base_without_crops": data.data.base_without_crops,
            "pool": {"rows": data.data.pool_rows, "dim": data.data.pool_dim, "index": data.data.pool_index},
        },
        "rounds": [
            {"round": r.number, "accuracy": _accuracies(r.accuracy), **_sourcing(r.sourcing)} for r in data.rounds
        ],
        "advice": list(advice(data)),
        "novel": {"best_round": data.best_round, **_sourcing(data.novel)},
        "export": dict(data.export),
        "totals": {
            "rounds": len(data.rounds),
            "text_passes": sum(int(r.learn.get("text_passes", 0)) for r in data.rounds),
            "kept": {
                "base": data.rounds[-1].sourcing.kept,
                "novel": data.novel.kept,
            },
            "seconds": {
                "once": dict(data.seconds),
                "all": round(sum(sum(seconds.values()) for seconds in everything), 3),
            },
        },
    }
    if data.since is not None:
        found["since"] = _since(data.since)
    return found


def summary_table(summary: Mapping[str, Any]) -> str:
    """A summary as text of at most 100 columns: accuracy, sourcing and seconds, a line per round."""
    blocks = [_accuracy_block(summary), _sourcing_block(summary), _seconds_block(summary)]
    if "since" in summary:
        blocks.insert(0, _since_block(summary["since"]))
    return "\n\n".join("\n".join(block) for block in blocks)


def _accuracies(accuracy: PromptAccuracy) -> dict[str, Any]:
    return {
        "manual": {"template": accuracy.templates[0][0], **_pair(accuracy.manual)},
        "best_manual": {"template": accuracy.best_template, **_pair(accuracy.best_manual)},
        "ensemble": {"templates": len(accuracy.templates), **_pair(accuracy.ensemble)},
        "learned": _pair(accuracy.learned),
    }


def _pair(accuracy: Accuracy) -> dict[str, float | None]:
    return {"base": accuracy.base, "novel": accuracy.novel}


def _sourcing(sourcing: Sourcing) -> dict[str, Any]:
    return {
        "retrieval_precision": sourcing.retrieval_precision,
        "purity": sourcing.purity,
        "yield": {
            "kept": sourcing.kept,
            "target": sourcing.target,
            "categories": sourcing.categories,
            "categories_full": sourcing.categories_full,
        },
        "candidates": dict(sourcing.statuses),
        "refusals": dict(sourcing.refusals),
        "seconds": dict(sourcing.seconds),
    }


def _since(since: Since) -> dict[str, Any]:
    changes = since.changes
    return {
        "run": since.uri,
        "pictures": {
            "new": changes.new, "gone": changes.gone, "in_both": changes.stayed, "moved": changes.moved,
        },
        "gone_because": dict(changes.gone_because),
        "moves": [asdict(move) for move in changes.moves],
        "categories": [asdict(category) for category in changes.categories],
        "categories_changed": changes.categories_changed,
        "then": asdict(since.then),
        "now": asdict(since.now),
        "addresses": dict(since.addresses),
    }  # fmt: skip


def _since_block(since: Mapping[str, Any]) -> Iterator[str]:
    then, now, pictures, addresses = (since[name] for name in ("then", "now", "pictures", "addresses"))
    yield f"Since {plain(since['run'], 80)}"
    yield f"{'':24}{'then':>12}{'now':>12}"
    for split in SPLITS:
        yield _then_and_now(f"accuracy, {split}", *(_percent(each["accuracy"][split]) for each in (then, now)))
    yield _then_and_now("retrieval precision", *(_percent(each["retrieval_precision"]) for each in (then, now)))
    yield _then_and_now("novel pictures kept", *(f"{each['kept']:,}" for each in (then, now)))
    yield (
        f"pictures: {pictures['new']:,} new, {pictures['gone']:,} gone, {pictures['in_both']:,} in both, "
        f"of which {pictures['moved']:,} at another rank"
    )
    yield (
        f"addresses: {addresses['reused']:,} not asked again, {addresses['asked_again']:,} asked again, "
        f"of which {addresses['revived']:,} came back to life"
    )


def _then_and_now(what: str, then: str, now: str) -> str:
    return f"{what:24}{then:>12}{now:>12}"


def _accuracy_block(summary: Mapping[str, Any]) -> Iterator[str]:
    first = summary["rounds"][0]["accuracy"]
    count = first["ensemble"]["templates"]
    headings = ("hand-written", f"best of {count}", f"ensemble of {count}", "learned")
    yield "Validation accuracy, top-1 (base among base, novel among novel)"
    yield f"{'':10}" + "".join(f"{heading:>20}" for heading in headings)
    yield f"{'':10}" + f"{'base':>12}{'novel':>8}" * len(headings)
    for entry in summary["rounds"]:
        accuracy = entry["accuracy"]
        pairs = (accuracy[kind] for kind in ("manual", "best_manual", "ensemble", "learned"))
        cells = (f"{_percent(pair['base']):>12}{_percent(pair['novel']):>8}" for pair in pairs)
        yield f"{'round ' + str(entry['round']):10}" + "".join(cells)
    yield f"hand-written: {_quoted(first['manual']['template'])}; best: {_quoted(first['best_manual']['template'])}"
    for sentence in summary.get("advice", []):  # older summaries have none
        yield from textwrap.wrap(sentence, 100)


def _sourcing_block(summary: Mapping[str, Any]) -> Iterator[str]:
    yield "Sourcing             precision   purity   kept of target   categories full   URLs refused"
    for name, entry in _passes(summary):
        got = entry["yield"]
        kept = f"{got['kept']:,}/{got['target']:,}"
        full = f"{got['categories_full']}/{got['categories']}"
        yield (
            f"{name:18}{_percent(entry['retrieval_precision']):>12}{_percent(entry['purity']):>9}"
            f"{kept:>17}{full:>18}{sum(entry['refusals'].values()):>15,}"
        )


def _passes(summary: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for entry in summary["rounds"]:
        yield f"round {entry['round']} (base)", entry
    yield f"novel, prompts of {summary['novel']['best_round']}", summary["novel"]


def _seconds_block(summary: Mapping[str, Any]) -> Iterator[str]:
    rows = [("once", summary["totals"]["seconds"]["once"])]
    rows += [(f"round {entry['round']}", entry["seconds"]) for entry in summary["rounds"]]
    rows.append(("novel", summary["novel"]["seconds"]))
    stages = [stage for stage in STAGES if any(stage in seconds for _, seconds in rows)]
    yield "Seconds  " + "".join(f"{stage:>{_width(stage)}}" for stage in stages) + f"{'all':>9}"
    for name, seconds in rows:
        cells = (f"{_seconds_text(seconds.get(stage)):>{_width(stage)}}" for stage in stages)
        yield f"{name:9}" + "".join(cells) + f"{_seconds_text(sum(seconds.values())):>9}"
    everything = _seconds_text(summary["totals"]["seconds"]["all"])
    yield f"{'in all':9}{everything:>{sum(map(_width, stages)) + 9}}"


def _width(stage: str) -> int:
    return max(7, len(stage)) + 1


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def _seconds_text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _quoted(template: str, length: int = 36) -> str:
    return f'"{template if len(template) <= length else template[: length - 1] + "…"}"'
