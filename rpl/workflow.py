"""A run as a workflow engine drives it: begun from a configuration, asked whether a round follows, closed at the end.

Knows runs and their graph, and nothing of any engine: it is told names and texts, and answers with values.
"""

from __future__ import annotations

import itertools
import json
import re
from datetime import datetime, timezone
from typing import Any

from rpl.again import PROMPTS, create_run_after, latest_finished
from rpl.config import RunConfig, absolute, parse_config
from rpl.errors import BadInput, RplError
from rpl.local import NodeStatus, create_run, status
from rpl.manifests import base_accuracy
from rpl.outside import outside_files
from rpl.rounds import Node, goes_on
from rpl.stage import Run, run_exists
from rpl.store import exists_uri, read_uri

OUTCOME = "outcome.json"
PUBLISHED = ("index.html", "summary.json")
"""The report's files that are copied to the top of the run, where a person looks for them."""

_FIRST_STAGES = ("crop", "encode", "index")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MOST_FAILURES = 50


def begin(uri: str, config_uri: str, *, max_rounds: int | None = None, shards: int | None = None) -> Run:
    """The run at `uri`, made from the configuration at `config_uri`, or found if it was made from the same one.

    Args:
        max_rounds, shards: instead of the configuration's; `shards` counts for crops and for downloads.

    Raises:
        BadInput: the name, the configuration or a file that it names is wrong; nothing was written.
    """
    _check_name(uri)
    config = _load(config_uri, uri)
    changes: dict[str, Any] = {}
    if max_rounds is not None:
        changes["rounds"] = config.rounds.model_copy(update={"max_rounds": max_rounds})
    if shards is not None:
        changes["shards"] = config.shards.model_copy(update={"crop": shards, "download": shards})
    config = RunConfig.model_validate(config.model_copy(update=changes).model_dump())
    _check_places(config, config_uri)
    return create_run(config)


def begin_after(uri: str, base: str) -> Run:
    """The run at `uri` that sources again from the newest finished one of `base` and `base`-…, beside it.

    A run that exists at `uri` goes on, whatever has finished meanwhile.

    Raises:
        BadInput: the name is wrong, or none of those runs is finished.
    """
    _check_name(uri)
    if run_exists(uri):
        run = Run(uri)
        if run.config.previous is not None and run.store.stat(PROMPTS) is None:  # killed between making it and these
            run = create_run_after(Run(run.config.previous), uri)
        return run
    root = uri.rstrip("/").rpartition("/")[0]
    return create_run_after(latest_finished(root, base), uri)


def another_round(run: Run, number: int) -> bool:
    """Whether a round follows round `number`. Raises BadInput where a round up to it is not finished."""
    accuracies = [base_accuracy(embedded) for embedded in itertools.islice(run.embedded_rounds(), number)]
    if len(accuracies) < number:
        raise BadInput(f"{run.uri}: round {len(accuracies) + 1} is not finished; run its stages first.")
    return goes_on(accuracies, run.config.rounds.max_rounds, run.config.rounds.min_gain)


def outcome_of(run: Run, workflow: str) -> str:
    """How the run stands when a workflow over it has ended with the word `workflow`, such as "Failed".

    A run that is finished has succeeded, even if one more workflow over it was stopped before it could find that out.
    """
    try:
        return "Succeeded" if run.manifests(Node("report")) else workflow
    except RplError:  # what broke the run, a missing file say, breaks its digests too
        return workflow


def close(run: Run, outcome: str, workflow: str, failures: list[dict[str, str]]) -> dict[str, Any]:
    """Publish how the run ended: `outcome.json`, and copies of the report where there is one; what was published.

    Args:
        outcome: how the run stands, as `outcome_of` says.
        workflow: the engine's word, such as "Succeeded".
        failures: steps that failed, each with at least "step" and "message".
    """
    reported = run.manifests(Node("report"))
    published = {
        "run": run.uri,
        "outcome": outcome,
        "workflow": workflow,
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "report": "index.html" if reported else None,
        "stages": [_stage(row) for row in status(run)],
        "failures": failures[:_MOST_FAILURES],
    }  # fmt: skip
    if reported:
        for name in PUBLISHED:
            run.store.write(name, run.local(reported[0].files[name]).read_bytes())
    run.store.write(OUTCOME, json.dumps(published, indent=1, ensure_ascii=False).encode())
    return published


def _stage(row: NodeStatus) -> dict[str, Any]:
    return {
        "stage": row.node.path,
        "done": row.done,
        "shards": row.shards,
        "seconds": round(row.wall_s, 1),
        "rows": row.rows,
    }


def _check_name(uri: str) -> None:
    name = uri.rstrip("/").rpartition("/")[2]
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"run {name!r}: a run's name holds letters, digits, '-', '_' and '.' (100 at most); choose another."
        )


def _load(config_uri: str, run: str) -> RunConfig:
    try:
        text = read_uri(config_uri).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{config_uri}: is not UTF-8 text; give a configuration as `rpl init` writes it.") from error
    return absolute(parse_config(text, config_uri, run=run), config_uri.rpartition("/")[0])


def _check_places(config: RunConfig, config_uri: str) -> None:
    """All files from outside are there: told now, not an hour later by the stage that reads them."""
    folders = [config.data.train.images, *([config.data.val.images] if config.data.val else [])]
    files = [uri for stage in _FIRST_STAGES for uri in outside_files(Node(stage), config)]
    for uri in dict.fromkeys([*files, *folders]):
        if not exists_uri(uri):
            raise BadInput(f"{uri}: does not exist; correct the place in {config_uri}.")
