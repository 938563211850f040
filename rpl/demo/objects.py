"""Small Kubernetes objects as JSON text, for `kubectl apply`."""

from __future__ import annotations

import json


def namespace(name: str, *, restricted: bool = False) -> str:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"} if restricted else {}
    return json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})


def service_account(name: str, where: str) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": where}})


def secret(name: str, where: str, data: dict[str, str]) -> str:
    return json.dumps(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": where}, "stringData": data}
    )


def config_map(name: str, where: str, data: dict[str, str]) -> str:
    return json.dumps(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": where}, "data": data}
    )
