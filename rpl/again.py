"""Sourcing again: a new run made from a finished one, with its prompts as they are.

The new run copies what it would make alike (`rpl.adoption`), asks no address again that was judged (`rpl.judged`) and
tells what changed (`rpl.report.since`). Knows runs, and nothing of what starts them or when.
"""

from __future__ import annotations

import re
from pathlib import Path

from rpl.config import RunConfig, absolute
from rpl.errors import BadInput
from rpl.finished import REPORT_MANIFEST, Finished, age, finished
from rpl.local import create_run
from rpl.stage import Run
from rpl.store import open_store

PROMPTS = "start/prompts.safetensors"
"""Where a run keeps its own copy of the prompts that it starts from: the previous run may be deleted."""


def config_after(previous: Run, uri: str) -> RunConfig:
    """The settings of a run at `uri` that sources again from `previous`: one round, with its prompts as they are.

    They lie at `PROMPTS` in the new run, where `create_run_after` puts them.

    Raises:
        BadInput: the earlier run is not finished.
    """
    _require_finished(previous)
    settings = previous.config.model_dump()
    settings |= {
        "run": uri,
        "previous": previous.uri.rstrip("/"),
        # The reference's schedule takes its steps whatever max_iterations says.
        "learn": settings["learn"]
        | {"schedule": "fast", "start_from": f"{uri.rstrip('/')}/{PROMPTS}", "starts": 0, "max_iterations": 0},
        "rounds": settings["rounds"] | {"max_rounds": 1},
    }
    return absolute(RunConfig.model_validate(settings), str(Path.cwd()))


def create_run_after(previous: Run, uri: str) -> Run:
    """The run at `uri` that sources again from `previous`, made if it is not there.

    Raises:
        BadInput: the earlier run is not finished, or there is another run at `uri`.
    """
    run = create_run(config_after(previous, uri))
    if run.store.stat(PROMPTS) is None:
        exported = _require_finished(previous).inputs("export")[0]
        run.store.copy_from(previous.store, exported.files["prompts.safetensors"].path, PROMPTS)
    return run


def latest_finished(root: str, base: str) -> Run:
    """Of the runs ROOT/BASE and ROOT/BASE-…, the one whose report is newest. One listing, and one run is opened.

    Raises:
        BadInput: none of them is finished.
    """
    report = re.compile(rf"({re.escape(base)}(?:-[^/]+)?)/{REPORT_MANIFEST.pattern}")
    reports = [(age(info), found[1]) for info in open_store(root).list(base) if (found := report.fullmatch(info.path))]
    if not reports:
        raise BadInput(f"{root}: none of the runs {base} and {base}-… is finished; finish one with `rpl run` first.")
    return Run(f"{root.rstrip('/')}/{max(reports)[1]}")


def _require_finished(run: Run) -> Finished:
    found = finished(run)
    if found is None:
        raise BadInput(
            f"{run.uri}: is not finished, so nothing can be sourced again from it; go on with `rpl run` first."
        )
    return found
