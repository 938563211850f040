"""What `make local` does before there is a cluster; the cluster itself is tried in tests/e2e."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rpl.demo.cluster import CHART, LOCAL, TARGETS, WEB_ADDRESS, Settings, described
from rpl.demo.programs import PROGRAMS, check_programs, run
from rpl.errors import BadInput, TryAgain


def test_every_missing_program_is_named_with_its_source(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "rpl.demo.cluster", "up"], env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("Error: missing: docker (https://")
    assert all(f"{name} ({source})" in result.stderr for name, source in PROGRAMS.items())


def test_a_docker_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROGRAMS:
        program = tmp_path / name
        program.write_text("#!/bin/sh\nexit 1\n", encoding="ascii")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(BadInput, match="docker does not answer; start it, or give this user access to it"):
        check_programs(str(tmp_path / "docker"))


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (field.name for field in fields(Settings)):
        monkeypatch.delenv(f"RPL_{name.upper()}", raising=False)
    assert Settings.from_environment() == Settings()
    monkeypatch.setenv("RPL_CLUSTER", "other")
    monkeypatch.setenv("RPL_KIND_NODE", "")
    assert Settings.from_environment() == Settings(cluster="other")
    assert Settings.from_environment().context == "kind-other"


def test_a_program_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(TryAgain) as caught:
        run("sh", "-c", "echo lost >&2; exit 3", quiet=True)
    assert str(caught.value) == "`sh -c echo lost >&2; exit 3 …` failed (3):\nlost"


def test_pods_are_named_as_a_run_names_them() -> None:
    def node(stage: str, **inputs: str) -> dict[str, object]:
        parameters = [{"name": name, "value": value} for name, value in inputs.items()]
        return {"templateRef": {"name": f"rpl-{stage}"}, "inputs": {"parameters": parameters}}

    assert described(node("encode", round="1", shard="0/2")) == "encode 1 0/2"
    assert described(node("encode", round="once", shard="0/2")) == "encode 0/2"
    assert described({"templateRef": {"name": "rpl-index"}}) == "index"


def test_the_services_use_the_images_that_are_built_and_nothing_without_bounds() -> None:
    text = (LOCAL / "services.yaml").read_text(encoding="utf-8")
    names = {*(f"image-{target}" for target in (*TARGETS, "web")), "web-address", "s3-options"}
    items = YAML(typ="safe", pure=True).load(text)["items"]
    used = {word.partition(")")[0] for word in text.split("$(")[1:]}
    assert used <= names
    for each in items:
        if each["kind"] == "Deployment":
            pod = each["spec"]["template"]["spec"]
            assert pod["automountServiceAccountToken"] is False
            assert pod["securityContext"]["runAsNonRoot"] is True
            for container in pod["containers"]:
                assert container["resources"]["limits"]["memory"]
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert WEB_ADDRESS.startswith("10.96."), "inside kind's range of service addresses"
    assert (CHART / "ci" / "local-values.yaml").is_file()
