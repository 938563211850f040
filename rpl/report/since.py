"""What changed since the previous run: two records of sourced pictures side by side. Pure functions on tables.

    now / then     kept                    not kept
    kept           in both (moved?)        new
    not kept       gone (why?)             –

A picture is an address in a category: the same address may be kept for one category and refused for another. Ranks
count from 0 among the category's candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from rpl.report.model import CategoryChange, Changes, Move

COLUMNS = ["category_name", "url", "rank", "status", "reason"]
"""The columns of a record (`rpl.curation.record`) that are compared."""

NOT_A_CANDIDATE = "not_a_candidate"
"""Why a picture is gone that the new record does not know at all."""

MOVES_SHOWN = 10
CATEGORIES_SHOWN = 15

_Place = tuple[str, str]
"""A category's name and an address."""


def compare(then: pa.Table, now: pa.Table) -> Changes:
    """What the record `now` keeps, beside what `then` kept. Both with `COLUMNS`, of the same split."""
    rows_now = _first(now.select(COLUMNS).to_pylist())
    kept_then = _kept(_first(then.select(COLUMNS).to_pylist()))
    kept_now = _kept(rows_now)
    new, gone, stayed = (
        kept_now.keys() - kept_then.keys(),
        kept_then.keys() - kept_now.keys(),
        kept_then.keys() & kept_now,
    )
    moves = [Move(*place, kept_then[place], kept_now[place]) for place in stayed if kept_then[place] != kept_now[place]]
    moves.sort(key=lambda move: (-abs(move.now - move.then), move.category, move.url))
    why = Counter(_why_gone(rows_now.get(place)) for place in gone)
    categories = _by_category(new, gone, stayed, moves)
    return Changes(
        new=len(new),
        gone=len(gone),
        stayed=len(stayed),
        moved=len(moves),
        gone_because=dict(sorted(why.items(), key=lambda item: (-item[1], item[0]))),
        moves=tuple(moves[:MOVES_SHOWN]),
        categories=tuple(categories[:CATEGORIES_SHOWN]),
        categories_changed=len(categories),
    )


def addresses(facts: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Sums of what stage `download` counted of the previous run's verdicts, over its manifests' facts."""
    total: Counter[str] = Counter({"reused": 0, "asked_again": 0, "revived": 0})
    for each in facts:
        for name in total:
            total[name] += each.get(name, 0)
    return dict(total)


def _first(rows: Sequence[dict[str, Any]]) -> dict[_Place, dict[str, Any]]:
    """Rows by place. Where a pool holds an address twice, the row that is kept counts, or else the first."""
    found: dict[_Place, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["status"] != "kept", row["rank"])):
        found.setdefault((row["category_name"], row["url"]), row)
    return found


def _kept(rows: Mapping[_Place, Mapping[str, Any]]) -> dict[_Place, int]:
    """Ranks of the kept pictures by place."""
    return {place: row["rank"] for place, row in rows.items() if row["status"] == "kept"}


def _why_gone(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return NOT_A_CANDIDATE
    return str(row["reason"] or row["status"])


def _by_category(
    new: Iterable[_Place], gone: Iterable[_Place], stayed: Iterable[_Place], moves: Iterable[Move]
) -> list[CategoryChange]:
    """The categories in which anything changed, most change first."""
    counts = [Counter(name for name, _ in places) for places in (new, gone, stayed)]
    counts.append(Counter(move.category for move in moves))
    changed = {name for count in (counts[0], counts[1], counts[3]) for name in count}
    found = [CategoryChange(name, *(count[name] for count in counts)) for name in changed]
    return sorted(found, key=lambda each: (-(each.new + each.gone), -each.moved, each.name))
