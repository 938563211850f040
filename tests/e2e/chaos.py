"""What happens to a run on a cluster: pods deleted, the store gone, the controller restarted, a node drained."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from rpl.demo.cluster import SERVICES, Cluster
from rpl.errors import TryAgain

MUST = {"learn", "encode", "download"}
DELETIONS = 12
PER_STEP = 3
"""Deletions of one step at most, so that ten tries suffice for all that happens."""


class Chaos(threading.Thread):
    """Disturbs one workflow until it ends; what it did is counted."""

    def __init__(self, cluster: Cluster, workflow: str) -> None:
        super().__init__(daemon=True)
        self.deleted: Counter[str] = Counter()
        """Pods by stage."""
        self.done: list[str] = []
        self.error: BaseException | None = None
        self._cluster, self._workflow = cluster, workflow
        self._dice = random.Random(0)
        self._steps: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._over = threading.Event()
        self._actions: list[threading.Thread] = []

    def stop(self) -> None:
        self._over.set()
        for thread in (self, *self._actions):
            thread.join()
        if self.error is not None:
            raise self.error

    def run(self) -> None:
        self._guarded(self._disturb)

    def _disturb(self) -> None:
        while not self._over.wait(0.5):
            self._delete_some()
            self._once("embed", "s3", self._stop_and_start_s3)
            self._once("retrieve", "controller", self._restart_controller)
            self._once("curate", "drain", self._drain)

    def _pods(self) -> list[dict[str, Any]]:
        found = self._cluster.kubectl(
            "-n",
            "rpl",
            "get",
            "pods",
            "-l",
            f"workflows.argoproj.io/workflow={self._workflow}",
            "-o",
            "json",
            quiet=True,
        )
        pods: list[dict[str, Any]] = json.loads(found)["items"]
        return pods

    def _delete_some(self) -> None:
        for pod in self._pods():
            name, stage = pod["metadata"]["name"], pod["metadata"]["labels"]["app.kubernetes.io/component"]
            self._seen.add(stage)
            if pod["status"]["phase"] != "Running" or "deletionTimestamp" in pod["metadata"]:
                continue
            step = pod["metadata"]["annotations"]["workflows.argoproj.io/node-name"].rpartition("(")[0]
            is_wanted = stage in MUST and not self.deleted[stage]
            if self._steps[step] >= PER_STEP or stage == "finish":
                continue
            if not is_wanted and (sum(self.deleted.values()) >= DELETIONS or self._dice.random() < 0.7):
                continue
            # Half of them with no time to leave: a node that vanishes gives none either.
            grace = self._dice.choice(["--grace-period=0", "--grace-period=10"])
            force = ["--force"] if grace.endswith("=0") else []
            try:
                self._cluster.kubectl("-n", "rpl", "delete", "pod", name, "--wait=false", grace, *force, quiet=True)
            except TryAgain:
                continue  # it ended meanwhile
            self.deleted[stage] += 1
            self._steps[step] += 1

    def _once(self, after: str, what: str, action: Callable[[], None]) -> None:
        """In a thread of its own, so that pods are deleted meanwhile."""
        if after in self._seen and what not in self.done:
            self.done.append(what)
            thread = threading.Thread(target=self._guarded, args=(action,), daemon=True)
            thread.start()
            self._actions.append(thread)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            self.error = error

    def _stop_and_start_s3(self) -> None:
        self._cluster.kubectl("-n", SERVICES, "scale", "deploy/s3", "--replicas=0", quiet=True)
        while self._cluster.kubectl("-n", SERVICES, "get", "pods", "-l", "app.kubernetes.io/name=s3", "-o", "name"):
            time.sleep(0.5)
        time.sleep(5)
        self._cluster.kubectl("-n", SERVICES, "scale", "deploy/s3", "--replicas=1", quiet=True)
        self._cluster.kubectl("-n", SERVICES, "rollout", "status", "deploy/s3", "--timeout=120s", quiet=True)

    def _restart_controller(self) -> None:
        self._cluster.kubectl(
            "-n", "argo", "delete", "pod", "-l", "app=workflow-controller", "--wait=false", quiet=True
        )

    def _drain(self) -> None:
        node = self._cluster.gpu_node
        self._cluster.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force",
                              "--timeout=60s", quiet=True)  # fmt: skip
        time.sleep(5)
        self._cluster.kubectl("uncordon", node, quiet=True)
        self._cluster.advertise_gpu()
