"""What a run tells its Pushgateway, and when: a shard's start, progress and end, a run's end. No gateway: nothing.

    job="rpl" / run / round / stage / shard    a shard; replaced whole by each push, so by the next attempt too
    job="rpl" / run                            a run's outcome

The values are made in `rpl.metrics.values`; here is only who is told when.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rpl.manifests import Shard
from rpl.memory import peak_device_memory_bytes, peak_memory_bytes
from rpl.metrics import declared as m
from rpl.metrics.declared import Sample
from rpl.metrics.gateway import Gateway, gateway
from rpl.metrics.values import RunOutcome, ended, exit_kind, known, run_metrics, stage_metrics
from rpl.progress import OnProgress
from rpl.rounds import Node
from rpl.stage import Run

ATTEMPT = "RPL_ATTEMPT"
EVERY_S = 15.0  # between pushes of progress


@contextmanager
def observed(run: Run, node: Node, shard: Shard) -> Iterator[OnProgress | None]:
    """Report the shard that is done inside; yields what progress is to be told, None without a gateway.

    Neither raises by itself nor swallows what is raised inside.
    """
    found = gateway()
    if found is None:
        yield None
        return
    report = _ShardReport(found, run, node, shard)
    report.started()
    try:
        yield report.progressed
    except BaseException as error:
        report.failed(error)
        raise
    report.done()


def push_run(run_uri: str, outcome: RunOutcome) -> bool:
    """Push how a run ended, under the run alone; whether it arrived. To be called after `delete_groups`."""
    found = gateway()
    return found is not None and found.push({"run": run_name(run_uri)}, run_metrics(outcome))


def delete_groups(run_uri: str) -> int:
    """Delete all that the gateway holds of a run, its outcome included; the number of groups.

    The gateway keeps what was pushed for ever: a run that is over would go on being scraped.
    """
    found = gateway()
    if found is None:
        return 0
    name = run_name(run_uri)
    return found.delete([group for group in found.groups() if group.labels.get("run") == name])


def delete_stale_groups(older_than_s: float) -> int:
    """Delete all groups of every run that has pushed nothing for so long; the number of groups.

    These are outcomes that everybody has seen, and shards of runs that vanished before their last step.
    """
    found = gateway()
    if found is None:
        return 0
    groups = found.groups()
    newest: dict[str, float] = {}
    for group in groups:
        name = group.labels.get("run", "")
        newest[name] = max(newest.get(name, 0.0), group.pushed)
    limit = time.time() - older_than_s
    return found.delete([group for group in groups if newest[group.labels.get("run", "")] < limit])


def run_name(run_uri: str) -> str:
    """The last part of a run's URI, or of its folder's path."""
    if "://" in run_uri and not run_uri.startswith("file://"):
        return run_uri.rstrip("/").rsplit("/", 1)[-1]
    return Path(run_uri.removeprefix("file://")).resolve().name


def shard_group(run_uri: str, node: Node, shard: Shard) -> dict[str, str]:
    """The grouping labels of a shard."""
    round_ = "once" if node.round is None else str(node.round)
    return {"run": run_name(run_uri), "round": round_, "stage": node.stage, "shard": str(shard)}


class _ShardReport:
    """One attempt at one shard, as the gateway is told of it."""

    def __init__(self, found: Gateway, run: Run, node: Node, shard: Shard) -> None:
        self._gateway = found
        self._run, self._node, self._shard = run, node, shard
        self._sender = _Sender(found, shard_group(run.uri, node, shard))
        self._began = self._offered = time.monotonic()
        attempt = os.environ.get(ATTEMPT, "")
        self._start = [m.START(time.time()), m.RETRIES(int(attempt) if attempt.isdecimal() else 0)]

    def started(self) -> None:
        self._sender.offer([*self._start, m.LAST_PROGRESS(time.time())])

    def progressed(self, done: int, total: int | None, values: Mapping[str, float]) -> None:
        if time.monotonic() - self._offered < EVERY_S:
            return
        self._offered = time.monotonic()
        self._sender.offer(
            [
                *self._start, m.LAST_PROGRESS(time.time()), m.ITEMS_DONE(done), *known(m.ITEMS_EXPECTED, total),
                *known(m.LOSS, values.get("loss")), *self._memory(),
            ]
        )  # fmt: skip

    def done(self) -> None:
        try:
            work = self._run.expected(self._node, self._shard)
            manifest = self._run.manifest(self._node, self._shard)
            assert manifest is not None  # it has just been committed, by us or another
            inputs = [each for found in work.inputs.values() for each in found]
            found = [*stage_metrics(manifest, inputs), *known(m.DEVICE_MEMORY, peak_device_memory_bytes())]
        except Exception as error:  # the shard is committed, whatever is wrong with its metrics
            self._gateway.warn("made", error)
            found = []
        self._end(None, found)

    def failed(self, error: BaseException) -> None:
        self._end(error, [m.DURATION(time.monotonic() - self._began), *self._memory()])

    def _end(self, error: BaseException | None, samples: list[Sample]) -> None:
        now = time.time()
        self._sender.finish([*self._start, m.LAST_PROGRESS(now), *ended(exit_kind(error), now), *samples])

    def _memory(self) -> list[Sample]:
        return [m.MEMORY(peak_memory_bytes()), *known(m.DEVICE_MEMORY, peak_device_memory_bytes())]


class _Sender:
    """Pushes a group from a thread of its own, so that no stage waits; of what waits there, the newest alone."""

    def __init__(self, found: Gateway, group: Mapping[str, str]) -> None:
        self._gateway, self._group = found, group
        self._changed = threading.Condition()
        self._next: list[Sample] | None = None
        self._is_over = False
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def offer(self, samples: list[Sample]) -> None:
        with self._changed:
            self._next = samples
            self._changed.notify()

    def finish(self, samples: list[Sample]) -> None:
        """Push the last samples, and wait for that."""
        with self._changed:
            self._next, self._is_over = samples, True
            self._changed.notify()
        self._gateway.wait_for(self._thread)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._is_over)
                samples, self._next = self._next, None
            if samples is None:
                return
            self._gateway.push(self._group, samples)
