"""Crops of annotated images, each image opened once, in worker processes, in an order that does not depend on them.

Which boxes is decided in `rpl.sampling`; this module turns them into JPEGs and the records beside them. Knows nothing
of stages or CLIP.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from rpl.errors import BadInput, TryAgain
from rpl.images import ImageRefused, decode_image, encode_jpeg
from rpl.sampling import Fate, Selection, shard_of
from rpl.store import Store, open_store
from rpl.workers import worker_pool

MAX_PIXELS = 500_000_000
"""Of one annotated image: the user's own, so generous; 1.5 GB decoded."""

IMAGES_PER_CALL = 8
"""Images that one call to a worker crops: large enough to hide the call, small enough to share work evenly."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("category", pa.int32()),
        ("annotation_id", pa.int64()),
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("w", pa.float64()),
        ("h", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
"""Columns of `crops.parquet`: x, y, w, h is the box as annotated; width and height are the crop's, in pixels."""


class Crop(NamedTuple):
    """A row of `crops.parquet`."""

    key: str
    split: str
    category: int
    annotation_id: int
    image_id: int
    file_name: str
    x: float
    y: float
    w: float
    h: float
    width: int
    height: int


@dataclass(frozen=True)
class ImageTask:
    """One image and the rectangles (left, top, right, bottom) to cut out of it."""

    folder: str
    source: str
    image_id: int
    places: tuple[str, ...]
    size: tuple[int, int]
    crops: tuple[Crop, ...]
    rectangles: tuple[tuple[int, int, int, int], ...]


def image_tasks(selection: Selection, folder: str, shard: int, shards: int) -> list[ImageTask]:
    """The images of one shard with the boxes drawn from them, by image id, boxes by annotation id.

    Args:
        folder: URI of the folder that the file's names are relative to.
    """
    boxes = selection.annotations
    drawn = selection.fates <= Fate.VAL
    mine = shard_of(boxes.image_ids, shards)[boxes.images] == shard
    rows = np.flatnonzero(drawn & mine)
    rows = rows[np.argsort(boxes.images[rows], kind="stable")]  # boxes are sorted by annotation id already
    tasks = []
    for group in np.split(rows, np.flatnonzero(np.diff(boxes.images[rows])) + 1):
        if len(group):
            tasks.append(_image_task(selection, folder, group))
    return tasks


def crop_images(tasks: Sequence[ImageTask], workers: int) -> Iterator[tuple[ImageTask, list[bytes]]]:
    """Each task with its JPEGs, in order, whatever the number of worker processes.

    Raises:
        BadInput: an image is missing, damaged, or of another size than the annotations say.
    """
    calls = [tasks[start : start + IMAGES_PER_CALL] for start in range(0, len(tasks), IMAGES_PER_CALL)]
    if workers == 1 or len(calls) <= 1:
        for task in tasks:
            yield task, crop_image(task)
        return
    with worker_pool(min(workers, len(calls))) as pool:
        waiting: deque[tuple[Sequence[ImageTask], Future[list[list[bytes]]]]] = deque()
        try:
            for call in calls:
                waiting.append((call, pool.submit(_crop_all, call)))
                if len(waiting) > 4 * workers:  # so that results do not pile up
                    yield from _finished(*waiting.popleft())
            while waiting:
                yield from _finished(*waiting.popleft())
        except BrokenProcessPool as error:
            raise TryAgain(
                "A worker that crops images died, most likely for want of memory; lower runtime.workers or try again."
            ) from error
        finally:
            for _, future in waiting:
                future.cancel()


def crop_image(task: ImageTask) -> list[bytes]:
    """The JPEGs of one image's rectangles."""
    image = _read_image(task)
    return [encode_jpeg(image.crop(rectangle)) for rectangle in task.rectangles]


def sample_of(crop: Crop, jpeg: bytes, name: str) -> tuple[str, dict[str, bytes]]:
    """The crop as a WebDataset sample: KEY.jpg and KEY.json; `name` is its category's."""
    record = {
        "split": crop.split,
        "category": crop.category,
        "name": name,
        "annotation_id": crop.annotation_id,
        "image_id": crop.image_id,
        "file_name": crop.file_name,
        "bbox": [crop.x, crop.y, crop.w, crop.h],
    }
    return crop.key, {"jpg": jpeg, "json": json.dumps(record, ensure_ascii=False).encode()}


def crop_table(crops: Sequence[Crop]) -> pa.Table:
    """`crops` as the table of `SCHEMA`."""
    columns: list[Any] = list(zip(*crops, strict=True)) if crops else [[] for _ in SCHEMA]
    return pa.table(columns, schema=SCHEMA)


def crop_key(split: str, image_id: int, annotation_id: int) -> str:
    """24 hex characters that are the same in every run: they depend on nothing else."""
    return hashlib.sha256(f"{split}/{image_id}/{annotation_id}".encode()).hexdigest()[:24]


def _image_task(selection: Selection, folder: str, rows: np.ndarray[Any, Any]) -> ImageTask:
    boxes = selection.annotations
    image = int(boxes.images[rows[0]])
    image_id, places = int(boxes.image_ids[image]), boxes.file_names[image]
    crops, rectangles = [], []
    for row in rows:
        split = "val" if selection.fates[row] == Fate.VAL else "train"
        left, top, right, bottom = (int(edge) for edge in selection.rectangles[row])
        x, y, w, h = (float(side) for side in boxes.boxes[row])
        key = crop_key(split, image_id, int(boxes.ids[row]))
        category = int(selection.categories[row])
        size = (right - left, bottom - top)
        crops.append(Crop(key, split, category, int(boxes.ids[row]), image_id, places[0], x, y, w, h, *size))
        rectangles.append((left, top, right, bottom))
    width, height = (int(side) for side in boxes.sizes[image])
    return ImageTask(folder, boxes.source, image_id, places, (width, height), tuple(crops), tuple(rectangles))


def _crop_all(tasks: Sequence[ImageTask]) -> list[list[bytes]]:
    return [crop_image(task) for task in tasks]


def _finished(tasks: Sequence[ImageTask], future: Future[list[list[bytes]]]) -> Iterator[tuple[ImageTask, list[bytes]]]:
    return zip(tasks, future.result(), strict=True)


def _read_image(task: ImageTask) -> Image.Image:
    place, data = _read_bytes(task)
    path = f"{task.folder.rstrip('/')}/{place}"
    try:
        # Annotators see pictures turned as EXIF says; some tools write boxes for the pixels as stored. The size tells.
        image = decode_image(data, max_pixels=MAX_PIXELS)
        if image.size != task.size:
            stored = decode_image(data, max_pixels=MAX_PIXELS, orient=False)
            image = stored if stored.size == task.size else image
    except ImageRefused as refused:
        raise BadInput(
            f"{path}: image {task.image_id} of {task.source} cannot be read ({refused.detail}); replace the file."
        ) from refused
    if image.size != task.size:
        raise BadInput(
            f"{path}: has {image.width} x {image.height} pixels, but {task.source} says {task.size[0]} x "
            f"{task.size[1]} for image {task.image_id}; correct its width and height, or replace the file."
        )
    return image


def _read_bytes(task: ImageTask) -> tuple[str, bytes]:
    store = _store(task.folder)
    for place in task.places:
        if store.stat(place) is not None:
            return place, store.read(place)
    raise BadInput(
        f"{task.folder}: image {task.image_id} of {task.source} is missing (looked for {', '.join(task.places)}); "
        "add it or correct the path of the images."
    )


@lru_cache(maxsize=4)
def _store(folder: str) -> Store:
    return open_store(folder)
