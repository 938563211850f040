"""The hand-over files of a run: the kept pictures of the novel categories, as COCO JSON and one tar.

Functions on categories, rows and tars; knows nothing of stages. Two JSON forms of the same pictures: one with true
sizes and the data set's own ids, for any COCO reader, and one exactly as PromptDet's converter writes it, for its
training code. Equal inputs give equal bytes: nothing here looks at a clock.
"""

from __future__ import annotations

import heapq
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL.JpegImagePlugin import JpegImageFile

from rpl.categories import Category
from rpl.errors import BadInput
from rpl.tars import read_tar, write_tar

Size = tuple[int, int]
"""Width and height, pixels."""


@dataclass(frozen=True)
class KeptPicture:
    """A picture that curation kept for `category` (a row of the categories). A key may serve two categories."""

    category: int
    rank: int
    key: str
    url: str


def kept_pictures(sourced: Path) -> list[KeptPicture]:
    """The rows of a curated record (`sourced.parquet`) that were kept, by category and rank."""
    table = pq.read_table(sourced, columns=["category", "rank", "key", "url"], filters=[("status", "=", "kept")])
    return sorted(
        (KeptPicture(**row) for row in table.to_pylist()), key=lambda picture: (picture.category, picture.rank)
    )


def collect_images(tars: Sequence[Path], keys: set[str], out: Path) -> dict[str, Size]:
    """Write the samples of `tars` (each sorted by key) whose key is in `keys` to one tar, sorted, each once.

    Returns:
        The pictures' sizes by key, read from the pictures themselves.

    Raises:
        BadInput: a key is in none of the tars.
    """
    sizes: dict[str, Size] = {}

    def samples() -> Iterator[tuple[str, Mapping[str, bytes]]]:
        merged = heapq.merge(*(read_tar(path) for path in tars), key=lambda sample: sample[0])
        for key, copies in itertools.groupby(merged, key=lambda sample: sample[0]):
            if key in keys:
                _, files = next(copies)  # shards that fetched the same picture hold the same bytes
                sizes[key] = JpegImageFile(io.BytesIO(files["jpg"])).size
                yield key, files

    write_tar(out, samples())
    missing = sorted(keys - sizes.keys())
    if missing:
        raise BadInput(
            f"{tars[0] if tars else out}: picture {missing[0]} was kept but is in no images.tar; "
            "run the download of the novel pass again."
        )
    return sizes


def coco(
    categories: Sequence[Category],
    pictures: Sequence[KeptPicture],
    sizes: Mapping[str, Size],
    info: Mapping[str, Any],
) -> dict[str, Any]:
    """COCO form: one image per picture, one whole-image box per category it was kept for, the data set's ids.

    `info` goes in as it is. Images are in the order of `pictures`, ids from 1. `coco_url` is the page's own picture.
    """
    image_ids: dict[str, int] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for picture in pictures:
        width, height = sizes[picture.key]
        if picture.key not in image_ids:
            image_ids[picture.key] = len(images) + 1
            images.append(
                {
                    "id": image_ids[picture.key],
                    "file_name": f"{picture.key}.jpg",
                    "width": width,
                    "height": height,
                    "coco_url": picture.url,
                }
            )
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image_ids[picture.key],
                "category_id": categories[picture.category].id,
                "bbox": [0, 0, width, height],
                "area": width * height,
                "iscrowd": 0,
            }
        )
    return {
        "info": dict(info),
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c.id, "name": c.name} for c in categories],
    }


def coco_reference(
    categories: Sequence[Category], pictures: Sequence[KeptPicture], sizes: Mapping[str, Size]
) -> dict[str, Any]:
    """PromptDet's form: one image per kept row, ids from 0, box [0, 0, 1, 1], category id = row + 1.

    Its training code never reads the box (the labels are per image) and counts categories by position.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, picture in enumerate(pictures):
        width, height = sizes[picture.key]
        images.append({"id": image_id, "file_name": f"{picture.key}.jpg", "height": height, "width": width})
        annotations.append(
            {
                "image_id": image_id,
                "id": image_id + 1,
                "category_id": picture.category + 1,
                "bbox": [0, 0, 1, 1],
                "area": 1,
                "iscrowd": 0,
            }
        )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": row + 1, "name": category.name} for row, category in enumerate(categories)],
    }


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Compact JSON, UTF-8, keys in the order they were put in: an LVIS-sized export has 100,000 images."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
