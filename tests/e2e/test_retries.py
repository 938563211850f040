"""Every way in which a pod can end, on a cluster: which are tried again, and which are not."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest

from rpl.demo.cluster import ENDED, NAMESPACE, Cluster
from tests.argo_graph import templates

pytestmark = pytest.mark.timeout(600)

CODE = """
import os, signal, sys, time
case, attempt = sys.argv[1], int(os.environ["RPL_ATTEMPT"])
if attempt and case not in ("bad input", "bug"):
    sys.exit(0)
if case == "memory":
    bytearray(10**9)
if case == "evicted":
    with open("/tmp/large", "wb") as file:
        for _ in range(200):
            file.write(bytes(10**6))
if case == "killed":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGKILL)
if case in ("evicted", "deleted", "lost"):
    time.sleep(180)
sys.exit({"try again": 75, "bad input": 2, "bug": 1}[case])
"""

TRIES = {"try again": 2, "killed": 2, "evicted": 2, "deleted": 2, "lost": 2, "bad input": 1, "bug": 1, "memory": 1}
"""Case → tries that follow from the retry strategy; those with two end well at the second."""


def test_what_is_tried_again_and_what_is_not(cluster: Cluster) -> None:
    workflow = json.loads(
        cluster.kubectl("create", "-n", NAMESPACE, "-o", "json", "-f", "-", stdin=json.dumps(_workflow()), quiet=True)
    )["metadata"]["name"]
    _delete(cluster, workflow, "deleted", "--grace-period=5")
    _delete(cluster, workflow, "lost", "--grace-period=0", "--force")
    give_up = time.monotonic() + 400
    while True:
        status = json.loads(cluster.argo("get", workflow, "-o", "json"))["status"]
        if status["phase"] in ENDED or time.monotonic() > give_up:
            break
        time.sleep(3)
    pods = [node for node in status["nodes"].values() if node["type"] == "Pod"]
    said = {(node["displayName"], node["phase"], node.get("message", "")) for node in pods}
    tries = {case: sum(_case(node) == case for node in pods) for case in TRIES}
    assert tries == TRIES, said
    for case, expected in TRIES.items():
        last = max((node for node in pods if _case(node) == case), key=lambda node: node["startedAt"])
        assert (last["phase"] == "Succeeded") == (expected == 2), said


def _workflow() -> dict[str, Any]:
    """A pod for each case, alike a stage's in everything but what it runs and how long it waits between tries."""
    pod = copy.deepcopy(templates()["rpl-decide"]["spec"]["templates"][0])
    del pod["outputs"]
    pod["inputs"] = {"parameters": [{"name": "case"}]}
    pod["retryStrategy"]["limit"] = "2"
    pod["retryStrategy"]["backoff"] = {"duration": "2s"}
    pod["container"]["args"] = ["-c", CODE, "{{inputs.parameters.case}}"]
    pod["container"]["resources"] = {
        "requests": {"cpu": "50m", "memory": "64Mi"},
        "limits": {"cpu": "1", "memory": "128Mi", "ephemeral-storage": "60Mi"},
    }
    tasks = [
        {"name": case.replace(" ", "-"), "template": "decide",
         "arguments": {"parameters": [{"name": "case", "value": case}]}}
        for case in TRIES
    ]  # fmt: skip
    return {
        "apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow",
        "metadata": {"generateName": "retries-", "namespace": NAMESPACE},
        "spec": {
            "entrypoint": "all",
            "arguments": {"parameters": [
                {"name": "image-light", "valueFrom": {"configMapKeyRef": {"name": "rpl", "key": "image-light"}}}]},
            "templates": [{"name": "all", "dag": {"failFast": False, "tasks": tasks}}, pod],
        },
    }  # fmt: skip


def _case(node: dict[str, Any]) -> str:
    return str(node["inputs"]["parameters"][0]["value"])


def _delete(cluster: Cluster, workflow: str, task: str, *options: str) -> None:
    selector = f"workflows.argoproj.io/workflow={workflow}"
    for _ in range(120):
        found = json.loads(cluster.kubectl("-n", NAMESPACE, "get", "pods", "-l", selector, "-o", "json", quiet=True))
        for pod in found["items"]:
            name = pod["metadata"]["annotations"]["workflows.argoproj.io/node-name"]
            if f".{task}(0)" in name and pod["status"]["phase"] == "Running":
                pod_name = pod["metadata"]["name"]
                cluster.kubectl("-n", NAMESPACE, "delete", "pod", pod_name, "--wait=false", *options, quiet=True)
                return
        time.sleep(1)
    raise AssertionError(f"the pod of {task} never ran")


def test_yaml_of_the_strategy_is_the_one_that_is_tried() -> None:
    """All stages share one, so one is tried."""
    strategies = [
        template["retryStrategy"]
        for document in templates().values()
        for template in document["spec"]["templates"]
        if "container" in template
    ]
    assert all(strategy == strategies[0] for strategy in strategies)
