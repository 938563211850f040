"""Runs on a real cluster: undisturbed, disturbed in every way we know, twice at once, broken, and on a schedule.

In the order written: later tests compare with the first one's run.
"""

from __future__ import annotations

import json
import secrets
import ssl
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote

import pytest

from rpl.demo.cluster import BUCKET, NAMESPACE, Cluster
from rpl.local import walk
from rpl.stage import Run
from rpl.store import open_store
from tests.e2e.chaos import DELETIONS, MUST, Chaos

pytestmark = [pytest.mark.timeout(1800)]
GPU_STAGES = {"learn", "embed", "encode"}
ROUNDS = 2


def nodes(cluster: Cluster, workflow: str) -> list[dict[str, Any]]:
    found = json.loads(cluster.argo("get", workflow, "-o", "json"))
    return [node for node in found["status"]["nodes"].values() if node["type"] == "Pod"]


def contents(cluster: Cluster, name: str) -> dict[str, dict[str, str]]:
    """Checksums of every committed file but the report, which holds times."""
    with cluster.s3():
        run = Run(f"s3://{BUCKET}/runs/{name}")
        found = {}
        for node in walk(run):
            if node.stage != "report":
                for manifest in run.manifests(node) or []:
                    found[f"{node} {manifest.shard}"] = {file: each.sha256 for file, each in manifest.files.items()}
        return found


def ask(cluster: Cluster, service: str, port: int, path: str) -> Any:
    """The data of a JSON answer of Prometheus' or the Pushgateway's API."""
    with cluster.forwarded(service, port) as local:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{local}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]


def ask_prometheus(cluster: Cluster, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask(cluster, "prometheus", 9090, f"query?query={quote(query)}")["result"]
    return found


@pytest.fixture(scope="module")
def calm(cluster: Cluster) -> str:
    """A run that nobody disturbed; its workflow's name."""
    workflow = cluster.submit("calm", shards="2", max_rounds=str(ROUNDS))
    assert cluster.follow(workflow, 1200) == "Succeeded"
    return workflow


def test_a_run_succeeds_and_publishes_its_report(cluster: Cluster, calm: str) -> None:
    with cluster.s3():
        store = open_store(f"s3://{BUCKET}/runs/calm")
        outcome = json.loads(store.read("outcome.json"))
        assert outcome["outcome"] == "Succeeded"
        assert outcome["failures"] == []
        assert all(row["done"] == row["shards"] for row in outcome["stages"])
        assert b"<html" in store.read("index.html")
    assert len(json.loads(json.dumps(outcome["stages"]))) == 3 + 6 * ROUNDS + 5 + 2


def test_gpu_stages_ran_on_the_gpu_node_and_no_others(cluster: Cluster, calm: str) -> None:
    where: dict[str, set[str]] = {}
    for node in nodes(cluster, calm):
        stage = node["templateRef"]["name"].removeprefix("rpl-")
        where.setdefault(stage, set()).add(node["hostNodeName"])
    assert set(where) >= GPU_STAGES | {"start", "crop", "index", "retrieve", "download", "curate", "decide", "report"}
    for stage, hosts in where.items():
        assert hosts == {cluster.gpu_node if stage in GPU_STAGES else cluster.main_node}, stage


def test_argo_get_reads_well(cluster: Cluster, calm: str) -> None:
    text = " ".join(cluster.argo("get", calm, "--no-color").split())
    for words in (
        "Progress: ",
        "run: calm",
        "start",
        "boxes(0:0)",
        "round-1",
        "round-2",
        "learn",
        "novel",
        "report",
        "finish",
    ):
        assert words in text, text
    installed = json.loads(cluster.kubectl("-n", NAMESPACE, "get", "workflowtemplate", "rpl-run", "-o", "json"))
    parameters = installed["spec"]["arguments"]["parameters"]
    assert all(each["description"] for each in parameters), "people read them before they submit"


def test_argo_s_page_shows_runs_without_a_login_and_changes_nothing(cluster: Cluster, calm: str) -> None:
    own_certificate = ssl._create_unverified_context()
    with cluster.forwarded("argo-server", 2746, "argo") as local:
        page = f"https://127.0.0.1:{local}/api/v1/workflows/{NAMESPACE}"
        with urllib.request.urlopen(page, timeout=10, context=own_certificate) as answer:
            assert calm in [each["metadata"]["name"] for each in json.load(answer)["items"]]
        given = {"parameters": ["run=calm"]}
        wish = {"resourceKind": "WorkflowTemplate", "resourceName": "rpl-run", "submitOptions": given}
        submit = urllib.request.Request(f"{page}/submit", json.dumps(wish).encode())
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(submit, timeout=10, context=own_certificate)


def test_prometheus_knows_how_the_run_ended_and_no_stage_is_left(cluster: Cluster, calm: str) -> None:
    for _ in range(20):
        found = ask_prometheus(cluster, 'rpl_run_success{run="calm"}')
        if found:
            break
        time.sleep(3)
    assert [each["value"][1] for each in found] == ["1"]
    seen = ask_prometheus(cluster, 'count by (stage) (last_over_time(rpl_stage_duration_seconds{run="calm"}[30m]))')
    assert {each["metric"]["stage"] for each in seen} >= {"learn", "download", "encode", "crop"}
    groups = [group["labels"] for group in ask(cluster, "pushgateway", 9091, "metrics")]
    assert {"job": "rpl", "run": "calm"} in groups
    assert not [group for group in groups if group.get("run") == "calm" and "stage" in group]


def test_a_disturbed_run_ends_like_the_calm_one(cluster: Cluster, calm: str) -> None:
    name = f"disturbed-{secrets.token_hex(3)}"  # on a cluster that was kept, another one is done already
    workflow = cluster.submit(name, shards="2", max_rounds=str(ROUNDS))
    chaos = Chaos(cluster, workflow)
    chaos.start()
    phase = cluster.follow(workflow, 1700)
    chaos.stop()
    print(f"deleted {dict(chaos.deleted)}, then {chaos.done}")
    assert phase == "Succeeded"
    assert sum(chaos.deleted.values()) >= min(DELETIONS, 10)
    assert set(chaos.deleted) >= MUST
    assert set(chaos.done) == {"s3", "controller", "drain"}
    assert contents(cluster, name) == contents(cluster, "calm")


def test_the_same_run_submitted_twice_one_works_and_one_waits(cluster: Cluster, calm: str) -> None:
    first, second = (cluster.submit("calm", shards="2", max_rounds=str(ROUNDS)) for _ in range(2))
    try:
        for _ in range(40):
            phases = {name: json.loads(cluster.argo("get", name, "-o", "json"))["status"] for name in (first, second)}
            if phases[first].get("phase") == "Running" and phases[second].get("synchronization"):
                break
            time.sleep(1)
        assert phases[first]["phase"] == "Running"
        assert phases[second]["phase"] == "Pending"
        assert "lock" in phases[second]["message"]
    finally:
        cluster.argo("stop", second)
        cluster.argo("stop", first)
    assert {cluster.follow(name, 120) for name in (first, second)} == {"Failed"}
    with cluster.s3():
        outcome = json.loads(open_store(f"s3://{BUCKET}/runs/calm").read("outcome.json"))
    assert (outcome["outcome"], outcome["workflow"]) == ("Succeeded", "Failed"), "the run was finished before"


def test_a_bad_configuration_is_told_in_seconds_and_not_tried_again(cluster: Cluster, calm: str) -> None:
    with cluster.s3():
        store = open_store(f"s3://{BUCKET}/configs")
        store.write("bad.yaml", store.read("demo.yaml").replace(b"max_rounds:", b"max_rouns:"))
    began = time.monotonic()
    workflow = cluster.submit("bad", config=f"s3://{BUCKET}/configs/bad.yaml")
    assert cluster.follow(workflow, 120) == "Failed"
    assert time.monotonic() - began < 90
    text = " ".join(cluster.argo("get", workflow).split())
    assert "unknown key 'rounds.max_rouns'; remove it or correct its spelling." in text
    tries = [node for node in nodes(cluster, workflow) if node["templateRef"]["name"] == "rpl-start"]
    assert len(tries) == 1
    with cluster.s3():
        assert not list(open_store(f"s3://{BUCKET}/runs/bad").list()), "nothing half-written"


def test_a_tick_of_the_schedule_sources_again(cluster: Cluster, calm: str) -> None:
    cluster.helm("upgrade", "rpl", "helm/rpl", "--reuse-values", "--set", "schedule.enabled=true",
                 "--set", "schedule.base=calm", "--wait")  # fmt: skip
    workflow = cluster.argo("submit", "--from", "cronwf/rpl-again", "-o", "name").strip()
    assert cluster.follow(workflow, 1200) == "Succeeded"
    name = f"calm-{workflow}"
    with cluster.s3():
        run = Run(f"s3://{BUCKET}/runs/{name}")
        assert run.config.previous == f"s3://{BUCKET}/runs/calm"
        summary = json.loads(run.store.read("summary.json"))
        assert summary["since"], "the report says what changed"
        assert json.loads(run.store.read("outcome.json"))["outcome"] == "Succeeded"
    kept = cluster.kubectl("-n", NAMESPACE, "get", "cronworkflow", "rpl-again", "-o", "json")
    assert json.loads(kept)["spec"]["concurrencyPolicy"] == "Forbid"
