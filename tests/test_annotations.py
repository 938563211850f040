"""COCO and LVIS files: what is read equals what pycocotools reads; every kind of wrong record has its sentence."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from rpl.annotations import Annotations, image_places, read_annotations
from rpl.errors import BadInput

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} (public test data) is not here")

COCO: dict[str, Any] = {
    "info": {"year": 2026},
    "images": [
        {"id": 7, "file_name": "b.jpg", "width": 40, "height": 30},
        {"id": 3, "file_name": "dir/a.jpg", "width": 100, "height": 100},
    ],
    "annotations": [
        {"id": 12, "image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 30], "area": 1, "iscrowd": 0},
        {"id": 10, "image_id": 3, "category_id": 5, "bbox": [10.5, 20, 30, 40.25], "segmentation": [[1, 2, 3, 4]]},
        {"id": 11, "image_id": 3, "category_id": 5, "bbox": [0, 0, 0, 0], "iscrowd": 1},
    ],
    "categories": [{"id": 5, "name": "dog"}, {"id": 1, "name": "cat"}],
}


def read(tmp_path: Path, content: object, bad_boxes: Literal["refuse", "drop"] = "refuse") -> Annotations:
    file = tmp_path / "boxes.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_annotations(str(file), bad_boxes)


def test_columns_sorted_by_id_without_crowds(tmp_path: Path) -> None:
    read_back = read(tmp_path, COCO)
    assert read_back.image_ids.tolist() == [3, 7]
    assert read_back.file_names == [("dir/a.jpg",), ("b.jpg",)]
    assert read_back.sizes.tolist() == [[100, 100], [40, 30]]
    assert read_back.ids.tolist() == [10, 12]
    assert read_back.images.tolist() == [0, 1]
    assert read_back.category_ids.tolist() == [5, 1]
    assert read_back.boxes.tolist() == [[10.5, 20, 30, 40.25], [0, 0, 40, 30]]
    assert read_back.crowds == 1
    assert [c.name for c in read_back.categories] == ["dog", "cat"]


def test_the_order_of_records_and_lists_is_nothing(tmp_path: Path) -> None:
    shuffled = {key: COCO[key] for key in ("categories", "annotations", "images", "info")}
    shuffled["annotations"] = random.Random(0).sample(shuffled["annotations"], 3)
    shuffled["images"] = shuffled["images"][::-1]
    one, two = read(tmp_path, COCO), read(tmp_path, shuffled)
    for name in ("image_ids", "sizes", "ids", "images", "category_ids", "boxes"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    assert one.file_names == two.file_names


def test_places_of_an_image() -> None:
    url = "http://images.cocodataset.org/train2017/000000000009.jpg"
    assert image_places({"coco_url": url}) == ("train2017/000000000009.jpg", "000000000009.jpg")
    assert image_places({"file_name": "COCO_x.jpg", "coco_url": url})[0] == "COCO_x.jpg"
    assert image_places({"file_name": "000000000009.jpg", "coco_url": url}) == (
        "000000000009.jpg",
        "train2017/000000000009.jpg",
    )
    assert image_places({"coco_url": "https://h/a%20b/c.jpg?x=1"}) == ("a b/c.jpg", "c.jpg")
    assert image_places({"coco_url": "c.jpg"}) == ("c.jpg",)


@needs_data
@pytest.mark.parametrize("name", ["instances_train2017", "instances_val2017", "lvis_style_train2017"])
def test_equals_pycocotools_on_real_files(name: str) -> None:
    from pycocotools.coco import COCO as Coco

    path = DATA / f"coco128/annotations/{name}.derived.json"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = Coco(str(path))
    ours = read_annotations(str(path))
    assert ours.ids.tolist() == sorted(coco.getAnnIds())
    assert ours.image_ids.tolist() == sorted(coco.getImgIds())
    assert [c.id for c in ours.categories] == [c["id"] for c in coco.dataset["categories"]]
    for row, record in enumerate(coco.loadAnns(ours.ids.tolist())):
        assert ours.boxes[row].tolist() == record["bbox"]
        assert ours.image_ids[ours.images[row]] == record["image_id"]
        assert ours.category_ids[row] == record["category_id"]
    for row, record in enumerate(coco.loadImgs(ours.image_ids.tolist())):
        assert ours.file_names[row][0] == record["file_name"]


@needs_data
def test_a_real_lvis_file() -> None:
    ours = read_annotations(str(DATA / "lvis/lvis_val_100.json"))
    assert (len(ours.ids), len(ours.image_ids), len(ours.categories)) == (977, 100, 1230)
    assert ours.file_names[0][1:] == ("val2017/000000006460.jpg", "000000006460.jpg")
    assert all(category.description for category in ours.categories)


@pytest.mark.parametrize(
    "box", [[9.98, 18.56, 5.54, 0.0], [9, 9, -3, 5], [30, 0, 12, 10], [0, 0, 40, 31.5], [40, 5, 1, 1], [0, -5, 3, 5]]
)
def test_bad_boxes_are_marked_where_they_shall_be_dropped(tmp_path: Path, box: list[float]) -> None:
    content = copy.deepcopy(COCO)
    content["annotations"][0]["bbox"] = box
    read_back = read(tmp_path, content, "drop")
    assert read_back.boxes[1].tolist() == box
    assert read_back.is_bad.tolist() == [False, True]


@pytest.mark.parametrize("box", [[-0.9, 0, 10, 10], [31, 21, 10, 10], [0, 0, 40.99, 30.5]])
def test_a_box_may_stick_out_by_a_pixel(tmp_path: Path, box: list[float]) -> None:
    content = copy.deepcopy(COCO)
    content["annotations"][0]["bbox"] = box
    assert read(tmp_path, content).boxes[1].tolist() == box


def change(part: str, row: int, **values: Any) -> Callable[[Any], None]:
    return lambda content: content[part][row].update(values)


def drop(part: str, row: int, *keys: str) -> Callable[[Any], None]:
    return lambda content: [content[part][row].pop(key) for key in keys]


NO_NUMBERS = "write four numbers [x, y, width, height]."
BAD: list[tuple[Callable[[Any], Any], str]] = [
    (
        change("annotations", 0, bbox=[30, 0, 12, 10]),
        "annotation 12 with bbox [30, 0, 12, 10] lies outside its image b.jpg of 40 x 30 pixels; correct its bbox or "
        "the image's size, or set data.bad_boxes to drop.",
    ),
    (
        change("annotations", 0, bbox=[-1.5, 0, 12, 10]),
        "annotation 12 with bbox [-1.5, 0, 12, 10] lies outside its image b.jpg of 40 x 30 pixels; correct its bbox or "
        "the image's size, or set data.bad_boxes to drop.",
    ),
    (
        change("annotations", 0, bbox=[40, 5, 1, 1]),
        "annotation 12 with bbox [40, 5, 1, 1] lies outside its image b.jpg of 40 x 30 pixels; correct its bbox or "
        "the image's size, or set data.bad_boxes to drop.",
    ),
    (
        change("annotations", 1, bbox=[1, 2, 0, 5]),
        "annotation 10 with bbox [1, 2, 0, 5] has no area; correct its bbox or remove it, or set data.bad_boxes to "
        "drop.",
    ),
    (
        change("annotations", 1, bbox=[9, 9, -3, 5]),
        "annotation 10 with bbox [9, 9, -3, 5] has no area; correct its bbox or remove it, or set data.bad_boxes to "
        "drop.",
    ),
    (change("annotations", 1, bbox=[1, 2, float("nan"), 5]), f"annotation 10 has bbox [1, 2, nan, 5]; {NO_NUMBERS}"),
    (change("annotations", 1, bbox=[1, 2, float("inf"), 5]), f"annotation 10 has bbox [1, 2, inf, 5]; {NO_NUMBERS}"),
    (change("annotations", 1, bbox=[1, 2, "3", 5]), f"annotation 10 has bbox [1, 2, '3', 5]; {NO_NUMBERS}"),
    (change("annotations", 1, bbox=[1, 2, True, 5]), f"annotation 10 has bbox [1, 2, True, 5]; {NO_NUMBERS}"),
    (change("annotations", 1, bbox=[1, 2, 3]), f"annotation 10 has bbox [1, 2, 3]; {NO_NUMBERS}"),
    (change("annotations", 1, bbox={"x": 1}), f"annotation 10 has bbox {{'x': 1}}; {NO_NUMBERS}"),
    (drop("annotations", 1, "bbox"), f"annotation 10 has bbox None; {NO_NUMBERS}"),
    (
        change("annotations", 0, category_id=2),
        "annotation 12 is of category 2, which 'categories' does not list; correct its category_id or add the "
        "category.",
    ),
    (
        change("annotations", 0, image_id=99),
        "annotation 12 is of image 99, which 'images' does not list; correct its image_id or add the image.",
    ),
    (change("annotations", 0, image_id="7"), "annotation 12 has image_id '7'; write a whole number."),
    (change("annotations", 0, category_id=1.0), "annotation 12 has category_id 1.0; write a whole number."),
    (drop("annotations", 1, "id"), "annotation 1 (from 0) has id None; write a whole number."),
    (change("annotations", 1, id=2**70), f"annotation 1 (from 0) has id {2**70}; write a whole number."),
    (change("annotations", 1, id=12), "annotation id 12 comes twice; give each annotation its own id."),
    (change("images", 1, id=7), "image id 7 comes twice; give each image its own id."),
    (change("images", 1, width=0), "image 3 is 0 x 100 pixels; correct its width and height."),
    (drop("images", 1, "height"), "image 3 has height None; write a whole number."),
    (drop("images", 1, "file_name"), "image 3 has neither file_name nor coco_url; add one."),
    (
        change("images", 1, file_name="../../etc/passwd"),
        "image 3 has the file name '../../etc/passwd'; give a plain path below the images.",
    ),
    (
        change("images", 1, file_name="/etc/passwd"),
        "image 3 has the file name '/etc/passwd'; give a plain path below the images.",
    ),
    (
        change("images", 1, file_name="a\0.jpg"),
        "image 3 has the file name 'a\\x00.jpg'; give a plain path below the images.",
    ),
    (
        change("categories", 1, id=5),
        "category 0 (from 0) and category 1 (from 0) both have the id 5; remove or change one.",
    ),
    (
        change("categories", 1, name="dog"),
        "category 0 (from 0) and category 1 (from 0) both have the name 'dog'; remove or change one.",
    ),
    (change("categories", 1, name=""), "category 1 (from 0) has an empty name; name it or remove it."),
    (lambda content: content.pop("images"), "has no 'images'; give a COCO or LVIS file with boxes."),
    (
        lambda content: content.update(annotations=[]),
        "has no 'annotations'; give a COCO or LVIS file with boxes.",
    ),
    (lambda content: content.pop("categories"), "has no 'categories'; give a COCO or LVIS file with boxes."),
    (lambda content: content.update(annotations=[3]), "annotation 0 (from 0) has id None; write a whole number."),
]


@pytest.mark.parametrize(("spoil", "expected"), BAD, ids=[text[:60] for _, text in BAD])
def test_a_wrong_record_gets_one_sentence(tmp_path: Path, spoil: Callable[[Any], Any], expected: str) -> None:
    content = copy.deepcopy(COCO)
    spoil(content)
    with pytest.raises(BadInput) as raised:
        read(tmp_path, content)
    assert str(raised.value) == f"{tmp_path}/boxes.json: {expected}"


def test_a_cut_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"boxes\.json: is not a whole JSON object \(.+\); correct it or download it"):
        read(tmp_path, json.dumps(COCO)[:-10])
    with pytest.raises(BadInput, match=r"boxes\.json: is not a whole JSON object \('\{' expected, not '<'"):
        read(tmp_path, "<html>")
