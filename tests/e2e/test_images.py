"""The images, run by docker as somebody might: no network, nothing writable, any user."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

import pytest

from rpl.demo.cluster import Cluster

SAFE = ["--network", "none", "--read-only", "--user", "12345:0", "--cap-drop", "ALL"]

EXPLAIN = """
from importlib import import_module
from click.testing import CliRunner
for stage in STAGES:
    assert CliRunner().invoke(import_module(f"jobs.{stage}").main, ["--help"]).exit_code == 0, stage
    import_module(f"rpl.stages.{stage}")
"""


@pytest.fixture(scope="module", params=["light", "clip"])
def image(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    return cluster.build_images()[request.param]  # at once: they were built for the cluster


def docker(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [cluster.settings.docker, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def described(cluster: Cluster, image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker(cluster, "image", "inspect", image).stdout)[0]["Config"]
    return found


def test_an_image_explains_itself(cluster: Cluster, image: str) -> None:
    said = docker(cluster, "run", "--rm", *SAFE, image, "--help")
    assert said.returncode == 0, said.stderr
    assert "Source training images by learned prompts" in said.stdout


def test_every_stage_of_an_image_explains_itself(cluster: Cluster, image: str) -> None:
    stages = ["learn", "embed", "encode"] if "clip" in image else ["crop", "index", "retrieve", "download", "curate"]
    code = EXPLAIN.replace("STAGES", str(stages))
    said = docker(cluster, "run", "--rm", *SAFE, "--tmpfs", "/tmp", "--entrypoint", "python", image, "-c", code)
    assert said.returncode == 0, said.stderr


def test_light_carries_no_torch_and_none_carries_pip_or_a_compiler(cluster: Cluster, image: str) -> None:
    code = (
        "import importlib.util as u, shutil; "
        "print([m for m in ('torch', 'img2dataset') if u.find_spec(m)], shutil.which('gcc'))"
    )
    said = docker(cluster, "run", "--rm", *SAFE, "--entrypoint", "python", image, "-c", code)
    assert said.stdout.strip() == ("['torch'] None" if "clip" in image else "['img2dataset'] None"), said.stderr
    assert docker(cluster, "run", "--rm", *SAFE, "--entrypoint", "ls", image, "/opt/rpl/bin/pip").returncode != 0
    caches = docker(cluster, "run", "--rm", *SAFE, "--entrypoint", "ls", image, "-A", "/tmp", "/root/.cache")
    assert "pip" not in caches.stdout


def test_labels_and_user(cluster: Cluster, image: str) -> None:
    config = described(cluster, image)
    assert config["User"] == "10001:10001"
    for name in ("title", "description", "version", "revision", "licenses"):
        assert config["Labels"][f"org.opencontainers.image.{name}"]


def test_sigterm_reaches_python_as_process_one(cluster: Cluster, image: str) -> None:
    code = "import jobs.common as c, time; c.guarded(lambda: (print('up', flush=True), time.sleep(60)))"
    name = f"rpl-sigterm-{'clip' if 'clip' in image else 'light'}"
    docker(cluster, "rm", "-f", name)
    docker(cluster, "run", "-d", "--name", name, *SAFE, "--entrypoint", "python", image, "-c", code)
    try:
        for _ in range(50):
            if "up" in docker(cluster, "logs", name).stdout:
                break
            time.sleep(0.2)
        began = time.monotonic()
        docker(cluster, "stop", "-t", "20", name)
        assert time.monotonic() - began < 10
        state = json.loads(docker(cluster, "inspect", name).stdout)[0]["State"]
        assert state["ExitCode"] == 75
        assert "Stopped by SIGTERM" in docker(cluster, "logs", name).stderr
    finally:
        docker(cluster, "rm", "-f", name)


def test_an_edited_line_is_a_small_layer(cluster: Cluster, image: str) -> None:
    """The libraries' layers come before the source's, so that they stay when it changes."""
    history = docker(cluster, "history", "--format", "{{.CreatedBy}}\t{{.Size}}", image).stdout.splitlines()
    copies = [line.split("\t") for line in history if "COPY" in line]
    assert "/app" in copies[0][0], "the source is the last layer"
    assert copies[0][1].endswith("kB") or float(copies[0][1].removesuffix("MB")) < 10
    assert "/opt/rpl" in copies[1][0]
