"""Crops and the stage that makes them: pixels, bytes, order, and every image that cannot be used."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rpl import crops as crops_module
from rpl.categories import categories_from_json
from rpl.crops import SCHEMA, crop_key
from rpl.errors import BadInput, TryAgain
from rpl.manifests import Shard
from rpl.rounds import Node
from rpl.stage import Run
from rpl.store import open_store
from rpl.tars import read_tar
from tests.fake_stages import do, make_run
from tests.test_sampling import reference_rectangle

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} (public test data) is not here")

Files = dict[str, bytes]


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Twelve images of 80 x 60 pixels with three boxes each, of two categories, in COCO form."""
    folder = tmp_path / "world"
    (folder / "images").mkdir(parents=True)
    for number in range(12):
        noise(80, 60, number).save(folder / "images" / f"{number}.png")
    boxes = [(10, 5, 20, 10), (0.5, 30.5, 30, 29), (60, 40, 20, 20)]
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 80, "height": 60} for n in range(12)],
        "annotations": [
            {"id": 100 + 3 * n + k, "image_id": n, "category_id": (n + k) % 2 + 1, "bbox": list(box)}
            for n in range(12)
            for k, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "red_thing"}, {"id": 2, "name": "blue_thing"}],
    }
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder


def start(folder: Path, run: Path, **changes: Any) -> Run:
    boxes = {"annotations": str(folder / "boxes.json"), "images": str(folder / "images")}
    data = {"train": boxes, **changes.pop("data", {})}
    return make_run(run.parent / "outside", str(run), data=data, **changes)


def outputs(run: Run, shard: Shard | None = None) -> tuple[list[tuple[str, Files]], pa.Table, dict[str, Any]]:
    manifest = run.manifest(Node("crop"), shard or Shard())
    assert manifest is not None
    tar = list(read_tar(run.local(manifest.files["crops.tar"])))
    return tar, pq.read_table(run.local(manifest.files["crops.parquet"])), manifest.facts


def digests(run: Run) -> dict[str, str]:
    manifest = run.manifest(Node("crop"), Shard())
    assert manifest is not None
    return {name: file.sha256 for name, file in manifest.files.items()}


def test_the_stage_writes_crops_rows_and_categories(world: Path, tmp_path: Path) -> None:
    run = start(world, tmp_path / "run")
    assert do(run, "crop") == "done"
    tar, table, facts = outputs(run)
    assert table.schema == SCHEMA
    assert [key for key, _ in tar] == table["key"].to_pylist()
    assert facts == {
        "categories": 2,
        "base": 2,
        "novel": 0,
        "base_without_crops": 0,
        "crops": {"train": 34, "val": 2},
        "skipped": {},
    }
    row = next(row for row in table.to_pylist() if row["annotation_id"] == 100)
    assert row == {
        "key": crop_key("train", 0, 100), "split": "train", "category": 0, "annotation_id": 100, "image_id": 0,
        "file_name": "0.png", "x": 10.0, "y": 5.0, "w": 20.0, "h": 10.0, "width": 50, "height": 25,
    }  # fmt: skip
    files = dict(tar)[row["key"]]
    assert json.loads(files["json"]) == {
        "split": "train", "category": 0, "name": "red thing", "annotation_id": 100, "image_id": 0,
        "file_name": "0.png", "bbox": [10.0, 5.0, 20.0, 10.0],
    }  # fmt: skip
    crop = Image.open(io.BytesIO(files["jpg"]))
    expected = noise(80, 60, 0).crop((0, 0, 50, 25))
    assert crop.size == (50, 25)
    assert np.abs(np.asarray(crop).astype(int) - np.asarray(expected)).mean() < 6
    manifest = run.manifest(Node("crop"), Shard())
    assert manifest is not None
    categories = categories_from_json(run.local(manifest.files["categories.json"]).read_bytes())
    assert [(c.id, c.name, c.split) for c in categories] == [(1, "red thing", "base"), (2, "blue thing", "base")]


def test_workers_and_the_order_of_the_json_change_no_byte(world: Path, tmp_path: Path) -> None:
    one = start(world, tmp_path / "one", runtime={"workers": 1})
    do(one, "crop")
    content = json.loads((world / "boxes.json").read_text())
    mixed = {key: content[key][::-1] for key in ("categories", "annotations", "images")}
    (world / "boxes.json").write_text(json.dumps(mixed))
    two = start(world, tmp_path / "two", runtime={"workers": 2})
    do(two, "crop")
    assert digests(one) == digests(two)


def test_images_and_boxes_may_lie_in_any_store(world: Path, store_uri: str, tmp_path: Path) -> None:
    store = open_store(store_uri)
    for file in (path for path in world.rglob("*") if path.is_file()):
        store.upload(file.relative_to(world).as_posix(), file)
    here, there = start(world, tmp_path / "here"), tmp_path / "there"
    boxes = {"annotations": f"{store_uri}/boxes.json", "images": f"{store_uri}/images"}
    stored = make_run(tmp_path / "outside", str(there), data={"train": boxes}, runtime={"workers": 2})
    do(here, "crop")
    do(stored, "crop")
    assert digests(here) == digests(stored)


def test_shards_partition_the_crops(world: Path, tmp_path: Path) -> None:
    whole = start(world, tmp_path / "whole", data={"crops_per_category": 10})
    do(whole, "crop")
    parted = start(world, tmp_path / "parted", data={"crops_per_category": 10}, shards={"crop": 3})
    tars: list[tuple[str, Files]] = []
    facts = []
    for index in range(3):
        do(parted, "crop", shard=Shard(index, 3))
        tar, _, fact = outputs(parted, Shard(index, 3))
        assert tar
        tars += tar
        facts.append(fact)
    tar, _, fact = outputs(whole)
    assert sorted(tars) == sorted(tar)
    assert sum(part["skipped"]["not_drawn"] for part in facts) == fact["skipped"]["not_drawn"] == 16
    assert sum(part["crops"]["val"] for part in facts) == fact["crops"]["val"] == 2


def test_each_image_is_opened_once(world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[str] = []
    read = crops_module._read_bytes
    monkeypatch.setattr(crops_module, "_read_bytes", lambda task: opened.append(task.places[0]) or read(task))
    do(start(world, tmp_path / "run", runtime={"workers": 1}), "crop")
    assert sorted(opened) == sorted(f"{n}.png" for n in range(12))


def test_crops_with_a_validation_file(world: Path, tmp_path: Path) -> None:
    val = {"annotations": str(world / "boxes.json"), "images": str(world / "images")}
    run = start(world, tmp_path / "run", data={"val": val, "val_crops_per_category": 5})
    do(run, "crop")
    tar, table, facts = outputs(run)
    assert facts["crops"] == {"train": 36, "val": 10}
    assert table["split"].to_pylist() == ["train"] * 36 + ["val"] * 10
    assert len({key for key, _ in tar}) == 46


def test_exif_turns_the_picture_as_the_size_in_the_file_says(world: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, stored = noise(60, 80, 0), noise(80, 60, 1)
    turned_pixels = turned.transpose(Image.Transpose.ROTATE_90)  # what a camera writes beside orientation 6
    turned_pixels.save(world / "images" / "0.png", exif=exif)
    stored.save(world / "images" / "1.png", exif=exif)
    content = json.loads((world / "boxes.json").read_text())
    content["images"][0].update(width=60, height=80)
    box = {"image_id": 0, "category_id": 1, "bbox": [10, 10, 10, 10]}
    content["annotations"] = [{**box, "id": 1}, {**box, "id": 2, "image_id": 1}]
    (world / "boxes.json").write_text(json.dumps(content))
    run = start(world, tmp_path / "run")
    do(run, "crop")
    pixels = {
        json.loads(files["json"])["image_id"]: np.asarray(Image.open(io.BytesIO(files["jpg"]))).astype(int)
        for _, files in outputs(run)[0]
    }
    assert np.abs(pixels[0] - np.asarray(turned.crop((0, 0, 30, 30)))).mean() < 6
    assert np.abs(pixels[1] - np.asarray(stored.crop((0, 0, 30, 30)))).mean() < 6


def remove(image: Path) -> None:
    image.unlink()


def cut(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:200])


def replace_by_page(image: Path) -> None:
    image.write_bytes(b"<html>")


def shrink(image: Path) -> None:
    noise(40, 30, 0).save(image)


FOLDER, SOURCE = "{world}/images", "{world}/boxes.json"
FORMATS = "JPEG, PNG, WEBP, GIF, BMP"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            remove,
            f"{FOLDER}: image 5 of {SOURCE} is missing (looked for 5.png); add it or correct the path of the images.",
        ),
        (
            cut,
            f"{FOLDER}/5.png: image 5 of {SOURCE} cannot be read (image file is truncated); replace the file.",
        ),
        (
            replace_by_page,
            f"{FOLDER}/5.png: image 5 of {SOURCE} cannot be read (the first bytes are of none of {FORMATS}); replace "
            "the file.",
        ),
        (
            shrink,
            f"{FOLDER}/5.png: has 40 x 30 pixels, but {SOURCE} says 80 x 60 for image 5; correct its width and height, "
            "or replace the file.",
        ),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_cannot_be_used_gets_one_sentence_and_leaves_nothing(
    world: Path, tmp_path: Path, spoil: Callable[[Path], None], expected: str, workers: int
) -> None:
    spoil(world / "images" / "5.png")
    run = start(world, tmp_path / "run", runtime={"workers": workers})
    with pytest.raises(BadInput) as raised:
        do(run, "crop")
    assert str(raised.value) == expected.format(world=world)
    assert [info.path for info in run.store.list()] == ["config.yaml"]


def test_a_worker_that_dies_is_worth_another_try(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures.process import BrokenProcessPool

    def dead(*args: object) -> None:
        raise BrokenProcessPool("killed")

    monkeypatch.setattr(crops_module, "_finished", dead)
    with pytest.raises(TryAgain) as raised:
        do(start(world, tmp_path / "run", runtime={"workers": 2}), "crop")
    assert str(raised.value) == (
        "A worker that crops images died, most likely for want of memory; lower runtime.workers or try again."
    )


@needs_data
@pytest.mark.parametrize("form", ["instances", "lvis_style"])
def test_real_photographs_match_the_references_crops(form: str, tmp_path: Path) -> None:
    coco = DATA / "coco128"
    file = coco / f"annotations/{form}_train2017.derived.json"
    content = json.loads(file.read_text())
    if form == "lvis_style":
        for image in content["images"]:
            del image["file_name"]  # as in LVIS itself
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    lists = {
        "file": str(DATA / "promptdet/lvis_category_and_description.txt"),
        "base": str(DATA / "promptdet/lvis_base_inds.txt"),
    }
    data = {"train": {"annotations": str(tmp_path / "boxes.json"), "images": str(coco / "images/train2017")}}
    run = make_run(
        tmp_path / "outside", str(tmp_path / "run"), data=data, categories=lists if form == "lvis_style" else {}
    )
    do(run, "crop")
    tar, table, facts = outputs(run)
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    large = [box for box in content["annotations"] if box["bbox"][2] * box["bbox"][3] >= 20]
    by_id = {row["annotation_id"]: row for row in table.to_pylist()}
    for box in large:
        row = by_id.get(box["id"])
        if row is None:
            continue  # not drawn
        left, top, right, bottom = reference_rectangle(box["bbox"], sizes[box["image_id"]], 1.0)
        assert (row["width"], row["height"]) == (right - left, bottom - top)
    assert len(by_id) + facts["skipped"].get("not_drawn", 0) == len(large)
    assert all(Image.open(io.BytesIO(files["jpg"])).size for _, files in tar)
    if form == "lvis_style":
        assert (facts["categories"], facts["base"], facts["novel"]) == (1203, 866, 337)
        assert facts["base_without_crops"] == 866 - len(
            set(table.filter(pa.compute.field("split") == "train")["category"].to_pylist())
        )
        assert table["file_name"][0].as_py().startswith("train2017/")
