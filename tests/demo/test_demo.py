"""The demo as `make demo` runs it, on a world of few pictures: what it leaves, and what its report says of the web."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pycocotools.coco import COCO

from rpl.demo.run import BUCKET, run_demo
from rpl.demo.s3 import S3Server
from rpl.demo.world_files import TINY
from rpl.errors import BadInput
from rpl.manifests import Shard
from rpl.reasons import Reason
from rpl.rounds import Node
from rpl.stage import Run

REASON_OF_KIND = {
    "not_found": Reason.NOT_FOUND,
    "redirect_private": Reason.PRIVATE_ADDRESS,
    "hang": Reason.TIMED_OUT,
    "truncated": Reason.DAMAGED_IMAGE,
    "html": Reason.NOT_AN_IMAGE,
    "bomb": Reason.TOO_MANY_PIXELS,
    "wrong_type": Reason.WRONG_TYPE,
    "noai": Reason.OPTED_OUT,
}
"""What must become of an address whose server was told to misbehave so; other kinds give a picture in the end."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with `.demo` and `demo-output` after a run on the tiny world."""
    folder = tmp_path_factory.mktemp("demo")
    before = dict(os.environ)
    run_demo(folder / ".demo", folder / "demo-output", fresh=False, scale=TINY)
    yield folder
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def summary(demo: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((demo / "demo-output/summary.json").read_text())
    return loaded


@pytest.mark.xdist_group("demo")
class TestDemo:
    def test_summary(self, summary: dict[str, Any]) -> None:
        assert [entry["round"] for entry in summary["rounds"]] == [1, 2]
        for entry in summary["rounds"]:
            for prompt in ("manual", "learned", "best_manual", "ensemble"):
                for split in ("base", "novel"):
                    assert 0 <= entry["accuracy"][prompt][split] <= 1
            assert 0 <= entry["retrieval_precision"] <= 1
            assert entry["yield"]["kept"] > 0
            assert set(entry["seconds"]) == {"learn", "embed", "retrieve", "download", "encode", "curate"}
        assert summary["novel"]["best_round"] in (1, 2)

    def test_export(self, demo: Path) -> None:
        export = demo / "demo-output/export"
        categories = json.loads((export / "categories.json").read_text())
        embeddings = torch.load(export / "category_embeddings.pt", weights_only=True)
        assert embeddings.shape[0] == len(categories)
        assert embeddings.dtype in (torch.float16, torch.float32)
        norms = np.linalg.norm(embeddings.float().numpy(), axis=1)
        assert not np.allclose(norms, 1, atol=0.02), "unnormalised, as PromptDet's detector expects"
        assert {category["split"] for category in categories} == {"base", "novel"}
        assert all(category["name"] and category["description"] for category in categories)
        coco = COCO(str(export / "sourced_novel.json"))
        names = {image["file_name"] for image in coco.imgs.values()}
        assert names == {file.name for file in (export / "images").iterdir()}
        record = pq.read_table(export / "sourced.parquet").to_pylist()
        assert {f"{row['key']}.jpg" for row in record if row["status"] == "kept"} == names

    def test_refusals_are_what_the_server_was_told_to_do(self, demo: Path, summary: dict[str, Any]) -> None:
        routes = json.loads((demo / ".demo/world/web/routes.json").read_text())
        seen: Counter[str] = Counter()
        with S3Server(demo / ".demo/s3", bucket=BUCKET) as s3:
            os.environ.update(s3.environment())
            run = Run(f"s3://{BUCKET}/runs/demo")
            passes = [(1, summary["rounds"][0]), (2, summary["rounds"][1]), ("novel", summary["novel"])]
            for round_, entry in passes:
                manifest = run.manifest(Node("curate", round_), Shard())  # type: ignore[arg-type]
                assert manifest is not None
                rows = pq.read_table(run.local(manifest.files["sourced.parquet"])).to_pylist()
                kinds = {row["url"]: routes[row["url"]]["kind"] for row in rows if row["status"] != "not_needed"}
                seen.update(kinds.values())
                told = Counter(REASON_OF_KIND[kind].value for kind in kinds.values() if kind in REASON_OF_KIND)
                on_the_way = {r.value for r in Reason if r.stage in ("fetch", "picture")}
                counted = {reason: n for reason, n in entry["refusals"].items() if reason in on_the_way}
                assert counted == dict(told), f"pass {round_}"
                kept = {kinds[row["url"]] for row in rows if row["status"] == "kept"}
                assert kept <= {"ok", "flaky", "redirect", "placeholder"}
            run.close()
        assert {"ok", "not_found", "flaky"} <= set(seen), "the world is too small to try these"

    def test_the_report_tells_them(self, demo: Path, summary: dict[str, Any]) -> None:
        page = html.unescape((demo / "demo-output/report/index.html").read_text())
        assert "OpenMoji" in page
        for entry in summary["rounds"]:
            for reason in entry["refusals"]:
                assert Reason(reason).sentence.split(" (")[0] in page

    def test_a_second_call_finds_everything_done(self, demo: Path) -> None:
        code = (
            "import sys; from pathlib import Path; "
            "from rpl.demo.run import run_demo; from rpl.demo.world_files import TINY; "
            "run_demo(Path(sys.argv[1]), Path(sys.argv[2]), fresh=False, scale=TINY); assert 'torch' not in sys.modules"
        )
        command = [sys.executable, "-c", code, str(demo / ".demo"), str(demo / "demo-output")]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        lines = [line for line in result.stderr.splitlines() if " rows " in line]
        assert len(lines) == 3 + 6 + 6 + 5 + 2
        assert all("already done" in line for line in lines)
        assert "Report: " in result.stdout


def test_a_folder_that_is_somebody_s_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BadInput) as caught:
        run_demo(tmp_path, tmp_path / "out", fresh=True, scale=TINY)
    assert str(caught.value) == (f"{tmp_path}: holds files that the demo did not make; choose another --directory.")
    assert (tmp_path / "thesis.tex").exists()
