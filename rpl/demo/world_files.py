"""What the demo's world is, without what makes it: its sizes, its folders, and whether it stands complete.

Light to import (no torch), so that a demo that finds everything done starts at once. `rpl.demo.world` builds it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VERSION = 2
"""Raised when the same seed and scale give another world; an older one on disk is then rebuilt."""

HOSTS = ("photos.example", "cdn.shop.example", "pics.example")
"""Reserved names: the demo maps them to its own server."""

CLIP_FOLDER = Path(__file__).parent / "clip"
CLIP_MODEL = CLIP_FOLDER / "model.json"
CLIP_WEIGHTS = CLIP_FOLDER / "weights.safetensors"
MARKER = "world.json"


@dataclass(frozen=True)
class WebPlan:
    """How many pictures of each sort."""

    per_category: int
    look_alikes: int
    off_topic: int
    copies: int


@dataclass(frozen=True)
class Scale:
    """How large a world is.

    Attributes:
        most_boxes, fewest_boxes: training boxes of the commonest and of the rarest base category.
        unlabelled: how often each novel category appears in training scenes, without a label.
        val_boxes: validation boxes of every category.
        others: things beside the categories, for look-alikes.
    """

    base: int
    novel: int
    most_boxes: int
    fewest_boxes: int
    unlabelled: int
    val_boxes: int
    others: int
    web: WebPlan


FULL = Scale(84, 40, 150, 5, 8, 24, 600, WebPlan(per_category=56, look_alikes=900, off_topic=350, copies=300))
TINY = Scale(8, 4, 9, 4, 2, 3, 30, WebPlan(per_category=10, look_alikes=16, off_topic=8, copies=6))


@dataclass(frozen=True)
class World:
    """A finished world's folder."""

    directory: Path

    @property
    def categories(self) -> Path:
        return self.directory / "categories.json"

    @property
    def pool(self) -> Path:
        return self.directory / "pool"

    @property
    def web(self) -> Path:
        return self.directory / "web"


def identity(seed: int, scale: Scale, clip_files: tuple[Path, ...]) -> dict[str, Any]:
    """What makes a world this one; the marker holds it."""
    clip = hashlib.sha256(b"".join(path.read_bytes() for path in clip_files)).hexdigest()
    return {"version": VERSION, "seed": seed, "scale": asdict(scale), "clip": clip}


def find_world(directory: Path, wanted: dict[str, Any]) -> World | None:
    """The world in `directory` if it is complete and the wanted one."""
    marker = directory / MARKER
    if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == wanted:
        return World(directory)
    return None
