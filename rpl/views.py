"""What CLIP sees of a picture: the evaluation view, and random ones for learning. Pillow and numpy only.

Knows nothing of models, files or batches; worker processes run it, so it must import fast. The evaluation view is
open_clip's own transform pixel for pixel, the random one is the reference's: a random resized crop (area from
`scale`, aspect ratio 3/4 to 4/3, as Szegedy et al. 2015 and torchvision draw it), bicubic, and a flip. Every draw
comes from a seed of its own, so a view does not depend on who makes it, when, or beside what.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from rpl.errors import BadInput
from rpl.images import ImageRefused, decode_image

Pixels = npt.NDArray[np.uint8]
"""[H, W, 3]"""

_RATIO = (3 / 4, 4 / 3)
_MAX_PIXELS = 2**30  # the pictures come from this project's own stages, which were stricter
_TRIES = 10  # draws of a crop that fits, before the largest central one is taken


@dataclass(frozen=True)
class Preprocessing:
    """How a CLIP wants its pictures, in open_clip's terms. `size` is (height, width); `mean`, `std` of values 0-1."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0

    @property
    def resample(self) -> Image.Resampling:
        return Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Picture:
    """A file's bytes under its key, and how many random views are wanted beside the evaluation view."""

    key: str
    data: bytes
    views: int


@dataclass(frozen=True)
class ViewRecipe:
    """How views are made: the model's preprocessing, the area of random crops, the seed of all of them."""

    preprocessing: Preprocessing
    scale: tuple[float, float]
    seed: int


def cut_views(pictures: Iterable[Picture], recipe: ViewRecipe) -> Iterator[Pixels]:
    """Of one picture after the other the evaluation view, then the random views; each is decoded once.

    Raises:
        BadInput: a picture cannot be decoded.
    """
    for picture in pictures:
        image = _decode(picture)
        yield evaluation_view(image, recipe.preprocessing)
        for view in range(picture.views):
            seed = f"{recipe.seed}/{picture.key}/{view}"
            yield augmented_view(image, recipe.preprocessing, recipe.scale, seed)


def evaluation_view(image: Image.Image, how: Preprocessing) -> Pixels:
    """The whole (or central) picture at the model's size, as open_clip's evaluation transform makes it."""
    height, width = how.size
    if how.resize_mode == "squash":
        return np.asarray(image.resize((width, height), how.resample))
    resized = image.resize(_kept_ratio(image.size, how), how.resample)
    return np.asarray(_centre(resized, width, height, how.fill_color))


def augmented_view(image: Image.Image, how: Preprocessing, scale: tuple[float, float], seed: str) -> Pixels:
    """A random resized crop, flipped half of the time.

    Args:
        scale: least and greatest area of the crop, as a fraction of the picture's.
        seed: any text; the same text gives the same view.
    """
    # Only `random()` is drawn: Python promises that its sequence for a seed never changes.
    draw = random.Random(seed).random
    box = _random_box(image.size, scale, draw)
    height, width = how.size
    # Cropped first, because a resize with box= would let the bicubic kernel look beyond the crop.
    view = image.crop(box).resize((width, height), Image.Resampling.BICUBIC)
    if draw() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(view)


def _decode(picture: Picture) -> Image.Image:
    try:
        return decode_image(picture.data, max_pixels=_MAX_PIXELS)
    except ImageRefused as error:
        raise BadInput(
            f"picture {picture.key}: cannot be decoded ({error}); delete the output that holds it and make it again."
        ) from None


def _kept_ratio(size: tuple[int, int], how: Preprocessing) -> tuple[int, int]:
    """(width, height) after resizing; rounded in each mode as open_clip (or torchvision, for squares) does."""
    width, height = size
    target_height, target_width = how.size
    if how.resize_mode == "shortest" and target_height == target_width:
        short, long = min(size), max(size)
        longer = int(target_height * long / short)
        return (target_height, longer) if width <= height else (longer, target_height)
    ratios = (height / target_height, width / target_width)
    ratio = max(ratios) if how.resize_mode == "longest" else min(ratios)
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _centre(image: Image.Image, width: int, height: int, fill: int) -> Image.Image:
    """The central `width` x `height` pixels; sides that are too short get a border."""
    missing_x, missing_y = max(0, width - image.width), max(0, height - image.height)
    if missing_x or missing_y:
        padded = Image.new("RGB", (image.width + missing_x, image.height + missing_y), (fill,) * 3)
        padded.paste(image, (missing_x // 2, missing_y // 2))
        image = padded
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _random_box(
    size: tuple[int, int], scale: tuple[float, float], draw: Callable[[], float]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop inside a picture of `size` (width, height)."""
    width, height = size
    low, high = (math.log(ratio) for ratio in _RATIO)
    for _ in range(_TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draw())
        ratio = math.exp(low + (high - low) * draw())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw() * (width - w + 1)), int(draw() * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < _RATIO[0]:
        h = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        w = round(height * _RATIO[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
