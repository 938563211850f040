"""Boxes of COCO and LVIS files as numpy columns, checked.

Streams the JSON once, whatever its size and the order of its lists: 1.27 million boxes, as in LVIS, peak at 250 MB
here, not at the 4 GB of a parsed file. Knows nothing of category lists or pixels. Rows are sorted by id, so that two
files with the same records in another order are the same to everything after.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt

from rpl.categories import Category, categories_from_records
from rpl.errors import BadInput
from rpl.json_stream import stream_lists
from rpl.store import open_uri

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

OUTSIDE_PX = 1.0
"""How far a box may stick out of its image: what rounding does. Cropping clips it."""


@dataclass(frozen=True)
class Annotations:
    """M images and N boxes, without crowds; both sorted by id."""

    source: str
    categories: list[Category]
    image_ids: Ints
    file_names: list[tuple[str, ...]]
    """By image: the places to look for it under the images folder, in order."""
    sizes: Ints
    """[M, 2]: width and height, pixels."""
    ids: Ints
    images: Ints
    """By box: its row among the images."""
    category_ids: Ints
    boxes: Floats
    """[N, 4]: x, y, width, height in pixels, as written."""
    crowds: int
    """Boxes left out since they stand for many objects (`iscrowd`)."""

    @property
    def is_bad(self) -> npt.NDArray[np.bool_]:
        """[N]: without area, or more than `OUTSIDE_PX` outside its image."""
        return _without_area(self.boxes) | _outside(self.boxes, self.sizes[self.images])


def read_annotations(uri: str, bad_boxes: Literal["refuse", "drop"] = "refuse") -> Annotations:
    """The boxes in a COCO or LVIS file.

    Args:
        bad_boxes: whether a box that has no area, or leaves its image by more than 1 pixel, raises, or is among the
            others, where `is_bad` tells it.

    Raises:
        BadInput: not whole JSON, no images, boxes or categories, or one of: a repeated id, an image or category that
            is not listed, a bbox that is no four numbers; a bad box.
    """
    columns = _Columns(uri)
    with open_uri(uri) as stream:
        for key, record in stream_lists(stream, uri):
            if key == "annotations":
                columns.add_box(record)
            elif key == "images":
                columns.add_image(record)
            elif key == "categories":
                columns.categories.append(record)
    annotations = _checked(columns)
    if bad_boxes == "refuse":
        for row in _first(annotations.is_bad):
            raise BadInput(_complaint(annotations, row))
    return annotations


def image_places(record: dict[str, Any]) -> tuple[str, ...]:
    """Where an image may lie under the images folder: its `file_name`, then its `coco_url`'s last two parts, then one.

    LVIS names images by URL alone, and LVIS 0.5 by a `file_name` of another year than the URL's true one.
    """
    places = [record["file_name"]] if isinstance(record.get("file_name"), str) else []
    if isinstance(record.get("coco_url"), str):
        parts = [unquote(part) for part in urlsplit(record["coco_url"]).path.split("/") if part]
        places += ["/".join(parts[-2:]), "/".join(parts[-1:])]
    return tuple(dict.fromkeys(place for place in places if place))


@dataclass
class _Columns:
    """Records as they come, packed."""

    source: str
    categories: list[Any] = field(default_factory=list)
    image_ids: array[int] = field(default_factory=lambda: array("q"))
    places: list[tuple[str, ...]] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    ids: array[int] = field(default_factory=lambda: array("q"))
    box_images: array[int] = field(default_factory=lambda: array("q"))
    box_categories: array[int] = field(default_factory=lambda: array("q"))
    boxes: array[float] = field(default_factory=lambda: array("d"))
    crowds: int = 0

    def add_image(self, record: Any) -> None:
        number = self._whole(record, "id", f"image {len(self.places)} (from 0)")
        what = f"image {number}"
        width, height = self._whole(record, "width", what), self._whole(record, "height", what)
        if width < 1 or height < 1:
            raise BadInput(f"{self.source}: {what} is {width} x {height} pixels; correct its width and height.")
        places = image_places(record)
        if not places:
            raise BadInput(f"{self.source}: {what} has neither file_name nor coco_url; add one.")
        for place in places:
            if not _is_inside(place):
                raise BadInput(
                    f"{self.source}: {what} has the file name {place!r}; give a plain path below the images."
                )
        self.image_ids.append(number)
        self.places.append(places)
        self.sizes.extend((width, height))

    def add_box(self, record: Any) -> None:
        number = self._whole(record, "id", f"annotation {len(self.ids) + self.crowds} (from 0)")
        if record.get("iscrowd"):
            self.crowds += 1
            return
        what = f"annotation {number}"
        box = record.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(side) for side in box):
            raise BadInput(f"{self.source}: {what} has bbox {_short(box)}; write four numbers [x, y, width, height].")
        self.ids.append(number)
        self.box_images.append(self._whole(record, "image_id", what))
        self.box_categories.append(self._whole(record, "category_id", what))
        self.boxes.extend(box)

    def _whole(self, record: Any, key: str, what: str) -> int:
        value = record.get(key) if isinstance(record, dict) else None
        if type(value) is not int or not -(2**63) <= value < 2**63:
            raise BadInput(f"{self.source}: {what} has {key} {_short(value)}; write a whole number.")
        return value


def _checked(columns: _Columns) -> Annotations:
    source = columns.source
    for what, records in (("images", columns.places), ("annotations", columns.ids), ("categories", columns.categories)):
        if not records:
            raise BadInput(f"{source}: has no {what!r}; give a COCO or LVIS file with boxes.")
    image_ids, image_order = _sorted_ids(columns.image_ids, "image", source)
    ids, order = _sorted_ids(columns.ids, "annotation", source)
    annotations = Annotations(
        source=source,
        categories=categories_from_records(columns.categories, source),
        image_ids=image_ids,
        file_names=[columns.places[row] for row in image_order],
        sizes=_ints(columns.sizes).reshape(-1, 2)[image_order],
        ids=ids,
        images=_rows_of(_ints(columns.box_images)[order], image_ids),
        category_ids=_ints(columns.box_categories)[order],
        boxes=np.frombuffer(columns.boxes, np.float64).reshape(-1, 4)[order],
        crowds=columns.crowds,
    )
    _check_references(annotations, _ints(columns.box_images)[order])
    return annotations


def _check_references(annotations: Annotations, image_ids: Ints) -> None:
    source = annotations.source
    for row in _first(annotations.images < 0):
        raise BadInput(
            f"{source}: annotation {annotations.ids[row]} is of image {image_ids[row]}, which 'images' does not list; "
            "correct its image_id or add the image."
        )
    known = np.array([category.id for category in annotations.categories], np.int64)
    for row in _first(~np.isin(annotations.category_ids, known)):
        raise BadInput(
            f"{source}: annotation {annotations.ids[row]} is of category {annotations.category_ids[row]}, which "
            "'categories' does not list; correct its category_id or add the category."
        )


def _without_area(boxes: Floats) -> npt.NDArray[np.bool_]:
    return (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0)


def _outside(boxes: Floats, sizes: Ints) -> npt.NDArray[np.bool_]:
    starts, ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    sticks_out = (starts < -OUTSIDE_PX) | (ends > sizes + OUTSIDE_PX)
    misses = (starts >= sizes) | (ends <= 0)
    bad = sticks_out | misses
    return bad[:, 0] | bad[:, 1]


def _complaint(annotations: Annotations, row: int) -> str:
    bbox = ", ".join(f"{side:g}" for side in annotations.boxes[row])
    box = f"{annotations.source}: annotation {annotations.ids[row]} with bbox [{bbox}]"
    if _without_area(annotations.boxes[row : row + 1])[0]:
        return f"{box} has no area; correct its bbox or remove it, or set data.bad_boxes to drop."
    image = annotations.images[row]
    name, (width, height) = annotations.file_names[image][0], annotations.sizes[image]
    return (
        f"{box} lies outside its image {name} of {width} x {height} pixels; correct its bbox or the image's size, or "
        "set data.bad_boxes to drop."
    )


def _sorted_ids(values: array[int], what: str, source: str) -> tuple[Ints, Ints]:
    """Ids in order and the order. Raises BadInput where one comes twice."""
    ids = _ints(values)
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    for row in _first(ids[1:] == ids[:-1]):
        raise BadInput(f"{source}: {what} id {ids[row]} comes twice; give each {what} its own id.")
    return ids, order


def _rows_of(wanted: Ints, known: Ints) -> Ints:
    """Row in the sorted `known` of each of `wanted`; -1 where it is absent."""
    rows = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.where(known[rows] == wanted, rows, -1)


def _first(mask: npt.NDArray[np.bool_]) -> Iterable[int]:
    """The first row where `mask` holds, if there is one."""
    return (int(row) for row in np.flatnonzero(mask)[:1])


def _ints(values: array[int]) -> Ints:
    return np.frombuffer(values, np.int64)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 2**53


def _is_inside(place: str) -> bool:
    """Whether a path stays below its folder and names something a file system can hold."""
    parts = place.split("/")
    return not any(part in ("", ".", "..") or any(sign < " " or sign == "\x7f" for sign in part) for part in parts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
