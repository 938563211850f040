"""A finished run as its newest report found it, whatever became of the files outside since.

`Run.manifest` asks whether work is what today's inputs would make; whoever looks back asks what was made. A pool that
has grown since makes an earlier run no less finished.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rpl.errors import BadInput
from rpl.manifests import Manifest
from rpl.rounds import STAGES, Edge
from rpl.stage import Run, run_exists
from rpl.store import ObjectInfo

REPORT_MANIFEST = re.compile(r"report/\d+-of-\d+\.[0-9a-f]{16}\.json")
_EDGES = {edge.name: edge for edge in STAGES["report"].once or ()}


@dataclass(frozen=True)
class Finished:
    """A run with its newest report's manifest."""

    run: Run
    report: Manifest

    def inputs(self, edge: str) -> list[Manifest]:
        """What the report read under `edge`, in its order.

        Raises:
            BadInput: a manifest is not there any more.
        """
        pattern, prefix = _places(_EDGES[edge])
        store = self.run.store
        found: dict[str, Manifest] = {}
        for info in store.list(prefix):
            if pattern.fullmatch(info.path):
                manifest = Manifest.from_json(store.read(info.path), f"{self.run.uri}/{info.path}")
                found[manifest.contents] = manifest
        wanted = self.report.inputs[edge]
        if not found.keys() >= set(wanted):
            raise BadInput(f"{self.run.uri}: its {_EDGES[edge].stage} is not whole any more; run it again.")
        return [found[contents] for contents in wanted]

    def local(self, manifest: Manifest, name: str) -> Path:
        """A local, verified copy of a file, there until `close`."""
        return self.run.local(manifest.files[name])

    def close(self) -> None:
        """Remove local copies."""
        self.run.close()


def finished(run: Run) -> Finished | None:
    """`run` as its newest report found it; None while there is none."""
    reports = [info for info in run.store.list("report/") if REPORT_MANIFEST.fullmatch(info.path)]
    if not reports:
        return None
    path = max(reports, key=age).path
    return Finished(run, Manifest.from_json(run.store.read(path), f"{run.uri}/{path}"))


def age(info: ObjectInfo) -> tuple[float, str]:
    """By this the newest object is the largest."""
    return info.modified, info.path


def previous_run(uri: str) -> Finished:
    """The run that a configuration names under `previous`.

    Raises:
        BadInput: it is not there any more, or not finished.
    """
    is_there = run_exists(uri)
    found = finished(Run(uri)) if is_there else None
    if found is None:
        problem = "is not finished; finish it" if is_there else "is not there any more; bring it back"
        raise BadInput(f"{uri}: the run under `previous` {problem}, or start a new run from another one.")
    return found


def _places(edge: Edge) -> tuple[re.Pattern[str], str]:
    """The form of the paths of the edge's manifests, and the text with which they all begin."""
    folder, prefix = {
        "once": (edge.stage, f"{edge.stage}/"),
        "rounds": (rf"round-\d+/{edge.stage}", "round-"),
        "novel": (f"novel/{edge.stage}", f"novel/{edge.stage}/"),
    }[edge.at]
    return re.compile(rf"{folder}/\d+-of-\d+\.[0-9a-f]{{16}}\.json"), prefix
