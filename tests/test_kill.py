"""Real stages killed outright, again and again: what is left at the end is what an undisturbed run leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rpl.config import dump_config
from rpl.demo.run import demo_config
from rpl.demo.s3 import S3Server
from rpl.demo.server import WebServer
from rpl.demo.world import build_world
from rpl.demo.world_files import HOSTS, TINY
from rpl.local import walk
from rpl.results import fetch_results
from rpl.stage import Run

KILLS = 20
NOT_COMPARED = {"index.html", "summary.json"}
"""They hold the seconds that stages took; the summary is compared without them."""


def outputs(run: Run) -> dict[str, str]:
    """SHA-256 of every committed file by node, shard and name."""
    found = {}
    for node in walk(run):
        for shard in run.shards(node):
            manifest = run.manifest(node, shard)
            assert manifest is not None, f"{node} is not done"
            for name, file in manifest.files.items():
                if name not in NOT_COMPARED:
                    found[f"{node} {shard} {name}"] = file.sha256
    return found


def without_seconds(value: object) -> object:
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k not in ("seconds", "run")}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_run_killed_twenty_times_ends_like_one_that_was_left_alone(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_uri = f"s3://{s3.bucket}/killed"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1764000000")  # the only time in any output is fetched_at
    world = tmp_path / "world"
    build_world(world, seed=0, scale=TINY)
    with WebServer(world / "web") as web:
        resolve = dict.fromkeys(HOSTS, web.address)
        files = {}
        for name, uri in (("calm", str(tmp_path / "calm")), ("killed", s3_uri)):
            config = demo_config(world, uri, resolve)
            config = config.model_copy(update={"shards": config.shards.model_copy(update={"crop": 2, "download": 2})})
            files[name] = tmp_path / f"{name}.yaml"
            files[name].write_text(dump_config(config))

        def start(name: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "jobs.cli", "run", "--config", str(files[name])]
            with (tmp_path / f"{name}.log").open("ab") as log:
                return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

        began = time.monotonic()
        assert start("calm").wait(timeout=200) == 0, (tmp_path / "calm.log").read_text()
        undisturbed_s = time.monotonic() - began

        dice = random.Random(0)
        kills = 0
        while True:
            process = start("killed")
            try:
                # After enough kills it is left alone. Before that it never gets the time to finish.
                patience = None if kills >= KILLS else dice.uniform(0.05, 0.45) * undisturbed_s
                code = process.wait(timeout=patience or 200)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                continue
            assert code == 0, (tmp_path / "killed.log").read_text()
            if kills >= KILLS:
                break
            # It got through early: what it committed last goes, and it must make that again.
            _forget_last(Run(s3_uri))

    calm, killed = Run(str(tmp_path / "calm")), Run(s3_uri)
    assert outputs(killed) == outputs(calm)
    summaries = [fetch_results(run, tmp_path / f"results-{n}") for n, run in enumerate((calm, killed))]
    assert without_seconds(summaries[0]) == without_seconds(summaries[1])
    assert json.dumps(summaries[0])
    for run in (calm, killed):
        run.close()


def _forget_last(run: Run) -> None:
    """Remove the manifests of the second half of the run's nodes."""
    nodes = list(walk(run))
    doomed = [node.path + "/" for node in nodes[len(nodes) // 2 :]]
    paths = [info.path for info in run.store.list() if info.path.endswith(".json")]
    run.store.delete([p for p in paths if "/attempts/" not in p and any(p.startswith(d) for d in doomed)])
