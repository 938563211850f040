"""A run on this machine: makes it, walks the graph of `rpl.rounds` stage by stage, tells what is done.

Argo walks the same graph in pods; this module and the workflow know the same stages in the same order and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rpl.config import RunConfig, dump_config, parse_config
from rpl.errors import BadInput
from rpl.manifests import base_accuracy
from rpl.progress import Reporter
from rpl.rounds import AFTER_ROUNDS, BEFORE_ROUNDS, NOVEL, Node, goes_on, round_nodes
from rpl.stage import CONFIG, Run, run_shard
from rpl.store import open_store


def create_run(config: RunConfig) -> Run:
    """The run that `config` names, made if it is not there. Its settings are frozen; only `runtime` may change.

    Raises:
        BadInput: the run exists with other settings; the sentence names the first that differs.
    """
    store = open_store(config.run)
    text = dump_config(config).encode()
    if not store.put_if_absent(CONFIG, text):
        there = parse_config(store.read(CONFIG).decode(), f"{config.run}/{CONFIG}")
        different = _first_difference(_frozen(there), _frozen(config))
        if different is not None:
            key, old, new = different
            raise BadInput(
                f"{config.run}: this run was started with {key} = {old!r}, not {new!r}; "
                "choose another name under `run`, or put the setting back."
            )
        if there.runtime != config.runtime:
            store.write(CONFIG, text)
    return Run(config.run)


def walk(run: Run) -> Iterator[Node]:
    """The run's nodes in order. Asks after each round whether another follows, so consume it while running them."""
    yield from (Node(stage) for stage in BEFORE_ROUNDS)
    accuracies: list[float | None] = []
    rounds = run.config.rounds
    while goes_on(accuracies, rounds.max_rounds, rounds.min_gain):
        number = len(accuracies) + 1
        yield from round_nodes(number)
        embedded = run.manifests(Node("embed", number))
        if embedded is None:
            return
        accuracies.append(base_accuracy(embedded[0]))
    yield from (Node(stage, "novel") for stage in NOVEL)
    yield from (Node(stage) for stage in AFTER_ROUNDS)


def run_all(run: Run, reporter: Reporter) -> None:
    """Run every stage that is not done, in this process."""
    for node in walk(run):
        for shard in run.shards(node):
            outcome = run_shard(run, node, shard, reporter)
            manifest = run.manifest(node, shard)
            assert manifest is not None  # run_shard returns only when one is committed
            part = f" {shard}" if shard.count > 1 else ""
            seconds = f"{manifest.wall_s:6.1f} s" if outcome == "done" else outcome
            reporter.say(f"{node.path + part:<24} {manifest.rows:>7} rows  {seconds}")


@dataclass(frozen=True)
class NodeStatus:
    """How far a node is: `done` of `shards` committed, with the sum of their seconds and rows."""

    node: Node
    done: int
    shards: int
    wall_s: float
    rows: int


def status(run: Run) -> list[NodeStatus]:
    """Every node up to the first round that is not finished, and the nodes after the rounds."""
    found = []
    for node in walk(run):
        manifests = [m for shard in run.shards(node) if (m := run.manifest(node, shard)) is not None]
        found.append(
            NodeStatus(
                node=node,
                done=len(manifests),
                shards=run.shard_count(node),
                wall_s=sum(m.wall_s for m in manifests),
                rows=sum(m.rows for m in manifests),
            )
        )
    return found


def _frozen(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"runtime"})


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            found = _first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found is not None:
                return found
        return None
    return None if old == new else (key, old, new)
