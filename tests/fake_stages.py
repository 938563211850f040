"""Stand-ins for stage functions: they write a few bytes, count their calls and can be told to fail.

They suffice where the contract is tested, since `rpl.stage` treats every stage alike; real stages are killed and
resumed in test_kill.py.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from rpl.config import RunConfig
from rpl.local import create_run
from rpl.manifests import Shard
from rpl.progress import Reporter
from rpl.rounds import STAGES, Node
from rpl.stage import Context, Run, run_shard

QUIET = Reporter(live=False, every_s=1e9)


class FakeStages:
    """Installs a stand-in for every stage; `calls` lists node paths with shards in the order they ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.accuracies = [0.5, 0.6, 0.6]
        self.before_return: Callable[[Context], None] = lambda _context: None
        for stage in STAGES:
            module = types.ModuleType(f"rpl.stages.{stage}")
            module.run = self._run  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, f"rpl.stages.{stage}", module)

    def _run(self, context: Context) -> None:
        node = context.node
        self.calls.append(f"{node.path} {context.shard}")
        seen = {name: [manifest.contents for manifest in found] for name, found in context.inputs.items()}
        context.write_json("seen.json", {"node": node.path, "inputs": seen})
        path = context.scratch / "data.bin"
        path.write_bytes(f"{node.path} {context.shard} {context.config.seed}".encode())
        context.add(path)
        context.rows = 1
        if node.stage == "embed":
            number = 0 if node.round == "novel" else int(node.round or 0) - 1
            accuracy = self.accuracies[number]
            context.facts["accuracy"] = {"learned": {"base": accuracy, "novel": accuracy}}
        self.before_return(context)


def make_config(folder: Path, run: str, **changes: object) -> RunConfig:
    """A configuration whose outside files exist in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.json", "pool.npy"):
        if not (folder / name).exists():
            (folder / name).write_text(name)
    settings: dict[str, object] = {
        "run": run,
        "data": {"train": {"annotations": str(folder / "train.json"), "images": str(folder)}},
        "pool": {"vectors": str(folder / "pool.npy")},
        "clip": {"model": "ViT-B-32", "pretrained": None},
    }
    return RunConfig.model_validate(settings | changes)


def make_run(folder: Path, run: str, **changes: object) -> Run:
    return create_run(make_config(folder, run, **changes))


def do(run: Run, stage: str, round_: int | None = None, shard: Shard | None = None) -> str:
    return run_shard(run, Node(stage, round_), shard or Shard(), QUIET)
