"""Stage `crop`: category list and boxes in, one shard of crops out. The work is in `rpl.sampling` and `rpl.crops`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow.parquet as pq

from rpl.annotations import read_annotations
from rpl.categories import Category, categories_to_json, read_categories
from rpl.crops import ImageTask, crop_images, crop_table, image_tasks, sample_of
from rpl.progress import Progress
from rpl.sampling import Fate, Selection, select_boxes, shard_of, skipped
from rpl.stage import Context
from rpl.tars import write_tar


def run(ctx: Context) -> None:
    data, lists, shard = ctx.config.data, ctx.config.categories, ctx.shard
    train = read_annotations(data.train.annotations, data.bad_boxes)
    val = read_annotations(data.val.annotations, data.bad_boxes) if data.val else None
    categories = read_categories(lists.file, lists.base, train.categories, train.source)
    selections = select_boxes(train, val, categories, data, ctx.config.seed)

    folders = [data.train.images] + ([data.val.images] if data.val else [])
    tasks = [
        task
        for selection, folder in zip(selections, folders, strict=True)
        for task in image_tasks(selection, folder, shard.index, shard.count)
    ]
    crops = [crop for task in tasks for crop in task.crops]
    with ctx.progress(len(tasks), "images") as progress:
        write_tar(ctx.scratch / "crops.tar", _samples(tasks, categories, ctx.config.runtime.workers, progress))
    pq.write_table(crop_table(crops), ctx.scratch / "crops.parquet", compression="zstd")

    ctx.add(ctx.scratch / "crops.tar")
    ctx.add(ctx.scratch / "crops.parquet")
    ctx.write("categories.json", categories_to_json(categories))
    ctx.rows = len(crops)
    splits = Counter(category.split for category in categories)
    ctx.facts = {
        "categories": len(categories),
        "base": splits["base"],
        "novel": splits["novel"],
        "base_without_crops": _base_without_crops(selections[0], categories),
        "crops": {split: sum(crop.split == split for crop in crops) for split in ("train", "val")},
        "skipped": _skipped(selections, shard.index, shard.count),
    }


def _samples(
    tasks: Sequence[ImageTask], categories: Sequence[Category], workers: int, progress: Progress
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for task, jpegs in crop_images(tasks, workers):
        for crop, jpeg in zip(task.crops, jpegs, strict=True):
            yield sample_of(crop, jpeg, categories[crop.category].name)
        progress.update()


def _base_without_crops(train: Selection, categories: Sequence[Category]) -> int:
    """Base categories that no training crop shows, in any shard: learning goes without them."""
    seen = set(train.categories[train.fates == Fate.TRAIN].tolist())
    return sum(category.split == "base" and row not in seen for row, category in enumerate(categories))


def _skipped(selections: Sequence[Selection], shard: int, shards: int) -> dict[str, int]:
    """Boxes that gave no crop, by reason; each is counted in its image's shard, crowds in the first."""
    total: Counter[str] = Counter()
    for selection in selections:
        boxes = selection.annotations
        total.update(skipped(selection, shard_of(boxes.image_ids, shards)[boxes.images] == shard))
        if shard == 0 and boxes.crowds:
            total["crowd"] += boxes.crowds
    return dict(sorted(total.items()))
