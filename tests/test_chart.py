"""The Helm chart: what it renders with which values, what it refuses, that it is Argo's YAML and nothing besides."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

import rpl
from rpl import connections
from rpl.rounds import STAGES
from tests.chart import (
    CHART,
    CLUSTER,
    NEEDED,
    ROOT,
    Object,
    Peer,
    copy_chart,
    helm,
    is_reached,
    load,
    merged,
    named,
    pod_of,
    pods,
    reaches,
    render,
    render_text,
    templates,
)

sys.path.insert(0, str(ROOT / "helm"))
import values_table

pytestmark = pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not on the PATH; install Helm 3")
needs_argo = pytest.mark.skipif(shutil.which("argo") is None, reason="argo is not on the PATH; install Argo's CLI")

CASES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
DOCUMENTED = {value.key: value for value in values_table.documented((CHART / "values.yaml").read_text())}
ADDED = {"app.kubernetes.io/instance", "app.kubernetes.io/version", "app.kubernetes.io/managed-by", "helm.sh/chart"}
"""Labels that the chart adds to those of argo/."""
GPU_STAGES = {name for name, stage in STAGES.items() if stage.gpu}

Values = Mapping[str, Any]


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_chart(tmp_path_factory.mktemp("chart"))


def case(name: str) -> dict[str, Any]:
    (values,) = load(CASES[name].read_text())
    return dict(values)


@pytest.fixture(params=CASES)
def objects(request: pytest.FixtureRequest, chart: Path) -> list[Object]:
    """What each set of values in ci/ renders to."""
    return render(chart, case(request.param))


# What it is made of


def test_lint() -> None:
    done = helm("lint", "--strict", "--kube-version=1.34.0", CHART)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in CASES.values():
        done = helm("lint", "--strict", "--kube-version=1.34.0", "--values", path, CHART)
        assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_sets_of_values_for_what_people_have() -> None:
    assert set(CASES) == {"local", "aws", "offline", "everything"}


def test_version_is_the_packages() -> None:
    (about,) = load((CHART / "Chart.yaml").read_text())
    assert about["appVersion"] == rpl.__version__


def test_workflows_are_those_of_argo(chart: Path) -> None:
    """With the values' defaults only labels and the namespace differ from the files that `argo submit` reads."""
    rendered = {
        each["metadata"]["name"]: without_additions(each)
        for each in render(chart, NEEDED)
        if each["kind"] == "WorkflowTemplate"
    }
    files = sorted((ROOT / "argo" / "templates").glob("*.yaml"))
    assert len(files) == len(STAGES) + 4  # run, start, decide, finish
    assert rendered == {path.stem: load(path.read_text())[0] for path in files}


def test_schedule_is_that_of_argo(chart: Path) -> None:
    (given,) = load((ROOT / "argo" / "cron.yaml").read_text())
    scheduled = named(
        render(chart, NEEDED, {"schedule": {"enabled": True, "base": "first"}}), "CronWorkflow", "rpl-again"
    )
    assert scheduled is not None
    assert without_additions(scheduled) == given


def without_additions(rendered: Object) -> Object:
    rendered = copy.deepcopy(rendered)
    assert rendered["metadata"].pop("namespace") == "sourcing"
    labelled = [rendered["metadata"], *(each["metadata"] for each in templates([rendered]).values())]
    for metadata in [*labelled, rendered["spec"].get("workflowMetadata", {"labels": dict.fromkeys(ADDED)})]:
        for name in ADDED:
            del metadata["labels"][name]
    return rendered


def test_a_package_renders_the_same(tmp_path: Path) -> None:
    """helm follows the link to argo/ when it packages, and leaves out what the chart does not read."""
    assert (CHART / "argo").is_symlink()
    done = helm("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    assert render_text(package, case("aws")) == render_text(CHART, case("aws"))
    shutil.unpack_archive(package, tmp_path / "unpacked")
    names = {path.name for path in (tmp_path / "unpacked" / "rpl" / "argo").iterdir()}
    assert names == {"templates", "cron.yaml"}
    assert not (tmp_path / "unpacked" / "rpl" / "ci").exists()


def test_twice_the_same_bytes(chart: Path) -> None:
    assert render_text(chart, case("everything")) == render_text(chart, case("everything"))


# That a cluster takes it


def test_objects_are_valid(objects: list[Object]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    for each in [*objects, *pods(objects)]:
        if each["apiVersion"].startswith("argoproj.io/"):
            continue  # for `argo lint`
        if each["kind"] == "ServiceMonitor":
            assert each["spec"]["selector"]["matchLabels"]
            assert all(endpoint["port"] and endpoint["interval"] for endpoint in each["spec"]["endpoints"])
        elif each["kind"] == "PrometheusRule":
            assert each["spec"]["groups"]
            for rule in (rule for group in each["spec"]["groups"] for rule in group["rules"]):
                assert rule["expr"]
                assert rule.get("alert") or rule.get("record")
        else:
            validate(copy.deepcopy(each), "1.34", strict=True)


@needs_argo
def test_argo_finds_nothing_wrong(objects: list[Object], tmp_path: Path) -> None:
    done = argo_lint(objects, tmp_path)
    assert done.returncode == 0, done.stdout


@needs_argo
def test_argo_would_find_a_misspelt_field(chart: Path, tmp_path: Path) -> None:
    objects = copy.deepcopy(render(chart, NEEDED))
    next(iter(templates(objects).values()))["priorityClas"] = "x"
    assert argo_lint(objects, tmp_path).returncode != 0


def argo_lint(objects: list[Object], folder: Path) -> subprocess.CompletedProcess[str]:
    for each in objects:
        if each["apiVersion"].startswith("argoproj.io/"):
            (folder / f"{each['metadata']['name']}.json").write_text(json.dumps(each))
    command = ["argo", "lint", "--offline", "--no-color", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_object_is_labelled(objects: list[Object]) -> None:
    for each in [*objects, *templates(objects).values()]:
        labels = each["metadata"]["labels"]
        assert set(labels) >= ADDED | {"app.kubernetes.io/component"}, each
        assert labels["app.kubernetes.io/name"] == labels["app.kubernetes.io/part-of"] == "rpl"
    for each in objects:
        assert each["metadata"]["namespace"] == "sourcing"
    for name, template in templates(objects).items():
        assert template["metadata"]["labels"]["app.kubernetes.io/component"] == name


def test_pods_obey_restricted_pod_security(objects: list[Object]) -> None:
    seen = 0
    for pod in pods(objects):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] == 10001
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert {next(iter(set(volume) - {"name"})) for volume in pod["spec"]["volumes"]} == {"emptyDir"}
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["name"] != "main" or context["readOnlyRootFilesystem"] is True
            for kind in ("requests", "limits"):
                assert container["resources"][kind].keys() >= {"cpu", "memory"}, (pod["metadata"], container["name"])
            seen += 1
    assert seen == 1 + 3 * (len(STAGES) + 3)  # the test's pod, and three containers of each other


def test_no_credentials(objects: list[Object]) -> None:
    for each in objects:
        if each["kind"] == "Secret":
            assert each["type"] == "kubernetes.io/service-account-token"
            assert not each.keys() & {"data", "stringData"}
    text = json.dumps(objects)
    assert not re.search(r"AKIA|BEGIN [A-Z ]*PRIVATE", text)
    assert not re.search(r"(SECRET|PASSWORD|TOKEN|ACCESS_KEY)[A-Z_]*", text), "a credential's name in the environment"


def test_no_value_for_a_credential() -> None:
    for key in DOCUMENTED:
        assert not re.search("password|token|access|key", key, re.IGNORECASE), key
    assert [key for key in DOCUMENTED if "secret" in key.lower()] == ["images.pullSecrets", "s3.existingSecret"]


def test_executor_may_report_and_nothing_else(chart: Path) -> None:
    objects = render(chart, NEEDED)
    (role,) = (each for each in objects if each["kind"] == "Role")
    reports = {"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]}
    assert role["rules"] == [reports]
    (binding,) = (each for each in objects if each["kind"] == "RoleBinding")
    assert [subject["name"] for subject in binding["subjects"]] == ["rpl-executor"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    secret = named(objects, "Secret", "rpl-executor.service-account-token")
    assert secret is not None
    assert secret["metadata"]["annotations"]["kubernetes.io/service-account.name"] == "rpl-executor"
    for template in templates(objects).values():
        assert template["serviceAccountName"] == "rpl"
        assert template["executor"] == {"serviceAccountName": "rpl-executor"}


def test_parameters_by_the_contract(chart: Path) -> None:
    """Argo finds the ConfigMap by its label, and workflows their defaults by these keys."""
    objects = render(chart, case("everything"))
    config = named(objects, "ConfigMap", "rpl")
    assert config is not None
    assert config["metadata"]["labels"]["workflows.argoproj.io/configmap-type"] == "Parameter"
    toleration = {"effect": "NoSchedule", "key": "nvidia.com/gpu", "operator": "Exists"}
    assert config["data"] == {
        "runs": "s3://bucket/some/prefix",
        "config": "s3://bucket/config.yaml",
        "image-light": "ghcr.io/owner/images/rpl-light:1.2.3",
        "image-clip": f"ghcr.io/owner/images/rpl-clip@sha256:{'3' * 64}",
        "gpus": "2",
        "gpu-node-selector": '{"pool":"gpu"}',
        "gpu-tolerations": json.dumps([toleration], separators=(",", ":")),
    }
    used = {
        parameter["valueFrom"]["configMapKeyRef"]["key"]
        for each in objects
        if each["kind"] == "WorkflowTemplate"
        for parameter in each["spec"]["arguments"]["parameters"]
        if "valueFrom" in parameter
    }
    assert used == config["data"].keys()


# Each option absent and present


def in_pods(read: Callable[[Object], Any], *, gpu: bool | None = None) -> Callable[[list[Object]], Any]:
    """What all stages' templates have in common under `read`, or those with (without) a GPU."""

    def common(objects: list[Object]) -> Any:
        found = [
            read(template)
            for name, template in templates(objects).items()
            if gpu is None or (name in GPU_STAGES) is gpu
        ]
        assert all(each == found[0] for each in found), "stages differ"
        return found[0]

    return common


def at(kind: str, name: str, *path: str | int) -> Callable[[list[Object]], Any]:
    """What an object has at `path`; None where it or its part is absent."""

    def find(objects: list[Object]) -> Any:
        found: Any = named(objects, kind, name)
        for key in path:
            found = found.get(key) if isinstance(found, dict) else found[key] if found is not None else None
        return found

    return find


def parameter(name: str) -> Callable[[list[Object]], Any]:
    return at("ConfigMap", "rpl", "data", name)


def gpu_pod(key: str) -> Callable[[list[Object]], Any]:
    """What the pod of a GPU stage has at `key`, once Argo has put the parameters in."""

    def find(objects: list[Object]) -> Any:
        config = named(objects, "ConfigMap", "rpl")
        assert config is not None
        return pod_of(templates(objects)["learn"], config["data"])["spec"][key]

    return find


def network(name: str, rule: int, key: str) -> Callable[[list[Object]], Any]:
    return at("NetworkPolicy", name, "spec", "egress", rule, key)


def rules(objects: list[Object]) -> int:
    policy = named(objects, "NetworkPolicy", "rpl-services")
    assert policy is not None
    return len(policy["spec"]["egress"])


class Option(NamedTuple):
    """A value, where it shows, what shows there without and with it. `beside`: values it needs in both cases."""

    key: str
    value: Any
    read: Callable[[list[Object]], Any]
    absent: Any
    present: Any
    beside: Values = MappingProxyType({})


SECRET = {"secretRef": {"name": "rpl-s3", "optional": True}}
OTHER_SECRET = {"secretRef": {"name": "keys", "optional": True}}
ENV_FROM = [{"configMapRef": {"name": "rpl-env"}}, SECRET]
PEER = [{"ipBlock": {"cidr": "192.0.2.1/32"}}]
OTHER_PEER = [{"ipBlock": {"cidr": "192.0.2.2/32"}}]
CLOSED = {"networkPolicy": {"enabled": True, "api": {"to": PEER}}}
GATEWAY = {"metrics": {"pushgateway": "http://g:9091"}}
CLOSED_GATEWAY = merged(CLOSED, GATEWAY, {"networkPolicy": {"pushgateway": {"to": PEER}}})
SCHEDULED = {"schedule": {"enabled": True, "base": "first"}}
MONITORED = merged(GATEWAY, {"metrics": {"serviceMonitor": {"enabled": True}}})
TOLERATIONS = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
DIGEST = f"sha256:{'a' * 64}"
RPL = {"app.kubernetes.io/name": "rpl"}


def tcp(*ports: int) -> list[Object]:
    return [{"protocol": "TCP", "port": port} for port in ports]


def labelled(kind: str, name: str, label: str) -> Callable[[list[Object]], Any]:
    return at(kind, name, "metadata", "labels", label)


OPTIONS = [
    Option("images.pullPolicy", "Always", in_pods(lambda t: t["container"]["imagePullPolicy"]), "IfNotPresent",
           "Always"),
    Option("images.pullSecrets", [{"name": "s"}], at("WorkflowTemplate", "rpl-run", "spec", "imagePullSecrets"), None,
           [{"name": "s"}]),
    Option("images.light.repository", "a", parameter("image-light"), "ghcr.io/owner/rpl-light:0.1.0",
           "ghcr.io/owner/a:0.1.0"),
    Option("images.light.tag", "2", parameter("image-light"), "ghcr.io/owner/rpl-light:0.1.0",
           "ghcr.io/owner/rpl-light:2"),
    Option("images.light.digest", DIGEST, parameter("image-light"), "ghcr.io/owner/rpl-light:0.1.0",
           f"ghcr.io/owner/rpl-light@{DIGEST}"),
    Option("images.clip.repository", "b", parameter("image-clip"), "ghcr.io/owner/rpl-clip-cuda:0.1.0",
           "ghcr.io/owner/b:0.1.0"),
    Option("images.clip.tag", "2", parameter("image-clip"), "ghcr.io/owner/rpl-clip-cuda:0.1.0",
           "ghcr.io/owner/rpl-clip-cuda:2"),
    Option("images.clip.digest", DIGEST, parameter("image-clip"), "ghcr.io/owner/rpl-clip-cuda:0.1.0",
           f"ghcr.io/owner/rpl-clip-cuda@{DIGEST}"),
    Option("s3.endpoint", "http://s3:8333", at("ConfigMap", "rpl-env", "data", "AWS_ENDPOINT_URL"), None,
           "http://s3:8333"),
    Option("s3.region", "eu-west-1", at("ConfigMap", "rpl-env", "data", "AWS_REGION"), None, "eu-west-1"),
    Option("s3.existingSecret", "keys", in_pods(lambda t: t["container"]["envFrom"]), ENV_FROM,
           [ENV_FROM[0], OTHER_SECRET]),
    Option("s3.existingSecret", "", in_pods(lambda t: t["container"]["envFrom"]), ENV_FROM, ENV_FROM[:1]),
    Option("s3.existingSecret", "", at("Pod", "rpl-test-store", "spec", "containers", 0, "envFrom"), ENV_FROM,
           ENV_FROM[:1]),
    Option("config", "s3://b/c.yaml", parameter("config"), "", "s3://b/c.yaml"),
    Option("gpu.count", 0, lambda o: gpu_pod("containers")(o)[0]["resources"]["limits"]["nvidia.com/gpu"], "1", "0"),
    Option("gpu.nodeSelector", {"pool": "gpu"}, gpu_pod("nodeSelector"), {}, {"pool": "gpu"}),
    Option("gpu.tolerations", TOLERATIONS, gpu_pod("tolerations"), [], TOLERATIONS),
    Option("gpu.nodeSelector", {"pool": "gpu"}, in_pods(lambda t: t.get("nodeSelector"), gpu=False), None, None),
    Option("nodeSelector", {"a": "b"}, in_pods(lambda t: t.get("nodeSelector"), gpu=False), None, {"a": "b"}),
    Option("nodeSelector", {"a": "b"}, in_pods(lambda t: t.get("nodeSelector"), gpu=True), None, None),
    Option("tolerations", TOLERATIONS, in_pods(lambda t: t.get("tolerations"), gpu=False), None, TOLERATIONS),
    Option("tolerations", TOLERATIONS, in_pods(lambda t: t.get("tolerations"), gpu=True), None, None),
    Option("affinity", {"podAffinity": {}}, in_pods(lambda t: t.get("affinity"), gpu=False), None,
           {"podAffinity": {}}),
    Option("resources", {"learn": {"limits": {"memory": "64Gi"}}},
           lambda o: templates(o)["learn"]["container"]["resources"]["limits"], {"cpu": "16", "memory": "16Gi"},
           {"cpu": "16", "memory": "64Gi"}),
    Option("resources", {"learn": {"limits": {"memory": "64Gi"}}},
           lambda o: templates(o)["encode"]["container"]["resources"]["limits"]["memory"], "16Gi", "16Gi"),
    Option("priorityClassName", "low", in_pods(lambda t: t.get("priorityClassName")), None, "low"),
    Option("podLabels", {"team": "v"}, in_pods(lambda t: t["metadata"]["labels"].get("team")), None, "v"),
    Option("podLabels", RPL | {"app.kubernetes.io/name": "other"},
           in_pods(lambda t: t["metadata"]["labels"]["app.kubernetes.io/name"]), "rpl", "rpl"),
    Option("podAnnotations", {"a": "b"}, in_pods(lambda t: t["metadata"]["annotations"].get("a")), None, "b"),
    Option("extraEnv", [{"name": "A", "value": "b"}],
           in_pods(lambda t: [e["value"] for e in t["container"]["env"] if e["name"] == "A"]), [], ["b"]),
    Option("extraEnv", [{"name": "A", "value": "b"}], in_pods(lambda t: t["container"]["env"][0]["name"]),
           "RPL_ATTEMPT", "RPL_ATTEMPT"),
    Option("extraEnvFrom", [{"secretRef": {"name": "x"}}], in_pods(lambda t: t["container"]["envFrom"]), ENV_FROM,
           [*ENV_FROM, {"secretRef": {"name": "x"}}]),
    Option("workflow.parallelism", 3, at("WorkflowTemplate", "rpl-run", "spec", "parallelism"), 16, 3),
    Option("workflow.activeDeadlineSeconds", 1209600,
           at("WorkflowTemplate", "rpl-run", "spec", "activeDeadlineSeconds"), 604800, 1209600),
    Option("workflow.ttlSecondsAfterCompletion", 60,
           at("WorkflowTemplate", "rpl-run", "spec", "ttlStrategy", "secondsAfterCompletion"), 604800, 60),
    Option("workflow.retryLimit", 2, in_pods(lambda t: t["retryStrategy"]["limit"]), "10", "2"),
    Option("schedule.enabled", True, lambda o: named(o, "CronWorkflow", "rpl-again") is not None, False, True,
           {"schedule": {"base": "first"}}),
    Option("schedule.cron", "1 2 * * *", at("CronWorkflow", "rpl-again", "spec", "schedules"), ["0 3 1 * *"],
           ["1 2 * * *"], SCHEDULED),
    Option("schedule.timezone", "Europe/Berlin", at("CronWorkflow", "rpl-again", "spec", "timezone"), "Etc/UTC",
           "Europe/Berlin", SCHEDULED),
    Option("schedule.base", "lvis",
           at("CronWorkflow", "rpl-again", "spec", "workflowSpec", "arguments", "parameters", 1, "value"), "first",
           "lvis", SCHEDULED),
    Option("schedule.suspend", True, at("CronWorkflow", "rpl-again", "spec", "suspend"), False, True, SCHEDULED),
    Option("serviceAccount.create", False,
           lambda o: sorted(e["metadata"]["name"] for e in o if e["kind"] in ("ServiceAccount", "Secret")),
           ["rpl", "rpl-executor", "rpl-executor.service-account-token"], []),
    Option("serviceAccount.create", False, lambda o: len([e for e in o if e["kind"].startswith("Role")]), 2, 2),
    Option("serviceAccount.annotations", {"a": "b"}, at("ServiceAccount", "rpl", "metadata", "annotations"), None,
           {"a": "b"}),
    Option("rbac.create", False, lambda o: len([e for e in o if e["kind"].startswith("Role")]), 2, 0),
    Option("rbac.create", False, lambda o: len([e for e in o if e["kind"] == "ServiceAccount"]), 2, 2),
    Option("networkPolicy.enabled", True,
           lambda o: sorted(e["metadata"]["name"] for e in o if e["kind"] == "NetworkPolicy"), [],
           ["rpl-deny", "rpl-download", "rpl-services"], {"networkPolicy": {"api": {"to": PEER}}}),
    Option("networkPolicy.dns.to", OTHER_PEER, network("rpl-services", 0, "to"),
           [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}], OTHER_PEER,
           CLOSED),
    Option("networkPolicy.dns.ports", [5353], network("rpl-services", 0, "ports"),
           [{"protocol": "UDP", "port": 53}, *tcp(53)], [{"protocol": "UDP", "port": 5353}, *tcp(5353)], CLOSED),
    Option("networkPolicy.s3.to", OTHER_PEER, lambda o: len(network("rpl-services", 1, "to")(o)), 2, 1, CLOSED),
    Option("networkPolicy.s3.ports", [8333], network("rpl-services", 1, "ports"), tcp(443), tcp(8333), CLOSED),
    Option("networkPolicy.api.to", OTHER_PEER, network("rpl-services", 2, "to"), PEER, OTHER_PEER, CLOSED),
    Option("networkPolicy.api.ports", [7443], network("rpl-services", 2, "ports"), tcp(443, 6443), tcp(7443), CLOSED),
    Option("networkPolicy.pushgateway.to", OTHER_PEER, network("rpl-services", 3, "to"), PEER, OTHER_PEER,
           CLOSED_GATEWAY),
    Option("networkPolicy.pushgateway.ports", [80], network("rpl-services", 3, "ports"), tcp(9091), tcp(80),
           CLOSED_GATEWAY),
    Option("networkPolicy.extraEgress", [{"to": OTHER_PEER}], rules, 3, 4, CLOSED),
    Option("metrics.pushgateway", "http://g:9091", at("ConfigMap", "rpl-env", "data", "RPL_PUSHGATEWAY"), None,
           "http://g:9091"),
    Option("metrics.pushgateway", "http://g:9091", rules, 3, 4,
           merged(CLOSED, {"networkPolicy": {"pushgateway": {"to": PEER}}})),
    Option("metrics.serviceMonitor.enabled", True,
           at("ServiceMonitor", "rpl-pushgateway", "spec", "endpoints", 0, "honorLabels"), None, True, GATEWAY),
    Option("metrics.serviceMonitor.namespace", "monitoring",
           at("ServiceMonitor", "rpl-pushgateway", "spec", "namespaceSelector", "matchNames"), ["sourcing"],
           ["monitoring"], MONITORED),
    Option("metrics.serviceMonitor.selector", {"app.kubernetes.io/name": "g"},
           at("ServiceMonitor", "rpl-pushgateway", "spec", "selector", "matchLabels"),
           {"app.kubernetes.io/name": "prometheus-pushgateway"}, {"app.kubernetes.io/name": "g"}, MONITORED),
    Option("metrics.serviceMonitor.port", "web",
           at("ServiceMonitor", "rpl-pushgateway", "spec", "endpoints", 0, "port"), "http", "web", MONITORED),
    Option("metrics.serviceMonitor.interval", "5s",
           at("ServiceMonitor", "rpl-pushgateway", "spec", "endpoints", 0, "interval"), "30s", "5s", MONITORED),
    Option("metrics.serviceMonitor.labels", {"release": "p"}, labelled("ServiceMonitor", "rpl-pushgateway", "release"),
           None, "p", MONITORED),
    Option("metrics.alerts.enabled", True, lambda o: named(o, "PrometheusRule", "rpl") is not None, False, True),
    Option("metrics.alerts.labels", {"release": "p"}, labelled("PrometheusRule", "rpl", "release"), None, "p",
           {"metrics": {"alerts": {"enabled": True}}}),
    Option("metrics.dashboard.enabled", True, labelled("ConfigMap", "rpl-dashboard", "grafana_dashboard"), None, "1"),
    Option("metrics.dashboard.labels", {"found": "by"}, labelled("ConfigMap", "rpl-dashboard", "found"), None, "by",
           {"metrics": {"dashboard": {"enabled": True}}}),
    Option("metrics.dashboard.annotations", {"folder": "RPL"},
           at("ConfigMap", "rpl-dashboard", "metadata", "annotations"), None, {"folder": "RPL"},
           {"metrics": {"dashboard": {"enabled": True}}}),
]  # fmt: skip


def values_at(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)
def test_option(chart: Path, option: Option) -> None:
    assert option.read(render(chart, NEEDED, option.beside)) == option.absent
    assert option.read(render(chart, NEEDED, option.beside, values_at(option.key, option.value))) == option.present


def test_no_option_is_untested() -> None:
    elsewhere = {"images.registry", "s3.runs", "checkCrds"}  # below: nothing renders without
    assert {option.key for option in OPTIONS} | elsewhere == DOCUMENTED.keys()


def test_pull_secrets_are_everywhere(chart: Path) -> None:
    secrets = [{"name": "mirror"}]
    objects = render(chart, case("offline"))
    specs = [each["spec"] for each in objects if each["kind"] in ("WorkflowTemplate", "Pod")]
    assert len(specs) == len(STAGES) + 5
    assert all(spec["imagePullSecrets"] == secrets for spec in specs)


def test_alerts_and_dashboard_are_the_files(chart: Path) -> None:
    """Their own {{ }} are Prometheus' and Grafana's, and stay."""
    objects = render(chart, case("everything"))
    assert at("PrometheusRule", "rpl", "spec")(objects) == load((chart / "files" / "alerts.yaml").read_text())[0]
    dashboard = at("ConfigMap", "rpl-dashboard", "data", "rpl.json")(objects)
    assert json.loads(dashboard) == json.loads((chart / "files" / "dashboard.json").read_text())


# What stops it

API = CLUSTER[:1]
REFUSALS = [
    ({"images": {"registry": ""}}, "images.registry is empty; set it to where the images of images/Dockerfile were"),
    ({"images": {"clip": {"repository": ""}}}, "images.clip.repository is empty; set it"),
    ({"s3": {"runs": ""}}, 's3.runs is ""; set it to where runs shall live, s3://BUCKET/PREFIX.'),
    ({"s3": {"runs": "/data/runs"}}, 's3.runs is "/data/runs"; set it to where runs shall live, s3://BUCKET/PREFIX.'),
    ({"config": "my.yaml"}, 'config is "my.yaml"; pods read s3:// alone, so upload the file and set its URI.'),
    ({"schedule": {"enabled": True}}, "schedule.base is empty; set it to the name of the run whose prompts are used."),
    ({"networkPolicy": {"enabled": True}}, "networkPolicy.api.to is empty; set it to the API server's addresses"),
    (merged(CLOSED, {"networkPolicy": {"dns": {"to": []}}}), "networkPolicy.dns.to is empty; set it to the peers"),
    (merged(CLOSED, GATEWAY), "networkPolicy.pushgateway.to is empty; set it to the gateway's peers."),
    ({"metrics": {"serviceMonitor": {"enabled": True}}}, "metrics.pushgateway is empty, so nothing would be pushed"),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSALS, ids=[sentence[:30] for _, sentence in REFUSALS])
def test_a_missing_choice_stops_it(chart: Path, values: Values, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        render_text(chart, merged(NEEDED, values))


@pytest.mark.parametrize(
    ("values", "missing", "sentence"),
    [
        ({}, "argoproj.io/v1alpha1/WorkflowTemplate", "the cluster has no WorkflowTemplates; install Argo Workflows"),
        (MONITORED, "monitoring.coreos.com/v1/ServiceMonitor", "the cluster has no ServiceMonitors; install the"),
        (
            {"metrics": {"alerts": {"enabled": True}}},
            "monitoring.coreos.com/v1/PrometheusRule",
            "the cluster has no PrometheusRules; install the",
        ),
    ],
)
def test_a_cluster_without_the_resources_stops_it(chart: Path, values: Values, missing: str, sentence: str) -> None:
    cluster = [flag for flag in CLUSTER if not flag.endswith(missing)]
    assert len(cluster) == len(CLUSTER) - 1
    with pytest.raises(ValueError, match=sentence):
        render_text(chart, merged(NEEDED, values), cluster=cluster)
    assert render_text(chart, merged(NEEDED, values, {"checkCrds": False}), cluster=cluster)


def test_a_chart_without_its_files_stops(tmp_path: Path) -> None:
    chart = copy_chart(tmp_path)
    (chart / "files" / "alerts.yaml").unlink()
    with pytest.raises(ValueError, match=re.escape("the chart holds no files/alerts.yaml")):
        render_text(chart, merged(NEEDED, {"metrics": {"alerts": {"enabled": True}}}))
    shutil.rmtree(chart / "argo" / "templates")
    with pytest.raises(ValueError, match="the chart holds no argo/templates; package it from a checkout"):
        render_text(chart, NEEDED)


WRONG = [
    ({"image": {}}, "additional properties 'image' not allowed"),
    ({"networkPolicy": {"enable": True}}, "additional properties 'enable' not allowed"),
    ({"gpu": {"count": "two"}}, "at '/gpu/count': got string, want integer"),
    ({"gpu": {"count": -1}}, "at '/gpu/count': minimum: got -1, want 0"),
    ({"images": {"pullPolicy": "Sometimes"}}, "at '/images/pullPolicy': value must be one of 'Always'"),
    ({"images": {"light": {"digest": "latest"}}}, "at '/images/light/digest': 'latest' does not match pattern"),
    ({"images": {"pullSecrets": ["name"]}}, "at '/images/pullSecrets/0': got string, want object"),
    ({"s3": {"endpoint": "s3.example"}}, "at '/s3/endpoint': 's3.example' does not match pattern"),
    ({"resources": {"train": {}}}, "additional properties 'train' not allowed"),
    ({"resources": {"learn": {"limits": {"memory": "64 GB"}}}}, "'64 GB' does not match pattern"),
    ({"podLabels": {"team": "ours & theirs"}}, "'ours & theirs' does not match pattern"),
    ({"workflow": {"parallelism": 0}}, "at '/workflow/parallelism': minimum: got 0, want 1"),
    ({"schedule": {"cron": "monthly"}}, "at '/schedule/cron': 'monthly' does not match pattern"),
    ({"networkPolicy": {"s3": {"to": [{"cidr": "10.0.0.0/8"}]}}}, "additional properties 'cidr' not allowed"),
    ({"networkPolicy": {"api": {"ports": [0]}}}, "at '/networkPolicy/api/ports/0': minimum: got 0, want 1"),
    ({"extraEnv": [{"name": "a-b", "value": "c"}]}, "'a-b' does not match pattern"),
    ({"extraEnv": [{"name": "A", "value": 1}]}, "at '/extraEnv/0/value': got number, want string"),
]


@pytest.mark.parametrize(("values", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_schema_refuses(chart: Path, values: Values, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        render_text(chart, merged(NEEDED, values))


def test_schema_knows_every_value_and_no_other() -> None:
    """Strict at every level, a sentence at every value, and resources for exactly the pods there are."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    (defaults,) = load((CHART / "values.yaml").read_text())

    def compare(node: Object, values: Any, path: str) -> None:
        if path.removeprefix(".") in DOCUMENTED:
            assert node["description"] == DOCUMENTED[path.removeprefix(".")].sentence
            return
        assert isinstance(values, dict), f"{path} has no sentence"
        assert node["additionalProperties"] is False
        assert node["properties"].keys() - {"global"} == values.keys()
        for key, value in values.items():
            compare(node["properties"][key], value, f"{path}.{key}")

    compare(schema, defaults, "")
    pods = {path.stem.removeprefix("rpl-") for path in (ROOT / "argo" / "templates").glob("*.yaml")} - {"run"}
    assert schema["properties"]["resources"]["properties"].keys() == pods


def test_tables_and_descriptions_are_fresh() -> None:
    for path, text in values_table.written().items():
        assert path.read_text() == text, f"{path.name} is stale; run make chart"


def test_values_can_be_read_in_one_sitting() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    assert len(lines) <= 180
    assert max(map(len, lines)) <= 120


# Where pods may go


S3 = Peer(namespace="storage", labels={"app": "s3"})
DNS = Peer(namespace="kube-system", labels={"k8s-app": "kube-dns"})
GATEWAY_POD = Peer(namespace="monitoring", labels={"app": "pushgateway"})
NEIGHBOUR = Peer(namespace="sourcing", labels={"app": "web"})


def to(address: str) -> Peer:
    return Peer(address=address)


ROUTES = [
    # values, component, peer, port, may it
    ("everything", "download", to("93.184.216.34"), 443, True),
    ("everything", "download", to("93.184.216.34"), 80, True),
    ("everything", "download", to("93.184.216.34"), 22, False),
    ("everything", "download", to("2606:2800:220:1::1"), 443, True),
    ("everything", "download", to("10.0.0.1"), 80, False),
    ("everything", "download", to("172.16.5.5"), 443, False),
    ("everything", "download", to("192.168.1.1"), 80, False),
    ("everything", "download", to("100.100.100.200"), 80, False),
    ("everything", "download", to("169.254.169.254"), 80, False),
    ("everything", "download", to("168.63.129.16"), 80, False),
    ("everything", "download", to("127.0.0.1"), 80, False),
    ("everything", "download", to("0.0.0.0"), 80, False),
    ("everything", "download", to("224.0.0.1"), 80, False),
    ("everything", "download", to("255.255.255.255"), 80, False),
    ("everything", "download", to("::1"), 80, False),
    ("everything", "download", to("fd00:ec2::254"), 80, False),
    ("everything", "download", to("fe80::1"), 80, False),
    ("everything", "download", to("64:ff9b::a00:1"), 80, False),  # 10.0.0.1 by NAT64
    ("everything", "download", to("2002:a00:1::"), 80, False),  # and by 6to4
    ("everything", "download", to("2001:db8::1"), 80, False),
    ("everything", "download", to("::ffff:10.0.0.1"), 80, False),
    ("everything", "download", NEIGHBOUR, 80, False),
    ("everything", "download", S3, 8333, True),
    ("everything", "learn", S3, 8333, True),
    ("everything", "learn", S3, 80, False),
    ("everything", "learn", Peer(namespace="storage", labels={"app": "database"}), 8333, False),
    ("everything", "learn", Peer(namespace="elsewhere", labels={"app": "s3"}), 8333, False),
    ("everything", "learn", to("93.184.216.34"), 443, False),
    ("everything", "encode", to("2606:2800:220:1::1"), 443, False),
    ("everything", "report", GATEWAY_POD, 9091, True),
    ("everything", "report", GATEWAY_POD, 9090, False),
    ("everything", "report", to("172.18.0.2"), 6443, True),  # the API
    ("everything", "report", to("172.18.0.2"), 22, False),
    ("everything", "report", to("172.18.0.3"), 6443, False),
    ("everything", "crop", DNS, 53, True),
    ("everything", "crop", to("169.254.20.10"), 53, True),  # the node's DNS
    ("everything", "crop", to("8.8.8.8"), 53, False),
    ("everything", "start", to("192.0.2.7"), 3128, True),  # by extraEgress
    ("everything", "test", S3, 8333, True),
    ("aws", "download", to("93.184.216.34"), 80, True),
    ("aws", "download", to("169.254.169.254"), 80, False),
    ("aws", "learn", to("52.218.0.1"), 443, True),  # S3 is public: nothing tells it from the web
    ("aws", "learn", to("52.218.0.1"), 80, False),
    ("aws", "learn", to("10.20.3.4"), 443, True),  # the API
    ("aws", "learn", to("10.30.0.1"), 443, False),
    ("aws", "learn", to("169.254.169.254"), 443, False),
    ("aws", "learn", S3, 443, False),
    ("local", "learn", NEIGHBOUR, 80, True),  # no policies there
]


@pytest.mark.parametrize(("name", "component", "peer", "port", "may"), ROUTES)
def test_route(chart: Path, name: str, component: str, peer: Peer, port: int, may: bool) -> None:
    objects = render(chart, case(name))
    labels = RPL | {"app.kubernetes.io/component": component}
    assert reaches(objects, labels, peer, port) is may


def test_names_are_asked_by_udp_too(chart: Path) -> None:
    objects = render(chart, case("everything"))
    assert reaches(objects, RPL, DNS, 53, "UDP")
    assert not reaches(objects, RPL, S3, 8333, "UDP")


def test_policies_take_in_the_pods_that_there_are(chart: Path) -> None:
    """By the labels that pods really have: all are closed, only download reaches the web, others are untouched."""
    objects = render(chart, case("everything"))
    web = to("93.184.216.34")
    for pod in pods(objects):
        labels = pod["metadata"]["labels"]
        assert not is_reached(objects, labels)
        assert reaches(objects, labels, web, 443) is (labels["app.kubernetes.io/component"] == "download")
    assert is_reached(objects, {"app": "web"})
    assert reaches(objects, {"app": "web"}, web, 443)


def test_policy_and_downloader_refuse_the_same_addresses(chart: Path) -> None:
    (rule,) = at("NetworkPolicy", "rpl-download", "spec", "egress")(render(chart, CLOSED, NEEDED))
    blocks = [peer["ipBlock"] for peer in rule["to"]]
    assert [block["cidr"] for block in blocks] == ["0.0.0.0/0", str(connections._PUBLIC_IPV6)]
    assert sorted(each for block in blocks for each in block["except"]) == sorted(map(str, connections._FORBIDDEN))


# What a person meets


def test_notes(chart: Path, tmp_path: Path) -> None:
    noted = Path(shutil.copytree(chart, tmp_path / "rpl"))
    (noted / "templates" / "seen.yaml").write_text('notes: {{ include "rpl/templates/NOTES.txt" . | quote }}\n')

    def notes(values: Values) -> str:
        done = load(render_text(noted, merged(NEEDED, values), "--show-only=templates/seen.yaml"))
        return str(done[0]["notes"])

    plain = notes({})
    assert "argo submit -n sourcing --from workflowtemplate/rpl-run -p run=first -p config=s3://BUCKET/" in plain
    assert "rpl fetch s3://bucket/runs/first results" in plain
    assert "kubectl create secret generic rpl-s3 -n sourcing" in plain
    assert "pod-security.kubernetes.io/enforce=restricted" in plain
    assert "cronwf" not in plain
    other = notes(merged(SCHEDULED, {"s3": {"existingSecret": ""}, "config": "s3://b/c.yaml"}))
    assert "argo submit -n sourcing --from cronwf/rpl-again" in other
    assert "create secret" not in other
    assert "-p config" not in other


def test_helm_test_asks_the_store(chart: Path, store_uri: str) -> None:
    """The program of the test's pod, run here against a real store."""
    done = run_store_test(chart, store_uri)
    assert done.stdout == f"{store_uri} answers, and keeps the first of two puts.\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_helm_test_tells_what_is_wrong(chart: Path, s3: object) -> None:
    done = run_store_test(chart, "s3://no-such-bucket/runs")
    assert done.returncode == 1
    assert "no-such-bucket" in done.stderr
    assert "Traceback" not in done.stderr


def run_store_test(chart: Path, uri: str) -> subprocess.CompletedProcess[str]:
    pod = named(render(chart, NEEDED), "Pod", "rpl-test-store")
    assert pod is not None
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["python"]
    *args, given = container["args"]
    assert given == "s3://bucket/runs"
    command = [sys.executable, *args, uri]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
