"""Two Pushgateways: the real program where it is installed, and a small one in this process that can be told to fail.

The small one suffices for what we ask of a gateway: a PUT replaces a group whole, a DELETE removes it, the API lists
the groups in the real one's form (test_pushgateway.py runs the same tests on both). It also remembers every push.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest
import urllib3
from prometheus_client.parser import text_string_to_metric_families

PROGRAM = shutil.which("prometheus-pushgateway") or shutil.which("pushgateway")

Values = dict[str, float]
"""By metric, with labels as in `rpl_stage_exit{kind=done}`."""


class FakeGateway:
    """Listens on `url`; `status` and `delay_s` may be changed at any time; `pushes` has (path, values) of each PUT."""

    def __init__(self) -> None:
        self.status = 200
        self.delay_s = 0.0
        self.requests: list[str] = []
        self.pushes: list[tuple[str, Values]] = []
        self.bodies: list[str] = []
        self.groups: dict[str, tuple[float, Values]] = {}
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeGateway:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def age(self, run: str, seconds: float) -> None:
        """Let all groups of a run have been pushed so long ago."""
        for path, (_, values) in list(self.groups.items()):
            if grouping(path)["run"] == run:
                self.groups[path] = (time.time() - seconds, values)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                if self._accepted():
                    gateway.bodies.append(body)
                    gateway.pushes.append((self.path, values_of(body)))
                    gateway.groups[self.path] = (time.time(), values_of(body))
                    self._answer(200, b"")

            def do_DELETE(self) -> None:
                if self._accepted():
                    gateway.groups.pop(self.path, None)
                    self._answer(202, b"")

            def do_GET(self) -> None:
                if self._accepted():
                    listed = [listing(path, *group) for path, group in gateway.groups.items()]
                    self._answer(200, json.dumps({"status": "success", "data": listed}).encode())

            def _accepted(self) -> bool:
                gateway.requests.append(f"{self.command} {self.path}")
                gateway.released.wait(gateway.delay_s)
                if gateway.status != 200:
                    self._answer(gateway.status, b"it is\nbroken")
                return gateway.status == 200

            def _answer(self, status: int, body: bytes) -> None:
                with suppress(OSError):  # who has waited too long has hung up
                    self.send_response(status)
                    if status == 302:
                        self.send_header("Location", "/elsewhere")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def values_of(body: str) -> Values:
    """What an exposition in the text format says."""
    return {
        name(sample.name, sample.labels): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }


def name(metric: str, labels: dict[str, str]) -> str:
    inside = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
    return f"{metric}{{{inside}}}" if inside else metric


def grouping(path: str) -> dict[str, str]:
    """The grouping labels in the path of a push; `label@base64` where a value cannot stand in a path."""
    parts = path.removeprefix("/metrics/").split("/")
    found = {}
    for label, value in zip(parts[::2], parts[1::2], strict=True):
        if label.endswith("@base64"):
            found[label.removesuffix("@base64")] = base64.urlsafe_b64decode(value).decode()
        else:
            found[label] = unquote(value)
    return found


def listing(path: str, pushed: float, values: Values) -> dict[str, Any]:
    labels = grouping(path)
    listed: dict[str, Any] = {
        "labels": labels,
        "push_time_seconds": {"type": "GAUGE", "metrics": [{"labels": labels, "value": str(pushed)}]},
    }
    for full, value in values.items():
        metric, _, inside = full.rstrip("}").partition("{")
        own = dict(pair.split("=") for pair in inside.split(",") if pair)
        listed.setdefault(metric, {"type": "GAUGE", "metrics": []})
        listed[metric]["metrics"].append({"labels": labels | own, "value": str(value)})
    return listed


def held(url: str) -> dict[str, Values]:
    """What a gateway holds, asked through its API: values by group, named like `rpl/small/1/learn/0-of-1`."""
    data = urllib3.request("GET", f"{url}/api/v1/metrics", retries=False).json()["data"]
    found = {}
    for group in data:
        labels = group["labels"]
        path = "/".join(labels[key] for key in ("job", "run", "round", "stage", "shard") if key in labels)
        found[path] = {
            name(metric, {k: v for k, v in each["labels"].items() if k not in labels and k != "instance"}): float(
                each["value"]
            )
            for metric, family in group.items()
            if metric.startswith("rpl_")
            for each in family["metrics"]
        }
    return found


@contextmanager
def real_gateway() -> Iterator[str]:
    """The URL of a Pushgateway of its own; the test is skipped where the program is not installed."""
    if PROGRAM is None:
        pytest.skip("no Pushgateway is installed (Debian: prometheus-pushgateway)")
    # Debian's build keeps groups in a file unless told not to.
    command = [PROGRAM, "--web.listen-address=127.0.0.1:0", "--persistence.file="]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"address=(127\.0\.0\.1:\d+)", line):
                yield f"http://{found[1]}"
                break
        else:
            raise AssertionError(f"{PROGRAM} did not start")
    finally:
        process.terminate()
        process.wait(10)
        process.stderr.close()
