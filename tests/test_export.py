"""The hand-over files: both COCO forms, the tar, the copies; read back by pycocotools and by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rpl.categories import Category, categories_from_json
from rpl.errors import BadInput
from rpl.export import KeptPicture, coco, coco_reference, collect_images, json_bytes, kept_pictures
from rpl.images import encode_jpeg
from rpl.manifests import Manifest
from rpl.rounds import Node
from rpl.stage import Run
from rpl.tars import read_tar, write_tar
from tests.scripted_stages import CATEGORIES, KEPT, finished_run, key, picture, record

NAMED = [
    Category(10, "cat", "a pet", "base"),
    Category(20, "ice-cream cone", "a sweet", "novel"),
    Category(30, "dog", "", "novel"),
]
PICTURES = [
    KeptPicture(category=1, rank=0, key="aa", url="http://x/1"),
    KeptPicture(category=1, rank=4, key="bb", url="http://x/2"),
    KeptPicture(category=2, rank=1, key="aa", url="http://x/1"),
]
SIZES = {"aa": (64, 48), "bb": (10, 20)}


def test_coco_has_true_sizes_the_data_set_s_ids_and_each_picture_once() -> None:
    found = coco(NAMED, PICTURES, SIZES, {"version": "1"})
    assert found == {
        "info": {"version": "1"},
        "licenses": [],
        "images": [
            {"id": 1, "file_name": "aa.jpg", "width": 64, "height": 48, "coco_url": "http://x/1"},
            {"id": 2, "file_name": "bb.jpg", "width": 10, "height": 20, "coco_url": "http://x/2"},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 20, "bbox": [0, 0, 64, 48], "area": 3072, "iscrowd": 0},
            {"id": 2, "image_id": 2, "category_id": 20, "bbox": [0, 0, 10, 20], "area": 200, "iscrowd": 0},
            {"id": 3, "image_id": 1, "category_id": 30, "bbox": [0, 0, 64, 48], "area": 3072, "iscrowd": 0},
        ],
        "categories": [
            {"id": 10, "name": "cat"},
            {"id": 20, "name": "ice-cream cone"},
            {"id": 30, "name": "dog"},
        ],
    }


def test_the_reference_form_is_that_of_promptdet_s_converter() -> None:
    found = coco_reference(NAMED, PICTURES, SIZES)
    assert list(found) == ["images", "annotations", "categories"]
    assert found["images"] == [
        {"id": 0, "file_name": "aa.jpg", "height": 48, "width": 64},
        {"id": 1, "file_name": "bb.jpg", "height": 20, "width": 10},
        {"id": 2, "file_name": "aa.jpg", "height": 48, "width": 64},
    ]
    assert found["annotations"][2] == {
        "image_id": 2, "id": 3, "category_id": 3, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0,
    }  # fmt: skip
    assert found["categories"] == [
        {"id": 1, "name": "cat"},
        {"id": 2, "name": "ice-cream cone"},
        {"id": 3, "name": "dog"},
    ]


def test_kept_pictures_are_the_kept_rows_in_order(tmp_path: Path) -> None:
    rows = [
        {"category": 2, "rank": 1, "key": "c", "url": "u3", "status": "kept"},
        {"category": 1, "rank": 9, "key": "b", "url": "u2", "status": "kept"},
        {"category": 1, "rank": 3, "key": None, "url": "u4", "status": "failed"},
        {"category": 1, "rank": 2, "key": "a", "url": "u1", "status": "kept"},
        {"category": 1, "rank": 5, "key": "d", "url": "u5", "status": "spare"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sourced.parquet")
    assert [(p.category, p.rank, p.key) for p in kept_pictures(tmp_path / "sourced.parquet")] == [
        (1, 2, "a"),
        (1, 9, "b"),
        (2, 1, "c"),
    ]


def jpeg(width: int, height: int) -> bytes:
    return encode_jpeg(Image.new("RGB", (width, height), "teal"))


def test_images_of_all_shards_are_merged_sorted_and_each_once(tmp_path: Path) -> None:
    shared = {"jpg": jpeg(7, 9), "json": b"{}"}
    write_tar(tmp_path / "0.tar", [("b", shared), ("d", {"jpg": jpeg(1, 1)})])
    write_tar(tmp_path / "1.tar", [("a", {"jpg": jpeg(5, 6)}), ("b", shared), ("c", {"jpg": jpeg(2, 2)})])
    shards = [tmp_path / "0.tar", tmp_path / "1.tar"]
    assert collect_images(shards, {"a", "b"}, tmp_path / "out.tar") == {"a": (5, 6), "b": (7, 9)}
    assert [(name, sorted(files)) for name, files in read_tar(tmp_path / "out.tar")] == [
        ("a", ["jpg"]),
        ("b", ["jpg", "json"]),
    ]
    collect_images(shards[::-1], {"b", "a"}, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "out.tar").read_bytes()


def test_a_kept_picture_that_was_never_downloaded_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a", {"jpg": jpeg(5, 6)})])
    with pytest.raises(BadInput) as error:
        collect_images([tmp_path / "0.tar"], {"a", "zz"}, tmp_path / "out.tar")
    assert str(error.value) == (
        f"{tmp_path / '0.tar'}: picture zz was kept but is in no images.tar; run the download of the novel pass again."
    )


@pytest.mark.parametrize("form", ["mine", "reference"])
def test_pycocotools_loads_both_forms(tmp_path: Path, form: str) -> None:
    pycoco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    value = coco(NAMED, PICTURES, SIZES, {}) if form == "mine" else coco_reference(NAMED, PICTURES, SIZES)
    (tmp_path / "x.json").write_bytes(json_bytes(value))
    loaded = pycoco.COCO(str(tmp_path / "x.json"))
    dog = loaded.getCatIds(catNms=["dog"])
    assert [loaded.loadImgs(i)[0]["file_name"] for i in loaded.getImgIds(catIds=dog)] == ["aa.jpg"]
    assert len(loaded.getAnnIds()) == 3


def exported(run: Run) -> Manifest:
    manifests = run.manifests(Node("export"))
    assert manifests is not None
    return manifests[0]


def test_the_stage_exports_the_novel_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(tmp_path, monkeypatch)
    manifest = exported(run)
    assert sorted(manifest.files) == [
        "categories.json",
        "category_embeddings.npy",
        "category_embeddings.pt",
        "images.tar",
        "sourced.parquet",
        "sourced_novel.json",
        "sourced_novel_reference.json",
    ]
    assert manifest.facts == {"images": 2 * KEPT - 1, "annotations": 2 * KEPT, "categories": 2}

    def content(name: str) -> bytes:
        return run.local(manifest.files[name]).read_bytes()

    assert content("category_embeddings.pt") == b"copied byte for byte, whatever it holds"
    assert categories_from_json(content("categories.json")) == CATEGORIES
    assert pq.read_table(io.BytesIO(content("sourced.parquet"))).to_pylist() == record("novel")
    form = json.loads(content("sourced_novel.json"))
    assert form["info"]["encoder"]["model"] == "tiny"
    assert {annotation["category_id"] for annotation in form["annotations"]} == {7, 12}
    pictures = {name: files["jpg"] for name, files in read_tar(run.local(manifest.files["images.tar"]))}
    wanted = [picture(category, rank, "novel") for category in (1, 3) for rank in range(KEPT)]
    assert pictures == {key(data): data for data in wanted}
    for image in form["images"]:
        with Image.open(io.BytesIO(pictures[image["file_name"].removesuffix(".jpg")])) as opened:
            assert opened.size == (image["width"], image["height"])


def test_two_runs_export_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = exported(finished_run(tmp_path / "a", monkeypatch))
    second = exported(finished_run(tmp_path / "b", monkeypatch))
    assert first.contents == second.contents
