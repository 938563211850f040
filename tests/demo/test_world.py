"""The demo's world: the same bytes from the same seed, in forms that other tools read, and honest about itself."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("torch", reason="the demo's world is embedded by a CLIP, which needs torch")

from rpl.categories import categories_from_records, read_categories
from rpl.demo.sprites import demo_categories, vocabulary
from rpl.demo.world import build_world
from rpl.demo.world_files import FULL, TINY, World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world") / "a", seed=1, scale=TINY, processes=1)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def routes(world: World) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read_json(world.web / "routes.json")
    return found


def column(world: World, name: str, wanted: str) -> list[str]:
    found: list[str] = pq.read_table(world.pool / name).column(wanted).to_pylist()
    return found


def pool_urls(world: World) -> list[str]:
    return [url for shard in (0, 1) for url in column(world, f"metadata/metadata_{shard}.parquet", "url")]


def test_the_same_seed_gives_the_same_bytes_with_one_process_or_two(world: World, tmp_path: Path) -> None:
    other = build_world(tmp_path / "b", seed=1, scale=TINY, processes=2)
    assert digests(other.directory) == digests(world.directory)


def test_a_complete_world_is_left_alone_and_an_unfinished_one_is_rebuilt(world: World) -> None:
    before = digests(world.directory)
    started = time.monotonic()
    build_world(world.directory, seed=1, scale=TINY, processes=1)
    assert time.monotonic() - started < 1
    (world.directory / "world.json").unlink()
    (world.directory / "train/images/left-over.jpg").touch()
    build_world(world.directory, seed=1, scale=TINY, processes=1)
    assert digests(world.directory) == before


@pytest.mark.parametrize("part", ["train", "val"])
def test_pycocotools_loads_the_scenes_and_every_box_lies_in_its_picture(world: World, part: str) -> None:
    coco_api = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_api.COCO(str(world.directory / part / "annotations.json"))
    assert sorted(coco.getCatIds()) == list(range(1, 13))
    for annotation in coco.loadAnns(coco.getAnnIds()):
        picture = coco.loadImgs(annotation["image_id"])[0]
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and w > 2 and h > 2
        assert x + w <= picture["width"] and y + h <= picture["height"]
        assert annotation["area"] == w * h
    for picture in coco.loadImgs(coco.getImgIds()):
        with Image.open(world.directory / part / "images" / picture["file_name"]) as image:
            assert image.size == (picture["width"], picture["height"])


def test_train_labels_a_long_tail_of_base_categories_and_val_labels_all(world: World) -> None:
    split = [row["split"] for row in read_json(world.directory / "categories.json")]
    counts = {
        part: Counter(a["category_id"] for a in read_json(world.directory / part / "annotations.json")["annotations"])
        for part in ("train", "val")
    }
    base = [number for number, kind in enumerate(split, start=1) if kind == "base"]
    assert sorted(counts["train"]) == base and len(base) == TINY.base
    assert max(counts["train"].values()) == TINY.most_boxes
    assert min(counts["train"].values()) == TINY.fewest_boxes
    assert counts["val"] == dict.fromkeys(range(1, len(split) + 1), TINY.val_boxes)


def test_the_category_file_reads_as_a_run_reads_it(world: World) -> None:
    listed = read_json(world.directory / "categories.json")
    annotated = categories_from_records(read_json(world.directory / "train/annotations.json")["categories"], "train")
    found = read_categories(str(world.categories), None, annotated, "train")
    assert [(c.name, c.description, c.split) for c in found] == [
        (row["name"], row["description"], row["split"]) for row in listed
    ]


def test_pool_rows_urls_vectors_routes_and_truth_belong_together(world: World) -> None:
    urls = pool_urls(world)
    vectors = [np.load(world.pool / f"img_emb/img_emb_{shard}.npy") for shard in (0, 1)]
    assert [len(v) for v in vectors] == [
        len(column(world, f"metadata/metadata_{shard}.parquet", "url")) for shard in (0, 1)
    ]
    assert all(v.dtype == np.float16 for v in vectors)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(vectors).astype(np.float32), axis=1), 1, atol=2e-3)
    assert len(set(urls)) == len(urls)
    assert set(urls) == set(routes(world))
    assert column(world, "truth.parquet", "url") == urls
    names = {row["name"] for row in read_json(world.directory / "categories.json")}
    assert set(column(world, "truth.parquet", "category")) == names | {""}


def test_every_misbehaviour_occurs_and_its_file_is_what_it_claims(world: World) -> None:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for route in routes(world).values():
        by_kind.setdefault(route["kind"], []).append(route)
    assert set(by_kind) == {
        "ok", "not_found", "flaky", "redirect", "redirect_private", "hang", "truncated", "html", "placeholder",
        "bomb", "wrong_type", "noai",
    }  # fmt: skip
    for kind in ("ok", "flaky", "truncated", "wrong_type", "noai", "placeholder"):
        for route in by_kind[kind]:
            with Image.open(world.web / route["file"]) as image:
                image.load()
                assert image.format == "JPEG"
    for kind in ("not_found", "redirect", "redirect_private", "hang"):
        assert all(route["file"] is None for route in by_kind[kind])
    assert (world.web / by_kind["html"][0]["file"]).read_bytes().startswith(b"<!doctype html>")
    bomb = world.web / by_kind["bomb"][0]["file"]
    assert bomb.stat().st_size < 200_000
    assert bomb.read_bytes()[16:24] == (30_000).to_bytes(4, "big") * 2


def test_redirects_lead_to_good_pages_or_to_private_addresses(world: World) -> None:
    table = routes(world)
    for route in table.values():
        if route["kind"] == "redirect":
            assert table[route["location"]]["kind"] == "ok"
        elif route["kind"] == "redirect_private":
            assert route["location"] not in table
        else:
            assert route["location"] is None


def test_copies_repeat_their_original_byte_for_byte_or_reencoded(world: World) -> None:
    table = routes(world)
    urls = pool_urls(world)
    copies = [(route, table[urls[route["copy_of"]]]) for route in table.values() if route["copy_of"] is not None]
    assert len(copies) == TINY.web.copies
    pages = world.web / "pages" / "000"
    for number, url in enumerate(urls):
        original = table[url]["copy_of"]
        if original is None:
            continue
        ours, theirs = ((pages / f"{n:06d}.jpg").read_bytes() for n in (number, original))
        small = [
            np.asarray(Image.open(io.BytesIO(data)).convert("L").resize((16, 16)), dtype=np.float32)
            for data in (ours, theirs)
        ]
        assert ours == theirs or float(np.abs(small[0] - small[1]).mean()) < 4


def test_the_full_demo_has_a_hundred_described_categories_and_thirty_novel_ones() -> None:
    categories = demo_categories()
    names = [category.name for category in categories]
    assert len(categories) >= 100 and len(set(names)) == len(names)
    assert Counter(category.split for category in categories) == {"base": FULL.base, "novel": FULL.novel}
    assert FULL.novel >= 30
    assert all(10 < len(category.description) < 80 for category in categories)
    assert {category.emoji for category in categories} <= {thing.emoji for thing in vocabulary()}
