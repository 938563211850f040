"""The programs that make a cluster, called as commands: which must be there, and what is said when one fails."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from rpl.errors import BadInput, TryAgain

PROGRAMS = {
    "docker": "https://docs.docker.com/engine/install",
    "kind": "https://kind.sigs.k8s.io/docs/user/quick-start#installation",
    "kubectl": "https://kubernetes.io/docs/tasks/tools",
    "helm": "https://helm.sh/docs/intro/install",
    "argo": "https://github.com/argoproj/argo-workflows/releases/tag/v3.7.4",
}


def check_programs(docker: str) -> None:
    """Raises BadInput that names every missing program and how to get it."""
    missing = [name for name in PROGRAMS if shutil.which(docker if name == "docker" else name) is None]
    if missing:
        raise BadInput("missing: " + "; ".join(f"{name} ({PROGRAMS[name]})" for name in missing) + ".")
    if subprocess.run([docker, "info"], capture_output=True, check=False).returncode:
        raise BadInput("docker does not answer; start it, or give this user access to it.")


def run(
    *command: str, stdin: str | None = None, quiet: bool = False, cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> str:  # fmt: skip
    """Standard output of a program. `quiet`: its other lines are shown only if it fails.

    Raises:
        TryAgain: it failed; with the end of what it said.
    """
    result = subprocess.run(
        command, input=stdin, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **(env or {})},
    )  # fmt: skip
    if not quiet and result.stderr.strip():
        sys.stderr.write(result.stderr)
    if result.returncode:
        said = "\n".join((result.stderr.strip() or result.stdout.strip()).splitlines()[-15:])
        raise TryAgain(f"`{' '.join(command[:6])} …` failed ({result.returncode}):\n{said}")
    return result.stdout


def has_image(docker: str, image: str) -> bool:
    return subprocess.run([docker, "image", "inspect", image], capture_output=True, check=False).returncode == 0


def wait_for_port(port: int, process: subprocess.Popen[str]) -> None:
    for _ in range(100):
        if process.poll() is not None:
            raise TryAgain(f"kubectl port-forward ended: {process.stderr.read().strip() if process.stderr else ''}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TryAgain("kubectl port-forward did not open its port; try again.")
