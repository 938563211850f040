"""A run small enough to learn in a second: four categories, a tiny CLIP, stand-ins for the light stages.

The stand-ins write what crop, download and curate commit; those have tests of their own, and the whole chain is run in
test_kill.py. Encode, learn and embed are the real ones.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rpl.categories import Category, categories_to_json
from rpl.config import Learn
from rpl.images import encode_jpeg
from rpl.learning import Journal, Learned, OnStep, Step, Task, learn
from rpl.manifests import Manifest
from rpl.rounds import Node
from rpl.stage import Context, Run, run_shard
from rpl.tars import write_tar
from tests.clip_models import write_clip
from tests.fake_stages import QUIET, make_run
from tests.learning_tasks import torn_at

CATEGORIES = [
    Category(1, "cat", "a small animal", "base"),
    Category(2, "dog", "", "novel"),
    Category(3, "cup", "a vessel", "base"),
    Category(4, "tent", "a shelter", "base"),
]
COLOURS = ["red", "lime", "blue", "yellow"]
VIEWS = 2


def jpeg(colour: str, number: int) -> bytes:
    image = Image.new("RGB", (40, 30), colour)
    image.paste((number * 9 % 256, 0, 0), (0, 0, 12, 12))
    return encode_jpeg(image)


def crop(ctx: Context) -> None:
    """Twelve train crops of each base category and four val crops of each category, over the shards."""
    rows = [(split, category) for category in range(4) for split in ["train"] * 12 + ["val"] * 4]
    rows = [row for row in rows if row != ("train", 1)]
    mine = [(f"{n:024x}", *row) for n, row in enumerate(rows) if n % ctx.shard.count == ctx.shard.index]
    samples = [
        (key, {"jpg": jpeg(COLOURS[category], int(key, 16)), "json": b"{}"}) for key, _, category in mine
    ]  # fmt: skip
    write_tar(ctx.scratch / "crops.tar", samples)
    names = ("key", "split", "category")
    pq.write_table(
        pa.table(dict(zip(names, map(list, zip(*mine, strict=True)), strict=True))), ctx.scratch / "crops.parquet"
    )
    ctx.add(ctx.scratch / "crops.tar")
    ctx.add(ctx.scratch / "crops.parquet")
    ctx.write("categories.json", categories_to_json(CATEGORIES))


WEB = [("f0" * 12, 0, "kept"), ("f1" * 12, 2, "kept"), ("f2" * 12, 2, "refused"), ("f0" * 12, 3, "kept")]


def download(ctx: Context) -> None:
    if ctx.shard.index == 1:  # a shard without a picture
        rows: list[tuple[str, str]] = [("", "failed")]
    else:
        rows = [(key, "ok") for key, *_ in WEB]
    keys, status = zip(*rows, strict=True)
    pq.write_table(pa.table({"key": list(keys), "status": list(status)}), ctx.scratch / "downloads.parquet")
    found = sorted({key for key, state in rows if state == "ok"})
    write_tar(
        ctx.scratch / "images.tar", [(key, {"jpg": jpeg("white", n), "json": b"{}"}) for n, key in enumerate(found)]
    )
    ctx.add(ctx.scratch / "downloads.parquet")
    ctx.add(ctx.scratch / "images.tar")


def curate(ctx: Context) -> None:
    keys, categories, status = zip(*WEB, strict=True)
    table = pa.table({"key": list(keys), "category": pa.array(categories, pa.int32()), "status": list(status)})
    pq.write_table(table, ctx.scratch / "sourced.parquet")
    ctx.add(ctx.scratch / "sourced.parquet")


def nothing(ctx: Context) -> None:
    ctx.write("nothing", b"")


def install_light_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    light = {"crop": crop, "download": download, "curate": curate, "index": nothing, "retrieve": nothing}
    for stage, function in light.items():
        module = types.ModuleType(f"rpl.stages.{stage}")
        module.run = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"rpl.stages.{stage}", module)


def make_small_run(folder: Path, uri: str, **learn: object) -> Run:
    """A run of two rounds at `uri`, whose outside files lie in `folder`; `learn` are settings of that section."""
    clip = write_clip(folder / "clip").model_dump(mode="json")
    return make_run(
        folder, uri, clip={**clip, "views": VIEWS}, shards={"crop": 2, "download": 2},
        rounds={"max_rounds": 2}, learn={"max_iterations": 6, **learn}, runtime={"workers": 1},
        evaluate={"templates": ["a photo of {name}", "{name}, {description}."]},
    )  # fmt: skip


def tear_learning(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the stage's learning be torn away after so many steps, in this process; 0: never again."""

    def torn(task: Task, settings: Learn, seed: int, on_step: OnStep, journal: Journal) -> Learned:
        tears = torn_at(step)

        def both(each: Step) -> None:
            on_step(each)
            tears(each)

        return learn(task, settings, seed, both, journal)

    monkeypatch.setattr("rpl.stages.learn.learn", torn)


def do(run: Run, *stages: str, round_: Any = None) -> list[Manifest]:
    """Run all shards of the stages, in order; the manifests of the last."""
    for stage in stages:
        for shard in run.shards(Node(stage, round_)):
            run_shard(run, Node(stage, round_), shard, QUIET)
    found = run.manifests(Node(stages[-1], round_))
    assert found is not None
    return found


def path(run: Run, manifest: Manifest, name: str) -> Path:
    return run.local(manifest.files[name])
