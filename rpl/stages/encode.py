"""Stage `encode`: features of one shard of crops, or of a round's web pictures. The work is in `rpl.encoding`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from rpl.clip import device_name, load_clip
from rpl.encoding import encode_pictures
from rpl.errors import BadInput
from rpl.features import FeatureWriter
from rpl.stage import Context
from rpl.tars import read_tar
from rpl.views import Picture, ViewRecipe

Label = tuple[str, int]
"""Split and category of a picture."""


def run(ctx: Context) -> None:
    settings, runtime = ctx.config.clip, ctx.config.runtime
    clip = load_clip(settings, device_name(runtime.device))
    labels = _crop_labels(ctx) if ctx.node.round is None else _web_labels(ctx)
    recipe = ViewRecipe(clip.preprocessing, settings.view_scale, ctx.config.seed)
    pictures = _pictures(ctx, labels, settings.views)
    encoded = encode_pictures(clip, pictures, recipe, batch_size=runtime.batch_size, workers=runtime.workers)
    with (
        FeatureWriter(ctx.scratch, clip.identity.dim, settings.views) as writer,
        ctx.progress(len(labels), "pictures") as progress,
    ):
        for each in encoded:
            writer.add(each.key, *labels[each.key], each.feature, each.views)
            progress.update()
        paths = writer.finish()
    for path in paths:
        ctx.add(path)
    ctx.rows = len(labels)
    ctx.facts = {"encoder": clip.identity.to_facts(), "images": len(labels)}


def _crop_labels(ctx: Context) -> dict[str, Label]:
    table = pq.read_table(ctx.input_file("crops", "crops.parquet"), columns=["key", "split", "category"])
    return {row["key"]: (row["split"], row["category"]) for row in table.to_pylist()}


def _web_labels(ctx: Context) -> dict[str, Label]:
    table = pq.read_table(ctx.input_file("downloads", "downloads.parquet"), columns=["key", "status"])
    keys = table.filter(pc.equal(table["status"], "ok"))["key"].to_pylist()
    return dict.fromkeys(sorted(keys), ("web", -1))


def _pictures(ctx: Context, labels: dict[str, Label], views: int) -> Iterator[Picture]:
    """The shard's pictures in the tar's order. Only what a round learns from gets random views.

    Raises:
        BadInput: tar and table do not hold the same keys.
    """
    path = ctx.input_file("crops", "crops.tar") if ctx.node.round is None else ctx.input_file("downloads", "images.tar")
    left = set(labels)
    for key, files in read_tar(path):
        if key not in left or "jpg" not in files:
            raise _disagreeing(path, key)
        left.remove(key)
        learned_from = labels[key][0] == "train" or isinstance(ctx.node.round, int)
        yield Picture(key, files["jpg"], views if learned_from else 0)
    if left:
        raise _disagreeing(path, min(left))


def _disagreeing(path: Path, key: str) -> BadInput:
    return BadInput(f"{path}: does not agree with its table on picture {key}; make both again.")
