"""What the previous run found out about addresses, so that they need not be asked again.

    good: its picture is taken from there        refused: so it stays        failed: another day may differ, ask again

Functions on the record of a download (`rpl.download.record`) and its tars. Knows nothing of HTTP or of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rpl.download import Judge
from rpl.reasons import BY_WORD
from rpl.tars import read_tar
from rpl.waves import Verdict

COLUMNS = ["url", *Verdict._fields]
"""The columns of a record that are read here."""


@dataclass(frozen=True)
class Judged:
    """By address: the verdicts of the previous run, and those of them that stand without asking again."""

    verdicts: Mapping[str, Verdict]
    stands: Mapping[str, Verdict]

    def before(self, ask: Judge, on_reused: Callable[[int], object]) -> Judge:
        """A judge that knows what stands and asks `ask` for the rest; `on_reused` is told how many it knew."""

        def judge(urls: Sequence[str]) -> Mapping[str, Verdict]:
            known = {url: self.stands[url] for url in urls if url in self.stands}
            on_reused(len(known))
            rest = [url for url in urls if url not in known]
            return {**known, **(ask(rest) if rest else {})}

        return judge

    def facts(self, downloads: pa.Table) -> dict[str, int]:
        """Counts of different addresses in the record: verdicts taken over, judged ones that were asked again, and of
        these the ones that had failed and gave a picture now."""
        needed = downloads.filter(pc.not_equal(downloads["status"], "not_needed"))
        now = dict(zip(needed["url"].to_pylist(), needed["status"].to_pylist(), strict=True))
        asked = [url for url in now if url in self.verdicts and url not in self.stands]
        return {
            "reused": sum(url in self.stands for url in now),
            "asked_again": len(asked),
            "revived": sum(now[url] == "ok" and self.verdicts[url].status == "failed" for url in asked),
        }


def last_verdicts(records: Iterable[pa.Table], wanted: Collection[str]) -> dict[str, Verdict]:
    """The last verdict on each of the addresses `wanted`; an address that no record has, or needed, has none.

    Args:
        records: in the order in which they were made, with `COLUMNS`; one at a time is in memory.
    """
    among = pa.array(sorted(wanted), pa.string())
    found: dict[str, Verdict] = {}
    for record in records:
        is_judged = pc.and_(pc.not_equal(record["status"], "not_needed"), pc.is_in(record["url"], among))
        for row in record.select(COLUMNS).filter(is_judged).to_pylist():
            url = row.pop("url")
            found[url] = Verdict(**row)
    return found


def standing(verdicts: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """Those that another day does not change: good pictures, and what we refused for a reason that is still known."""

    def stands(verdict: Verdict) -> bool:
        reason = BY_WORD.get(verdict.reason or "")
        return verdict.status == "ok" or (reason is not None and reason.kind == "refused")

    return {url: verdict for url, verdict in verdicts.items() if stands(verdict)}


def take_pictures(tar: Path, keys: Collection[str], keep: Callable[[str, bytes], object]) -> set[str]:
    """Hand the stored JPEGs of `keys` to `keep`, one at a time in memory; which of them the tar had.

    Raises:
        BadInput: it is not a whole tar.
    """
    taken = set()
    for key, files in read_tar(tar):
        if key in keys and "jpg" in files:
            keep(key, files["jpg"])
            taken.add(key)
    return taken
