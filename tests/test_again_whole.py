"""Sourcing again from end to end, on the demo's smallest world: real stages, a real S3 server, a web that has changed.

The web counts what it is asked; that count, not the run's own, says that judged addresses were left alone.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpl.demo.run import demo_config
from rpl.demo.s3 import S3Server
from rpl.demo.server import KINDS, Exchange, WebServer, _key
from rpl.demo.world import build_world
from rpl.demo.world_files import HOSTS, TINY
from rpl.local import create_run, run_all, status
from rpl.manifests import Manifest
from rpl.results import fetch_results
from rpl.rounds import Node, Round
from rpl.stage import Run
from tests.fake_stages import QUIET
from tests.test_download import jpeg

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420), pytest.mark.xdist_group("again")]

PASSES: tuple[Round, ...] = (1, 2, "novel")


@dataclass
class ChangingWeb:
    """Kinds for the server: pages that have died since, and dead ones that show a picture now."""

    dead: set[tuple[str, str]] = field(default_factory=set)
    risen: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def ok(self, exchange: Exchange) -> None:
        is_dead = (exchange.request.host, exchange.request.target) in self.dead
        KINDS["not_found" if is_dead else "ok"](exchange)

    def not_found(self, exchange: Exchange) -> None:
        picture = self.risen.get((exchange.request.host, exchange.request.target))
        if picture is None:
            KINDS["not_found"](exchange)
        else:
            exchange.reply(200, picture, {"Content-Type": "image/jpeg"})


@dataclass
class Scene:
    """Two runs, the second `again` after the first, and what happened in between."""

    old: str
    new: str
    killed: set[str]
    revived: str
    status_then: dict[str, str]
    """The first run's last verdict on each address that it judged."""
    asked: set[tuple[str, str]]
    """Host and target of what the web was asked during the second run."""
    log: str
    rerun: subprocess.CompletedProcess[str]
    asked_by_rerun: int


def read(run: Run, manifest: Manifest, name: str) -> pa.Table:
    return pq.read_table(run.local(manifest.files[name]))


def novel_record(run: Run) -> list[dict[str, Any]]:
    (manifest,) = run.manifests(Node("curate", "novel")) or []
    rows: list[dict[str, Any]] = read(run, manifest, "sourced.parquet").to_pylist()
    return rows


def kept(run: Run) -> set[str]:
    return {row["url"] for row in novel_record(run) if row["status"] == "kept"}


def again(old: str, new: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", "again", old, new]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("again")
    world = folder / "world"
    build_world(world, seed=0, scale=TINY)
    web = ChangingWeb()
    kinds = {"ok": web.ok, "not_found": web.not_found}
    with pytest.MonkeyPatch.context() as patch, WebServer(world / "web", kinds=kinds) as server:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        root = f"s3://{s3_server.bucket}/{folder.name}"
        config = demo_config(world, f"{root}/pets", dict.fromkeys(HOSTS, server.address))
        settings = config.model_dump()
        # All candidates are looked at and all good ones kept, so that whatever comes to life is seen.
        settings["rounds"] |= {"kept": {"base": 60, "novel": 90}}
        settings["shards"] = {"crop": 2, "download": 2}
        old = create_run(type(config).model_validate(settings))
        run_all(old, QUIET)

        status_then = {}
        for round_ in PASSES:
            for manifest in old.manifests(Node("download", round_)) or []:
                for row in read(old, manifest, "downloads.parquet").to_pylist():
                    if row["status"] != "not_needed":
                        status_then[row["url"]] = row["status"]
        lost = [row["url"] for row in novel_record(old) if row["reason"] == "not_found"]
        routes = json.loads((world / "web/routes.json").read_text())
        killed = set(sorted(url for url in kept(old) if routes[url]["kind"] == "ok")[:3])
        web.dead = {_key(url) for url in killed}
        web.risen = {_key(lost[0]): jpeg(12_345)}
        old.close()

        before = len(server.requests)
        done = again(old.uri, f"{root}/pets-2")
        assert done.returncode == 0, done.stderr
        asked = {(request.host, request.target) for request in list(server.requests)[before:]}
        before = len(server.requests)
        rerun = again(old.uri, f"{root}/pets-2")
        yield Scene(
            old.uri, f"{root}/pets-2", killed, lost[0], status_then, asked, done.stderr, rerun,
            len(server.requests) - before,
        )  # fmt: skip


@pytest.fixture
def new(scene: Scene) -> Iterator[Run]:
    run = Run(scene.new)
    yield run
    run.close()


def test_crops_vectors_and_index_are_copied(scene: Scene, new: Run) -> None:
    for stage in ("crop", "encode", "index"):
        manifests = new.manifests(Node(stage))
        assert manifests and all(manifest.adopted_from == scene.old for manifest in manifests)
    lines = [line.split() for line in scene.log.splitlines() if " rows" in line]
    outcome = {" ".join(line[: line.index("rows") - 1]): line[-1] for line in lines}
    adopted = {name for name, word in outcome.items() if word == "adopted"}
    assert adopted == {"crop 0-of-2", "crop 1-of-2", "encode 0-of-2", "encode 1-of-2", "index"}


def test_prompts_are_used_as_they_are(scene: Scene, new: Run) -> None:
    assert new.last_round() == 1
    (learned,) = new.manifests(Node("learn", 1)) or []
    assert learned.facts["steps"] == 0
    then, now = ((run.manifests(Node("embed", "novel")) or [])[0] for run in (Run(scene.old), new))
    assert now.files["category_embeddings.npy"].sha256 == then.files["category_embeddings.npy"].sha256
    assert now.facts["accuracy"] == then.facts["accuracy"]


def test_the_web_is_asked_for_what_had_failed_and_nothing_else(scene: Scene) -> None:
    failed = {_key(url) for url, word in scene.status_then.items() if word == "failed"}
    judged = {_key(url) for url, word in scene.status_then.items() if word != "failed"}
    assert scene.asked and len(judged) > 50
    assert not scene.asked & judged
    assert scene.asked <= failed
    assert _key(scene.revived) in scene.asked


def test_a_page_that_came_to_life_is_kept_and_a_killed_one_is_kept_from_before(scene: Scene, new: Run) -> None:
    old = Run(scene.old)
    assert kept(new) - kept(old) == {scene.revived}
    assert len(scene.killed) == 3 and scene.killed <= kept(new)
    at_then = {row["url"]: (row["fetched_at"], row["sha256"]) for row in novel_record(old) if row["status"] == "kept"}
    at_now = {row["url"]: (row["fetched_at"], row["sha256"]) for row in novel_record(new) if row["status"] == "kept"}
    assert {url: at_now[url] for url in scene.killed} == {url: at_then[url] for url in scene.killed}
    old.close()


def test_facts_say_how_many_were_reused(scene: Scene, new: Run) -> None:
    manifests = new.manifests(Node("download", "novel")) or []
    for manifest in manifests:
        facts = manifest.facts
        assert facts["reused"] + facts["asked_again"] == facts["urls"], "no candidate is new on an unchanged pool"
        urls = set(read(new, manifest, "downloads.parquet")["url"].to_pylist())
        assert facts["asked_again"] == sum(scene.status_then[url] == "failed" for url in urls)
        assert facts["revived"] == (scene.revived in urls)
    for manifest in Run(scene.old).manifests(Node("download", "novel")) or []:
        assert manifest.facts.keys() == {"urls", "ok", "by_reason"}


def test_report_and_summary_say_so(scene: Scene, new: Run, tmp_path: Path) -> None:
    summary = fetch_results(new, tmp_path / "results")
    since = summary["since"]
    assert since["run"] == scene.old
    assert since["then"]["accuracy"] == since["now"]["accuracy"] == summary["rounds"][0]["accuracy"]["learned"]
    assert since["then"]["retrieval_precision"] == since["now"]["retrieval_precision"] is not None
    assert since["pictures"]["new"] >= 1
    assert since["now"]["kept"] - since["then"]["kept"] == since["pictures"]["new"] - since["pictures"]["gone"]
    assert since["addresses"]["revived"] >= 1
    page = re.sub(r"\s+", " ", html.unescape((tmp_path / "results/report/index.html").read_text()))
    assert "<h2>Since the last run</h2>" in page
    new_pictures = since["pictures"]["new"]
    assert f"{new_pictures} new picture" in page
    assert f"{since['addresses']['reused']:,} stood without a request" in page


def test_a_second_call_finds_everything_done(scene: Scene) -> None:
    assert scene.rerun.returncode == 0, scene.rerun.stderr
    lines = [line for line in scene.rerun.stderr.splitlines() if " rows" in line]
    assert len(lines) == len([line for line in scene.log.splitlines() if " rows" in line]) > 15
    assert all(line.endswith("already done") for line in lines)
    assert scene.asked_by_rerun == 0
    assert scene.rerun.stdout == f"Done. To copy the results: rpl fetch {scene.new} DIR\n"


def test_the_new_run_outlives_the_old_one(scene: Scene, tmp_path: Path) -> None:
    """Last: it deletes the old run."""
    store = Run(scene.old).store
    store.delete([info.path for info in store.list()])
    new = Run(scene.new)
    assert all(row.done == row.shards for row in status(new))
    run_all(new, QUIET)
    for node in (Node("crop"), Node("encode"), Node("index"), Node("download", "novel")):
        for manifest in new.manifests(node) or []:
            for file in manifest.files.values():
                assert new.local(file).stat().st_size == file.size, "verified by its checksum on the way"
    assert fetch_results(new, tmp_path / "results")["since"]["run"] == scene.old
    new.close()
