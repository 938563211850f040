"""Which boxes become crops: widened, small ones dropped, at most so many per category, drawn by seed.

Knows nothing of pixels and files. A box's place in the draw is a hash of the seed and its annotation id, so the same
boxes are drawn whatever the order of the JSON, the number of shards, or what else changed in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from rpl.annotations import Annotations, Floats, Ints
from rpl.categories import Category, rows_by_id
from rpl.config import Data
from rpl.errors import BadInput

HELD_OUT = 10
"""Without validation boxes, one in so many training crops of a category is held out."""


class Fate(IntEnum):
    """What becomes of a box; all but the first two are counted as skipped, under their name in small letters."""

    TRAIN = 0
    VAL = 1
    SMALL = 2
    """Its own width x height, before widening, is below `min_area`, as in the reference."""
    SUB_PIXEL = 3
    """Its rectangle holds no whole pixel, which can only be where the scaling factor is near 0."""
    UNLISTED = 4
    """Of a category that is not in the category list."""
    NOVEL = 5
    """A training box of a novel category, which learning must not see."""
    NOT_DRAWN = 6
    """Beyond the number per category."""
    BAD = 7
    """Without area or outside its image, where `bad_boxes` says to go on."""


@dataclass(frozen=True)
class Selection:
    """The fate of each of the N boxes of one annotation file."""

    annotations: Annotations
    categories: Ints
    """[N]: row in the category list, -1 for unlisted."""
    rectangles: Ints
    """[N, 4]: left, top, right, bottom of the crop in whole pixels, right and bottom excluded."""
    fates: npt.NDArray[np.uint8]


def select_boxes(
    train: Annotations, val: Annotations | None, categories: Sequence[Category], data: Data, seed: int
) -> list[Selection]:
    """Draw training crops from base categories, and validation crops from all.

    Without `val`, a tenth of each base category's draw (at least 1 of 2 or more) is held out for validation, and boxes
    of novel categories in `train` serve for validation only.

    Raises:
        BadInput: no base category has a single usable box.
    """
    novel = np.array([category.split == "novel" for category in categories])
    drawn = _usable(train, categories, data)
    rank, count = _draw(drawn, seed)
    usable = drawn.fates == Fate.TRAIN
    is_novel = usable & novel[drawn.categories]
    is_base = usable & ~is_novel
    drawn.fates[is_base & (rank >= data.crops_per_category)] = Fate.NOT_DRAWN
    if val is None:
        taken = np.minimum(count, data.crops_per_category)
        held_out = np.where(taken >= 2, np.maximum(taken // HELD_OUT, 1), 0)
        drawn.fates[is_base & (rank < np.minimum(held_out, data.val_crops_per_category))] = Fate.VAL
        drawn.fates[is_novel] = np.where(rank[is_novel] < data.val_crops_per_category, Fate.VAL, Fate.NOT_DRAWN)
    else:
        drawn.fates[is_novel] = Fate.NOVEL
    if not (drawn.fates == Fate.TRAIN).any():
        raise BadInput(
            f"{train.source}: all base categories are empty, since none has a box of at least {data.min_area:g} square "
            "pixels; correct the category list or lower data.min_area."
        )
    return [drawn] if val is None else [drawn, _select_val(val, categories, data, seed)]


def crop_rectangles(boxes: Floats, sizes: Ints, scaling_factor: float) -> Ints:
    """Each box widened by `scaling_factor` times its width (height) on each side, cut to whole pixels and its image.

    Args:
        boxes: [N, 4] x, y, width, height.
        sizes: [N, 2] width and height of each box's image.

    Returns:
        [N, 4] left, top, right, bottom; fractions are cut off towards zero, as the reference does.
    """
    x, y, w, h = boxes.T
    edges = np.stack(
        [
            x - scaling_factor * w,
            y - scaling_factor * h,
            x + (1 + scaling_factor) * w,
            y + (1 + scaling_factor) * h,
        ],
        axis=1,
    ).astype(np.int64)
    edges[:, :2] = np.maximum(edges[:, :2], 0)
    edges[:, 2:] = np.minimum(edges[:, 2:], sizes)
    return edges


def shard_of(image_ids: Ints, count: int) -> Ints:
    """The shard of each image: a hash of its id alone."""
    shards: Ints = (_mixed(image_ids, 0) % np.uint64(count)).astype(np.int64)
    return shards


def skipped(selection: Selection, rows: npt.NDArray[np.bool_]) -> dict[str, int]:
    """How many of the boxes under the mask `rows` were skipped, by reason; reasons that did not occur are left out."""
    counts = np.bincount(selection.fates[rows], minlength=len(Fate))
    return {fate.name.lower(): int(counts[fate]) for fate in Fate if fate > Fate.VAL and counts[fate]}


def _select_val(val: Annotations, categories: Sequence[Category], data: Data, seed: int) -> Selection:
    drawn = _usable(val, categories, data)
    rank, _ = _draw(drawn, seed)
    usable = drawn.fates == Fate.TRAIN
    drawn.fates[usable] = np.where(rank[usable] < data.val_crops_per_category, Fate.VAL, Fate.NOT_DRAWN)
    return drawn


def _usable(annotations: Annotations, categories: Sequence[Category], data: Data) -> Selection:
    """All boxes, those that can be cropped with fate TRAIN."""
    by_id = rows_by_id(annotations.categories, categories)
    ids, inverse = np.unique(annotations.category_ids, return_inverse=True)
    rows = np.array([by_id.get(int(number), -1) for number in ids], np.int64)[inverse]
    rectangles = crop_rectangles(annotations.boxes, annotations.sizes[annotations.images], data.scaling_factor)
    fates = np.full(len(rows), Fate.TRAIN, np.uint8)
    fates[(rectangles[:, 2:] <= rectangles[:, :2]).any(axis=1)] = Fate.SUB_PIXEL
    fates[annotations.boxes[:, 2] * annotations.boxes[:, 3] < data.min_area] = Fate.SMALL
    fates[annotations.is_bad] = Fate.BAD
    fates[rows < 0] = Fate.UNLISTED
    return Selection(annotations, rows, rectangles, fates)


def _draw(selection: Selection, seed: int) -> tuple[Ints, Ints]:
    """By box: its place in its category's draw, from 0, and how many boxes were in it; -1 and 0 for unusable ones."""
    usable = np.flatnonzero(selection.fates == Fate.TRAIN)
    groups = selection.categories[usable]
    order = np.lexsort((_mixed(selection.annotations.ids[usable], seed), groups))
    counts = np.bincount(groups)
    starts = np.cumsum(counts) - counts
    rank, count = np.full(len(selection.fates), -1, np.int64), np.zeros(len(selection.fates), np.int64)
    rank[usable[order]] = np.arange(len(usable)) - starts[groups[order]]
    count[usable] = counts[groups]
    return rank, count


def _mixed(numbers: Ints, seed: int) -> npt.NDArray[np.uint64]:
    """A well-mixed 64-bit permutation of `numbers` for each seed, so ranks have no ties.

    The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    key = _finalised(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return _finalised(numbers.view(np.uint64) ^ key)


def _finalised(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
