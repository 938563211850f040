"""The workflow in Argo's words is the graph of `rpl.rounds`, stage by stage and edge by edge."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from rpl.rounds import AFTER_ROUNDS, BEFORE_ROUNDS, NOVEL, STAGES, Node, edges, round_nodes, shard_key, sources
from tests.argo_graph import FOLDER, Expansion, Pod, load, templates

sys.path.insert(0, str(FOLDER))
generate = importlib.import_module("generate")
sys.path.remove(str(FOLDER))

CROP_SHARDS, DOWNLOAD_SHARDS, ROUNDS = 3, 2, 2
AROUND = {"start", "decide", "finish"}
Part = tuple[Node, str]


def outputs(template: str, inputs: Mapping[str, str]) -> Mapping[str, str]:
    if template == "rpl-start":
        return {"crop-shards": str(CROP_SHARDS), "download-shards": str(DOWNLOAD_SHARDS)}
    return {"go-on": "true" if int(inputs["round"]) < ROUNDS else "false"}


@pytest.fixture(scope="module")
def expansion() -> Expansion:
    found = Expansion(outputs)
    found.run("rpl-run", "run", {}, frozenset())
    return found


def is_stage(pod: Pod) -> bool:
    return pod.template.removeprefix("rpl-") not in AROUND


def part(pod: Pod) -> Part:
    """The node and shard of a stage's pod, from its arguments as the command reads them."""
    options = dict(arg.removeprefix("--").split("=", 1) for arg in pod.args[2:])
    round_ = options.get("round", "once")
    node = Node(
        pod.template.removeprefix("rpl-"), None if round_ == "once" else "novel" if round_ == "novel" else int(round_)
    )
    return node, options.get("shard", "0/1")


def shards(node: Node) -> list[str]:
    count = {"crop": CROP_SHARDS, "download": DOWNLOAD_SHARDS, None: 1}[shard_key(node)]
    return [f"{index}/{count}" for index in range(count)]


def expected() -> list[Node]:
    rounds = [node for number in range(1, ROUNDS + 1) for node in round_nodes(number)]
    once = [Node(stage) for stage in (*BEFORE_ROUNDS, *AFTER_ROUNDS)]
    return [*once, *rounds, *(Node(stage, "novel") for stage in NOVEL)]


def test_the_same_parts_of_the_same_stages_run(expansion: Expansion) -> None:
    ours = {(node, shard) for node in expected() for shard in shards(node)}
    theirs = {part(pod) for pod in expansion.before if is_stage(pod)}
    assert theirs == ours


def test_every_input_is_there_before_its_reader_starts(expansion: Expansion) -> None:
    before = {
        part(pod): {part(other) for other in earlier if is_stage(other)}
        for pod, earlier in expansion.before.items()
        if is_stage(pod)
    }
    for (node, shard), earlier in before.items():
        for edge in edges(node):
            for source in sources(node, edge, ROUNDS):
                wanted = {(source, shard)} if edge.by_shard else {(source, each) for each in shards(source)}
                assert wanted <= earlier, f"{node} {shard} starts before {source} ({edge.name}) has ended"


def test_a_part_of_the_pictures_is_encoded_without_waiting_for_the_others(expansion: Expansion) -> None:
    for node, producer in ((Node("encode"), "crop"), (Node("encode", 1), "download")):
        for pod, earlier in expansion.before.items():
            if pod.template == "rpl-encode" and part(pod)[0] == node:
                waited = {
                    part(p)[1] for p in earlier if p.template == f"rpl-{producer}" and part(p)[0].round == node.round
                }
                assert waited == {part(pod)[1]}


def test_start_comes_first_and_every_round_but_the_last_is_followed_by_another(expansion: Expansion) -> None:
    start = [pod for pod in expansion.before if pod.template == "rpl-start"]
    assert len(start) == 1
    assert all(start[0] in earlier for pod, earlier in expansion.before.items() if pod != start[0])
    assert sum(pod.template == "rpl-decide" for pod in expansion.before) == ROUNDS


def test_the_files_are_what_the_generator_writes() -> None:
    for pod in generate.pods():
        path = FOLDER / "templates" / f"rpl-{pod.name}.yaml"
        assert path.read_text(encoding="utf-8") == generate.template(pod), f"{path.name} is stale: make argo"
    names = {f"rpl-{pod.name}" for pod in generate.pods()} | {"rpl-run"}
    assert set(templates()) == names


def test_only_the_stages_with_torch_ask_for_a_gpu() -> None:
    for name, document in templates().items():
        stage = STAGES.get(name.removeprefix("rpl-"))
        for template in document["spec"]["templates"]:
            if "container" not in template:
                continue
            patch = template["podSpecPatch"]
            is_gpu = stage is not None and stage.gpu
            assert ("nvidia.com/gpu" in patch) == ("nodeSelector" in patch) == ("tolerations" in patch) == is_gpu
            image = "clip" if stage is not None and stage.image == "clip" else "light"
            assert template["container"]["image"] == "{{workflow.parameters.image-" + image + "}}"


def test_every_pod_is_restricted_and_bounded() -> None:
    for document in templates().values():
        for template in document["spec"]["templates"]:
            if "container" not in template:
                continue
            container = template["container"]
            assert template["securityContext"]["runAsNonRoot"] is True
            assert template["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip
            assert set(container["resources"]["limits"]) >= {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert template["automountServiceAccountToken"] is False
            assert container["command"] == ["python"], "no shell, so that SIGTERM arrives"


@pytest.mark.parametrize(
    ("status", "code", "message", "again"),
    [
        ("Failed", "75", "Error (exit code 75)", True),
        ("Failed", "2", "Error (exit code 2)", False),
        ("Failed", "1", "Error (exit code 1)", False),
        ("Error", "-1", "pod deleted", True),
        ("Failed", "143", "Error (exit code 143)", True),
        ("Failed", "137", "Error (exit code 137)", True),
        ("Failed", "137", "OOMKilled (exit code 137)", False),
        ("Failed", "-1", "Pod was active on the node longer than the specified deadline", False),
        ("Failed", "-1", "The node was low on resource: memory.", True),
    ],
)
def test_what_is_tried_again(status: str, code: str, message: str, again: bool) -> None:
    for document in templates().values():
        for template in document["spec"]["templates"]:
            if "container" in template:
                strategy = template["retryStrategy"]
                assert strategy["retryPolicy"] == "Always", "else the policy says no where the expression says yes"
                assert evaluate(strategy["expression"], status, code, message) is again
            else:
                assert "retryStrategy" not in template, "retried whole, a graph would repeat what had failed for good"


def evaluate(expression: str, status: str, code: str, message: str) -> bool:
    """The retry expression in Python's words; on a cluster it is tried in tests/e2e."""
    words = {
        "lastRetry.status": repr(status),
        "asInt(lastRetry.exitCode)": code,
        "&&": " and ",
        "||": " or ",
        "!(": "not (",
    }
    text = " ".join(expression.split())
    for theirs, ours in words.items():
        text = text.replace(theirs, ours)
    text = re.sub(r"lastRetry\.message contains ('[^']*')", lambda m: f"({m[1]} in {message!r})", text)
    return bool(eval(text))


def test_round_yaml_only_names_the_template_and_the_run() -> None:
    spec = load(FOLDER / "round.yaml")["spec"]
    assert spec["workflowTemplateRef"] == {"name": "rpl-run"}
    known = {each["name"] for each in templates()["rpl-run"]["spec"]["arguments"]["parameters"]}
    assert {each["name"] for each in spec["arguments"]["parameters"]} <= known


@pytest.mark.skipif(shutil.which("argo") is None, reason="the program argo is not installed")
def test_argo_finds_nothing_wrong() -> None:
    files = [*sorted(map(str, (FOLDER / "templates").glob("*.yaml"))), *map(str, sorted(FOLDER.glob("*.yaml")))]
    result = subprocess.run(
        ["argo", "lint", "--offline", *files], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_stage_can_be_submitted_alone() -> None:
    """Each template declares every parameter that it reads."""
    for document in templates().values():
        text = Path(FOLDER / "templates" / f"{document['metadata']['name']}.yaml").read_text(encoding="utf-8")
        read = set(re.findall(r"workflow\.parameters\.([a-z-]+)", text))
        declared = {each["name"] for each in document["spec"]["arguments"]["parameters"]}
        if document["metadata"]["name"] != "rpl-run":
            assert read <= declared
            entry = next(t for t in document["spec"]["templates"] if t["name"] == document["spec"]["entrypoint"])
            assert {each["name"] for each in entry.get("inputs", {}).get("parameters", [])} <= declared
