"""The sourcing walk: which candidates to fetch, and what is recorded of each.

    for each category: down the ranks until `target` good pictures, or the list ends

All categories share the same waves, so that connections stay busy, and an address is asked once whatever number of
categories want it. What is recorded depends on ranks and verdicts alone: a candidate after the one that met the target
is "not_needed", even if a wave had fetched it. Knows nothing of HTTP or pixels: a judge gives verdicts (`rpl.waves`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rpl.tars import Sample
from rpl.waves import Verdict

Judge = Callable[[Sequence[str]], Mapping[str, Verdict]]
"""Verdicts for some addresses, each given once."""

_LEAST_YIELD = 0.1
"""Expecting fewer good pictures than this among the next candidates would make waves too large."""

_RECORD = pa.schema(
    [
        ("status", pa.string()),
        ("reason", pa.string()),
        ("key", pa.string()),
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mime", pa.string()),
        ("fetched_at", pa.string()),
    ]
)


@dataclass(frozen=True)
class Walk:
    """Verdicts by address, and how far each category had to go: candidates from that rank on were not needed."""

    verdicts: Mapping[str, Verdict]
    needed: Mapping[int, int]


def walk(candidates: Mapping[int, Sequence[str]], target: int, judge: Judge) -> Walk:
    """Ask for verdicts, wave by wave, until each category has `target` good pictures or no candidates left.

    The first wave takes what would do if all were good, a later one what the category's yield so far suggests.

    Args:
        candidates: category → its addresses by rank.
    """
    verdicts: dict[str, Verdict] = {}
    while True:
        needed: dict[int, int] = {}
        wanted: list[str] = []
        for category, urls in candidates.items():
            needed[category], good = _progress(urls, target, verdicts)
            wanted += urls[needed[category] :][: _portion(needed[category], good, target)]
        wave = [url for url in dict.fromkeys(wanted) if url not in verdicts]
        if not wave:
            return Walk(verdicts, needed)
        verdicts.update(judge(wave))


def by_category(candidates: pa.Table) -> dict[int, list[str]]:
    """Category → addresses by rank, of a table in order of category and rank."""
    found: dict[int, list[str]] = {}
    columns = (candidates[name].to_pylist() for name in ("category", "url"))
    for category, url in zip(*columns, strict=True):
        found.setdefault(category, []).append(url)
    return found


def shard_of(candidates: pa.Table, index: int, count: int) -> pa.Table:
    """The rows of the categories that shard `index` of `count` downloads."""
    return candidates.filter(pa.array(candidates["category"].to_numpy() % count == index))


def record(candidates: pa.Table, walked: Walk) -> pa.Table:
    """`candidates` with the columns of the record beside them, in the same order.

    Args:
        candidates: columns category, url and others, in order of category and rank.
    """
    step: Counter[int] = Counter()
    rows: list[dict[str, Any]] = []
    columns = (candidates[name].to_pylist() for name in ("category", "url"))
    for category, url in zip(*columns, strict=True):
        is_needed = step[category] < walked.needed[category]
        step[category] += 1
        rows.append(walked.verdicts[url]._asdict() if is_needed else {"status": "not_needed"})
    beside = pa.Table.from_pylist(rows, schema=_RECORD)
    for name in _RECORD.names:
        candidates = candidates.append_column(_RECORD.field(name), beside[name])
    return candidates


def samples(downloads: pa.Table, read: Callable[[str], bytes]) -> Iterator[Sample]:
    """Each good picture once, by key, with the first of the addresses that gave it.

    Args:
        downloads: what `record` made.
        read: the stored JPEG of a key.
    """
    first: dict[str, dict[str, Any]] = {}
    wanted = ("key", "url", "caption", "sha256", "width", "height")
    for row in downloads.filter(pc.equal(downloads["status"], "ok")).select(wanted).to_pylist():
        first.setdefault(row.pop("key"), row)
    for key in sorted(first):
        yield key, {"jpg": read(key), "json": json.dumps(first[key], ensure_ascii=False).encode()}


def facts(downloads: pa.Table) -> dict[str, Any]:
    """Counts of different addresses: asked, good, and by the reason for which others are not used."""
    asked = downloads.filter(pc.not_equal(downloads["status"], "not_needed"))
    outcome = dict(zip(asked["url"].to_pylist(), asked["reason"].to_pylist(), strict=True))
    reasons = Counter(reason for reason in outcome.values() if reason is not None)
    return {
        "urls": len(outcome),
        "ok": sum(reason is None for reason in outcome.values()),
        "by_reason": dict(sorted(reasons.items())),
    }


def _progress(urls: Sequence[str], target: int, verdicts: Mapping[str, Verdict]) -> tuple[int, int]:
    """How many of `urls`, in order, have a verdict or are past the target, and the good pictures among them.

    Bytes that an earlier rank of the category gave already are no second good picture: curation would drop them.
    """
    seen: set[str | None] = set()
    for rank, url in enumerate(urls):
        if len(seen) == target or url not in verdicts:
            return rank, len(seen)
        if verdicts[url].status == "ok":
            seen.add(verdicts[url].sha256)
    return len(urls), len(seen)


def _portion(tried: int, good: int, target: int) -> int:
    expected = max((good + 1) / (tried + 1), _LEAST_YIELD)
    return math.ceil((target - good) / expected)
