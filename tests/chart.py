"""The chart as the tests see it: rendered to objects, its pods as Argo would make them, its network policies asked.

Knows nothing of what is right; that is in `test_chart.py`.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm" / "rpl"

Object = dict[str, Any]

NEEDED = {"images": {"registry": "ghcr.io/owner"}, "s3": {"runs": "s3://bucket/runs"}}
"""The values without which nothing renders."""

CLUSTER = (
    "--kube-version=1.34.0",
    "--api-versions=argoproj.io/v1alpha1/WorkflowTemplate",
    "--api-versions=monitoring.coreos.com/v1/ServiceMonitor",
    "--api-versions=monitoring.coreos.com/v1/PrometheusRule",
)
"""What helm would learn from a cluster that has everything."""


def load(text: str) -> list[Any]:
    """The documents of a YAML text, read as Kubernetes does (YAML 1.1) and, where it can be, by the parser in C."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [document for document in yaml.load_all(text, loader) if document is not None]


def copy_chart(folder: Path) -> Path:
    """The chart in `folder`, its link to argo/ followed."""
    return Path(shutil.copytree(CHART, folder / "rpl"))


def helm(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["helm", *map(str, args)], capture_output=True, text=True, check=False)


def merged(*values: Mapping[str, Any]) -> dict[str, Any]:
    """Values laid over each other as helm does it."""
    result: dict[str, Any] = {}
    for each in values:
        for key, value in each.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def render_text(chart: Path, values: Mapping[str, Any], *flags: str, cluster: Sequence[str] = CLUSTER) -> str:
    """Standard output of `helm template`.

    Raises:
        ValueError: helm refuses; the text is what it says.
    """
    command = ["helm", "template", "rpl", str(chart), "--namespace=sourcing", "--values=-", *cluster, *flags]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr)
    return done.stdout


@functools.lru_cache(maxsize=128)
def _render(chart: Path, values: str) -> list[Object]:
    return load(render_text(chart, json.loads(values)))


def render(chart: Path, *values: Mapping[str, Any]) -> list[Object]:
    """The objects of the chart with these values; not to be changed."""
    return _render(chart, json.dumps(merged(*values)))


def named(objects: list[Object], kind: str, name: str) -> Object | None:
    found = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    assert len(found) <= 1, f"{kind} {name} twice"
    return found[0] if found else None


def templates(objects: list[Object]) -> dict[str, Object]:
    """Argo templates that make a pod, by name."""
    return {
        template["name"]: template
        for each in objects
        if each["kind"] == "WorkflowTemplate"
        for template in each["spec"]["templates"]
        if "container" in template
    }


def pod_of(template: Object, parameters: Mapping[str, str]) -> Object:
    """The pod that Argo makes of a template, with its own containers `init` and `wait` and the template's patch.

    `parameters` are those of the workflow. What a pod's validity does not depend on is left out.
    """
    patch = template["podSpecPatch"]
    for name, value in parameters.items():
        patch = patch.replace(f"{{{{workflow.parameters.{name}}}}}", value)
    (patched,) = load(patch)
    main = {"name": "main", **template["container"]}
    spec = {
        "restartPolicy": "Never",
        "volumes": template["volumes"],
        "securityContext": template["securityContext"],
        "serviceAccountName": template["serviceAccountName"],
        "automountServiceAccountToken": template["automountServiceAccountToken"],
        "initContainers": [{"name": "init", "image": "argoexec"}],
        "containers": [main, {"name": "wait", "image": "argoexec"}],
    }
    for key in ("nodeSelector", "tolerations", "affinity", "priorityClassName"):
        if key in template:
            spec[key] = template[key]
    for key, value in patched.items():
        if key.lower().endswith("containers"):
            theirs = {container["name"]: container for container in value}
            assert set(theirs) <= {container["name"] for container in spec[key]}
            spec[key] = [merged(container, theirs.get(container["name"], {})) for container in spec[key]]
        else:
            spec[key] = value
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}, "spec": spec}


def pods(objects: list[Object]) -> Iterator[Object]:
    """Every pod that comes of the chart."""
    config = named(objects, "ConfigMap", "rpl")
    assert config is not None
    yield from (each for each in objects if each["kind"] == "Pod")
    yield from (pod_of(template, config["data"]) for template in templates(objects).values())


@dataclass(frozen=True)
class Peer:
    """The other end of a connection: an address outside the cluster, or a pod in a namespace."""

    address: str = ""
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def reaches(objects: list[Object], labels: Mapping[str, str], peer: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether the NetworkPolicies let a pod of these labels open a connection to `peer`.

    The rules of Kubernetes: a pod that no policy of egress selects may go anywhere; else one rule must allow it, and
    an absent `to` or `ports` allows all. Selectors match pods alone, blocks match addresses alone.
    """
    policies = _selecting(objects, labels, "Egress")
    rules = [rule for policy in policies for rule in policy["spec"].get("egress") or []]
    return not policies or any(
        (not rule.get("to") or any(_is_peer(each, peer, "sourcing") for each in rule["to"]))
        and (not rule.get("ports") or any(_is_port(each, port, protocol) for each in rule["ports"]))
        for rule in rules
    )


def is_reached(objects: list[Object], labels: Mapping[str, str]) -> bool:
    """Whether anything at all may connect to a pod of these labels."""
    policies = _selecting(objects, labels, "Ingress")
    return not policies or any(policy["spec"].get("ingress") for policy in policies)


def _selecting(objects: list[Object], labels: Mapping[str, str], direction: str) -> list[Object]:
    return [
        each
        for each in objects
        if each["kind"] == "NetworkPolicy"
        and direction in each["spec"]["policyTypes"]
        and _selects(each["spec"]["podSelector"], labels)
    ]


def _selects(selector: Object, labels: Mapping[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "the evaluator knows matchLabels alone"
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())


def _is_peer(rule: Object, peer: Peer, home: str) -> bool:
    if "ipBlock" in rule:
        assert set(rule) == {"ipBlock"}, "Kubernetes allows no selector beside ipBlock"
        return bool(peer.address) and _is_inside(rule["ipBlock"], ipaddress.ip_address(peer.address))
    if not peer.namespace:
        return False
    if "namespaceSelector" in rule:
        is_there = _selects(rule["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace})
    else:
        is_there = peer.namespace == home
    return is_there and _selects(rule.get("podSelector", {}), peer.labels)


def _is_inside(block: Object, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """In the block and in none of its exceptions, each of which must lie in the block, as Kubernetes demands."""
    network = ipaddress.ip_network(block["cidr"])
    exceptions = [ipaddress.ip_network(each) for each in block.get("except", [])]
    assert all(each.subnet_of(network) for each in exceptions)  # type: ignore[arg-type]
    return address in network and not any(address in each for each in exceptions)


def _is_port(rule: Object, port: int, protocol: str) -> bool:
    first, last = int(rule["port"]), int(rule.get("endPort", rule["port"]))
    return rule.get("protocol", "TCP") == protocol and first <= port <= last
