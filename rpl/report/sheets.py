"""Contact sheets: which kept pictures are shown, and their thumbnails.

Knows nothing of HTML. A sheet shows a spread over all ranks, first and last included, and never the best only:
the reader should see what the set is like. The number of pictures falls with the number of categories, so that the
page stays a few megabytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from rpl.errors import BadInput
from rpl.images import ImageRefused, decode_image, encode_jpeg
from rpl.report.model import CategorySheet, Picture, Split
from rpl.tars import read_tar

PER_SHEET: Mapping[Split, int] = {"novel": 12, "base": 6}
"""Pictures on a sheet at most. Novel categories are what a run is for."""

PER_PAGE = 1000
"""Pictures on all sheets together. A photograph takes 6 kB of the page, so that it stays below 6 MB or so."""

_WHOLE_ROWS = (12, 6, 3, 2, 1)  # pictures of a category: two rows of a wide page, or an even part of a row

THUMBNAIL_SIDE = 112
THUMBNAIL_QUALITY = 70

T = TypeVar("T")


@dataclass(frozen=True)
class Thumbnail:
    """JPEG bytes, and the size of the picture it was made from, pixels."""

    jpeg: bytes
    width: int
    height: int


def build_sheets(
    yields: Sequence[Mapping[str, Any]],
    descriptions: Mapping[int, str],
    kept: Mapping[int, Sequence[Mapping[str, Any]]],
    tars: Iterable[Path],
    max_pixels: int,
) -> tuple[CategorySheet, ...]:
    """One sheet per entry of `yields`, in their order.

    Args:
        yields: entries of `yield.json`.
        descriptions: by category.
        kept: rows of `sourced.parquet` that were kept, by category, in rank order.
        tars: where the pictures are.
        max_pixels: larger pictures are an error.

    Raises:
        BadInput: a picture to be shown is in none of the tars, or cannot be decoded.
    """
    shown = choose(yields, kept)
    keys = {row["key"] for rows in shown.values() for row in rows}
    thumbnails = read_thumbnails(tars, keys, max_pixels)
    return tuple(
        CategorySheet(
            category=entry["category"],
            name=entry["name"],
            description=descriptions[entry["category"]],
            split=entry["split"],
            candidates=entry["candidates"],
            downloaded=entry["downloaded"],
            kept=entry["kept"],
            target=entry["target"],
            refused=entry["refused"],
            pictures=tuple(_picture(row, thumbnails[row["key"]]) for row in shown[entry["category"]]),
        )
        for entry in yields
    )


def choose(
    yields: Sequence[Mapping[str, Any]], kept: Mapping[int, Sequence[Mapping[str, Any]]]
) -> dict[int, list[Mapping[str, Any]]]:
    """The rows to show by category: at most `PER_SHEET` each and `PER_PAGE` in all, novel categories first."""
    chosen: dict[int, list[Mapping[str, Any]]] = {}
    room = PER_PAGE
    limits = [PER_SHEET[entry["split"]] for entry in yields]
    per_category = next((n for n in _WHOLE_ROWS if sum(min(n, limit) for limit in limits) <= PER_PAGE), 1)
    for entry in sorted(yields, key=lambda entry: entry["split"] != "novel"):
        count = min(PER_SHEET[entry["split"]], per_category, room)
        chosen[entry["category"]] = spread(kept.get(entry["category"], ()), count)
        room -= len(chosen[entry["category"]])
    return chosen


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of `items`, in order and evenly apart, the first and the last included."""
    if len(items) <= count:
        return list(items)
    if count <= 1:
        return list(items[:count])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def read_thumbnails(tars: Iterable[Path], keys: set[str], max_pixels: int) -> dict[str, Thumbnail]:
    """Thumbnails of the pictures `keys`, by key."""
    found: dict[str, Thumbnail] = {}
    for path in tars:
        if found.keys() >= keys:
            break
        for key, files in read_tar(path):
            if key in keys and key not in found:
                found[key] = _thumbnail(files["jpg"], max_pixels, f"{path}: picture {key}")
    missing = sorted(keys - found.keys())
    if missing:
        raise BadInput(f"picture {missing[0]} was kept but is in no images.tar; run its download again.")
    return found


def _thumbnail(data: bytes, max_pixels: int, source: str) -> Thumbnail:
    try:
        image = decode_image(data, max_pixels=max_pixels)
    except ImageRefused as error:
        raise BadInput(f"{source} cannot be decoded ({error.detail}); run its download again.") from error
    width, height = image.size
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return Thumbnail(encode_jpeg(image, THUMBNAIL_QUALITY), width, height)


def _picture(row: Mapping[str, Any], thumbnail: Thumbnail) -> Picture:
    return Picture(
        thumbnail=thumbnail.jpeg,
        width=thumbnail.width,
        height=thumbnail.height,
        rank=row["rank"],
        score=row["score"],
        image_score=row["image_score"],
        url=row["url"],
        caption=row["caption"] or "",
    )
