"""The demo's data set: scenes printed in two inks, with boxes in COCO form.

Each scene looks like a risograph print: a dark plate of lines, a second colour of rasterised tone, slightly
out of register, on patterned paper. No caption of the demo's web names this look, and the small CLIP never
saw it. Knows nothing of the web or of CLIP.

Boxes are tight around the whole drawing (before anything hides a part of it), clipped to the picture.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rpl.demo.sprites import Sprites

Plate = NDArray[np.float32]
"""[H, W] coverage in 0..1 of one printing plate."""

LINE_INKS = ((0.10, 0.16, 0.38), (0.13, 0.12, 0.13), (0.38, 0.08, 0.18), (0.07, 0.27, 0.20), (0.28, 0.12, 0.36))
TONE_INKS = (
    (0.93, 0.22, 0.28),
    (0.10, 0.50, 0.85),
    (1.00, 0.78, 0.05),
    (0.10, 0.62, 0.32),
    (1.00, 0.45, 0.10),
    (0.52, 0.36, 0.80),
    (0.95, 0.40, 0.66),
)
PAPERS = ((0.97, 0.95, 0.89), (0.95, 0.95, 0.93), (0.98, 0.93, 0.85), (0.91, 0.94, 0.95))
SIZES = ((480, 360), (400, 400), (512, 320), (360, 480))
LARGEST_COVERED = 0.45
"""An object loses no more of its box than this to one drawn later, if there is a place for it."""

Box = tuple[float, float, float, float]
"""x, y, width, height in pixels."""

Label = tuple[int, Box]
"""Category id and box."""


@dataclass(frozen=True)
class Wanted:
    """An object to draw: its sprite's row, and its category id (from 1), or 0 for an unlabelled one."""

    sprite: int
    category_id: int


@dataclass(frozen=True)
class Scene:
    """What one picture must hold; `key` names its random stream and its file."""

    key: str
    objects: tuple[Wanted, ...]


@dataclass(frozen=True)
class Drawn:
    """A finished scene: its picture and the labels of the labelled objects."""

    picture: Image.Image
    boxes: list[Label]


def deal(tokens: Sequence[Wanted], prefix: str, rng: random.Random) -> list[Scene]:
    """Shuffles the wanted objects into scenes of four to nine."""
    left = list(tokens)
    rng.shuffle(left)
    scenes: list[Scene] = []
    while left:
        count = min(len(left), rng.choice((4, 5, 6, 6, 7, 8, 9)))
        scenes.append(Scene(f"{prefix}-{len(scenes):05d}", tuple(left[:count])))
        left = left[count:]
    return scenes


def draw(scene: Scene, sprites: Sprites, seed: int) -> Drawn:
    """Prints one scene; depends on nothing but its arguments."""
    rng = random.Random(f"scene {seed} {scene.key}")
    grain = np.random.default_rng(rng.getrandbits(64))
    width, height = rng.choice(SIZES)
    line, tone = _background(width, height, rng)
    boxes: list[Label] = []
    taken: list[Box] = []
    # Large ones first: small things lie in front, as people arrange pictures.
    sides = sorted((_side(rng) for _ in scene.objects), reverse=True)
    for wanted, side in zip(scene.objects, sides, strict=True):
        stamp = _stamp(sprites[wanted.sprite], side, rng)
        x, y = _spot((stamp.shape[2], stamp.shape[1]), (width, height), taken, rng)
        box = _press(stamp, x, y, line, tone)
        taken.append(box)
        if wanted.category_id:
            boxes.append((wanted.category_id, box))
    return Drawn(_print(line, tone, rng, grain), boxes)


def coco(
    categories: Sequence[tuple[str, str]], pictures: Sequence[tuple[str, int, int]], boxes: Sequence[Sequence[Label]]
) -> dict[str, Any]:
    """The annotation file: `categories` are (name, description), `pictures` (file name, width, height).

    `boxes` holds, picture by picture, the lists that `draw` returned.
    """
    annotations: list[dict[str, Any]] = []
    for image_id, of_picture in enumerate(boxes, start=1):
        for category_id, (x, y, w, h) in of_picture:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": "Printed scenes of the RPL demo; drawings: OpenMoji", "version": "1"},
        "licenses": [{"id": 1, "name": "CC BY-SA 4.0", "url": "https://creativecommons.org/licenses/by-sa/4.0/"}],
        "images": [
            {"id": number, "file_name": name, "width": width, "height": height, "license": 1}
            for number, (name, width, height) in enumerate(pictures, start=1)
        ],
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "description": text} for number, (name, text) in enumerate(categories, start=1)
        ],
    }


def _side(rng: random.Random) -> int:
    """The side of a sprite's square in pixels, small ones more often."""
    return round(float(40 * (160 / 40) ** (rng.random() ** 1.2)))


def _stamp(sprite: NDArray[np.uint8], side: int, rng: random.Random) -> NDArray[np.float32]:
    """[3, h, w]: tone, ink and body of one object, turned, scaled and cut tight around the drawing."""
    colour = sprite[:3].astype(np.float32) / 255
    grey = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    fill, ink = sprite[3].astype(np.float32) / 255, sprite[4].astype(np.float32) / 255
    tone = (0.3 + 0.7 * (1 - grey)) * fill
    angle, is_flipped = rng.uniform(-20, 20), rng.random() < 0.5
    layers: list[NDArray[np.float32]] = []
    for layer in (tone, ink, 1 - (1 - fill) * (1 - ink)):
        image = Image.fromarray((layer * 255).astype(np.uint8))
        if is_flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.rotate(angle, resample=Image.Resampling.BICUBIC, expand=True)
        factor = side / sprite.shape[1]
        target = (max(8, round(image.width * factor)), max(8, round(image.height * factor)))
        layers.append(np.asarray(image.resize(target, Image.Resampling.LANCZOS), dtype=np.float32) / np.float32(255))
    stamp: NDArray[np.float32] = np.stack(layers)
    rows, columns = np.where(stamp[2].max(1) > 0.3)[0], np.where(stamp[2].max(0) > 0.3)[0]
    return stamp[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _spot(stamp: tuple[int, int], canvas: tuple[int, int], taken: Sequence[Box], rng: random.Random) -> tuple[int, int]:
    """A place, a little over the edge at times, that hides earlier objects as little as chance allows."""
    (w, h), (width, height) = stamp, canvas
    best, best_hidden = (0, 0), 2.0
    for _ in range(30):
        x = rng.randint(round(-0.15 * w), max(0, round(width - 0.85 * w)))
        y = rng.randint(round(-0.15 * h), max(0, round(height - 0.85 * h)))
        hidden = max((_covered(box, (x, y, w, h)) for box in taken), default=0.0)
        if hidden < best_hidden:
            best, best_hidden = (x, y), hidden
        # Neighbours may touch and overlap: accept before the best is found.
        if hidden < rng.uniform(0.0, LARGEST_COVERED):
            break
    return best


def _covered(box: Box, by: Box) -> float:
    """The part of `box` that lies under `by`."""
    x, y, w, h = box
    across = min(x + w, by[0] + by[2]) - max(x, by[0])
    down = min(y + h, by[1] + by[3]) - max(y, by[1])
    return max(0.0, across) * max(0.0, down) / (w * h)


def _press(stamp: NDArray[np.float32], x: int, y: int, line: Plate, tone: Plate) -> Box:
    """Presses a stamp onto both plates; returns its box, clipped to the picture."""
    height, width = line.shape
    left, top = max(0, x), max(0, y)
    right, bottom = min(width, x + stamp.shape[2]), min(height, y + stamp.shape[1])
    part = stamp[:, top - y : bottom - y, left - x : right - x]
    area = (slice(top, bottom), slice(left, right))
    tone[area] = tone[area] * (1 - part[2]) + part[0]
    line[area] = line[area] * (1 - part[2]) + part[1]
    return (float(left), float(top), float(right - left), float(bottom - top))


def _background(width: int, height: int, rng: random.Random) -> tuple[Plate, Plate]:
    """Patterned paper: an empty line plate with some marks, and a tone plate with one of five patterns."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    period, slant = rng.uniform(14, 40), rng.uniform(-1, 1)
    pattern = rng.choice(("stripes", "dots", "waves", "checks", "rays"))
    if pattern == "stripes":
        wave = np.sin((x + slant * y) * 2 * np.pi / period)
    elif pattern == "dots":
        wave = np.sin(x * 2 * np.pi / period) * np.sin(y * 2 * np.pi / period) - 0.3
    elif pattern == "waves":
        wave = np.sin((y + 6 * np.sin(x * 2 * np.pi / (2 * period))) * 2 * np.pi / period)
    elif pattern == "checks":
        wave = np.sin(x * np.pi / period) * np.sin(y * np.pi / period)
    else:
        wave = np.sin(np.arctan2(y - height * rng.random(), x - width * rng.random()) * rng.randint(8, 16))
    tone = (np.clip(wave * 4, 0, 1) * rng.uniform(0.15, 0.5) + rng.uniform(0, 0.12)).astype(np.float32)
    line = np.zeros((height, width), dtype=np.float32)
    for _ in range(rng.randint(0, 40)):  # small printed crosses, dots and dashes
        cx, cy = rng.randint(4, width - 5), rng.randint(4, height - 5)
        reach = rng.randint(1, 4)
        line[cy, cx - reach : cx + reach + 1] = 0.8
        if rng.random() < 0.6:
            line[cy - reach : cy + reach + 1, cx] = 0.8
    return line, tone


def _print(line: Plate, tone: Plate, rng: random.Random, grain: np.random.Generator) -> Image.Image:
    """Two inks on paper: the tone rasterised and out of register, both a little uneven."""
    height, width = line.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = rng.uniform(0.3, 1.2), rng.uniform(4.0, 7.0)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    screen = 0.5 + 0.25 * (np.cos(u * 2 * np.pi / period) + np.cos(v * 2 * np.pi / period))
    raster = np.clip((tone - screen) * 3 + 0.5, 0, 1)
    strength = rng.uniform(0.3, 0.9)
    tone = np.roll(tone * (1 - strength) + raster * strength, (rng.randint(-4, 4), rng.randint(-4, 4)), (0, 1))
    uneven = grain.random((height, width), dtype=np.float32)
    tone = tone * (0.8 + 0.2 * uneven)
    line = line * (0.78 + 0.22 * grain.random((height, width), dtype=np.float32))
    paper = np.array(rng.choice(PAPERS), dtype=np.float32)
    dark = np.array(rng.choice(LINE_INKS), dtype=np.float32)
    bright = np.array(rng.choice(TONE_INKS), dtype=np.float32)
    colour = paper * (1 - tone[..., None] * (1 - bright)) * (1 - line[..., None] * (1 - dark))
    return Image.fromarray((np.clip(colour, 0, 1) * 255).astype(np.uint8))
