"""What hangs in the demo's web: which picture at which address, and how each address behaves.

Plans the web (URLs, captions, truth, misbehaviour) and draws its pictures. Knows nothing of HTTP (server.py
serves what is planned here) nor of CLIP. Pictures come from styles.py, words from captions.py.
"""

from __future__ import annotations

import io
import math
import random
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rpl.demo.captions import caption, pair_caption, useless_caption
from rpl.demo.sprites import Sprites, Thing
from rpl.demo.styles import STYLES, Placed, place, stack
from rpl.demo.world_files import HOSTS, WebPlan

PRIVATE_TARGETS = (
    "http://169.254.169.254/latest/meta-data/",
    "http://10.0.0.1/router.jpg",
    "http://127.0.0.1:1/admin.jpg",
    "http://[::1]/secret.jpg",
)

MISBEHAVIOUR: Mapping[str, float] = {
    "not_found": 0.075,
    "flaky": 0.008,
    "redirect": 0.02,
    "redirect_private": 0.007,
    "hang": 0.001,
    "truncated": 0.018,
    "html": 0.02,
    "placeholder": 0.03,
    "bomb": 0.005,
    "wrong_type": 0.01,
    "noai": 0.014,
}
"""The part of all addresses that misbehaves in each way; the rest is "ok"."""

SIZES = (160, 192, 224, 256, 320, 384)
_OFF_TOPIC = ("pattern", "chart", "text page", "landscape")
_OFF_TOPIC_CAPTIONS = {
    "pattern": ("seamless pattern", "abstract background", "wallpaper texture", "a photo of a carpet"),
    "chart": ("quarterly results", "bar chart", "growth by region", "survey 2019"),
    "text page": ("terms and conditions", "page 4 of the manual", "how to apply", "a photo of a letter"),
    "landscape": ("sunset over the hills", "our holiday", "mountain panorama", "a photo of the valley"),
}


@dataclass(frozen=True)
class Page:
    """One address. `things` are vocabulary rows: none for off-topic pictures, two for pairs.

    `copy_of` names the page whose picture this one repeats, byte for byte or `is_reencoded`.
    """

    number: int
    url: str
    caption: str
    style: str
    things: tuple[int, ...]
    category: str
    kind: str = "ok"
    size: int = 256
    copy_of: int | None = None
    is_reencoded: bool = False
    target: str | None = None

    @property
    def file(self) -> str:
        return f"pages/{self.number // 500:03d}/{self.number:06d}.jpg"


def plan_web(things: Sequence[Thing], category_of: Mapping[int, str], plan: WebPlan, rng: random.Random) -> list[Page]:
    """All pages, in pool order. `category_of` maps vocabulary rows to the demo's category names."""
    others = [row for row in range(len(things)) if row not in category_of]
    subjects: list[tuple[tuple[int, ...], str]] = []
    for row, name in category_of.items():
        subjects += [((row,), name) for _ in range(rng.randint(plan.per_category - 8, plan.per_category + 8))]
    subjects = [
        ((rows[0], rng.choice(others)), name) if rng.random() < 0.06 else (rows, name) for rows, name in subjects
    ]
    subjects += [((rng.choice(others),), "") for _ in range(plan.look_alikes)]
    subjects += [((), "") for _ in range(plan.off_topic)]
    rng.shuffle(subjects)
    pages = [_page(number, rows, name, things, rng) for number, (rows, name) in enumerate(subjects)]
    originals = [page for page in pages if page.category]
    for source in rng.sample(originals, min(plan.copies, len(originals))):
        twin = _page(len(pages), source.things, source.category, things, rng)
        pages.append(
            replace(
                twin,
                style=source.style,
                size=source.size,
                copy_of=source.number,
                is_reencoded=rng.random() < 0.5,
            )
        )
    return _misbehave(pages, rng)


def _page(number: int, rows: tuple[int, ...], category: str, things: Sequence[Thing], rng: random.Random) -> Page:
    if rows:
        style = rng.choice(list(STYLES))
        first = things[rows[0]]
        words = pair_caption(style, first, things[rows[1]], rng) if len(rows) == 2 else caption(style, first, rng)
        slug = first.name
    else:
        style = rng.choice(_OFF_TOPIC)
        words, slug = rng.choice(_OFF_TOPIC_CAPTIONS[style]), style
    if rng.random() < 0.06:
        words = useless_caption(rng)
    size = rng.choice(SIZES)
    return Page(number, _url(number, slug, rng), words, style, rows, category, size=size)


def _url(number: int, slug: str, rng: random.Random) -> str:
    host = HOSTS[number % len(HOSTS)]
    dashed = slug.replace(" ", "-").replace("'", "")
    if host == "cdn.shop.example":
        return f"http://{host}/img/{number:06d}.jpg?w={rng.choice((200, 400, 800))}"
    if host == "photos.example":
        return f"http://{host}/{rng.randint(2009, 2021)}/{dashed}-{number:06d}.jpg"
    album = rng.choice(("album", "my%20pictures", "caf%C3%A9", "stuff"))
    return f"http://{host}/{album}/{dashed}_{number:06d}.JPG"


def _misbehave(pages: list[Page], rng: random.Random) -> list[Page]:
    """Gives every kind its share of the pages; at least one page each, however small the web."""
    order = list(range(len(pages)))
    rng.shuffle(order)
    # The rarest kinds take pages that show a category: off-topic ones would never be fetched.
    order.sort(key=lambda number: pages[number].category == "")
    start = 0
    for kind, share in sorted(MISBEHAVIOUR.items(), key=lambda item: item[1]):
        count = max(1, round(share * len(pages)))
        for number in order[start : start + count]:
            pages[number] = replace(pages[number], kind=kind)
        start += count
    good = [page for page in pages if page.kind == "ok"]
    for number, page in enumerate(pages):
        if page.kind == "redirect":
            same = [other for other in good if other.category == page.category]
            pages[number] = replace(page, target=rng.choice(same or good).url)
        elif page.kind == "redirect_private":
            pages[number] = replace(page, target=rng.choice(PRIVATE_TARGETS))
    return pages


SHARED_FILES = {
    "html": "pages/shared/moved.jpg",
    "placeholder": "pages/shared/placeholder.jpg",
    "bomb": "pages/shared/bomb.png",
}
"""Files that many pages answer; the first holds HTML under the name of a picture."""


def routes(pages: Sequence[Page]) -> dict[str, dict[str, Any]]:
    """What the server is told, by URL: kind, file to send (relative to the web folder) and target."""
    table: dict[str, dict[str, Any]] = {}
    for page in pages:
        file: str | None = SHARED_FILES.get(page.kind, page.file)
        if page.kind in ("not_found", "redirect", "redirect_private", "hang"):
            file = None
        table[page.url] = {"kind": page.kind, "file": file, "location": page.target, "copy_of": page.copy_of}
    return table


def page_bytes(page: Page, sprites: Sprites, seed: int) -> bytes:
    """The JPEG file of one page; a copy is its original's, byte for byte or compressed and scaled anew."""
    original = page.number if page.copy_of is None else page.copy_of
    picture = draw_page(page, sprites, seed)
    data = encode_jpeg(picture, quality=random.Random(f"quality {seed} {original}").choice((75, 85, 92)))
    if not page.is_reencoded:
        return data
    smaller = decode(data)
    smaller = smaller.resize((round(smaller.width * 0.8), round(smaller.height * 0.8)), Image.Resampling.LANCZOS)
    return encode_jpeg(smaller, quality=70)


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def draw_page(page: Page, sprites: Sprites, seed: int) -> Image.Image:
    """The picture of one page; depends on nothing but its arguments."""
    number = page.number if page.copy_of is None else page.copy_of
    gen = torch.Generator().manual_seed(seed * 7_368_787 + 11 + number)
    rng = random.Random(f"page {seed} {number}")
    if not page.things:
        return _OFF_TOPIC_PAINTERS[page.style](page.size, rng)
    with torch.inference_mode():
        chosen = torch.from_numpy(sprites[list(page.things)])
        if len(page.things) == 2:
            away = torch.tensor([[-0.4, rng.uniform(-0.2, 0.2)], [0.4, rng.uniform(-0.2, 0.2)]])
            both = place(chosen, page.size, gen, low=0.5, high=0.75, shift=0.06, centre=away)
            placed = stack(_one(both, 0), _one(both, 1))
        else:
            placed = place(chosen, page.size, gen, low=0.55, high=1.0, shift=0.12)
        colour = STYLES[page.style](placed, gen).clamp(0, 1)[0]
        array: NDArray[np.uint8] = (colour.permute(1, 2, 0) * 255).to(torch.uint8).numpy()
    picture = Image.fromarray(array)
    return _crop(picture, rng)


def _one(placed: Placed, row: int) -> Placed:
    part = slice(row, row + 1)
    return Placed(placed.rgb[part], placed.fill[part], placed.ink[part])


def _crop(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Pictures on the web are seldom square."""
    width, height = picture.size
    narrow = rng.choice((1.0, 1.0, 0.9, 0.82))
    if rng.random() < 0.6:
        cut = round(height * (1 - narrow) / 2)
        return picture.crop((0, cut, width, height - cut))
    cut = round(width * (1 - narrow) / 2)
    return picture.crop((cut, 0, width - cut, height))


def encode_jpeg(picture: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


def html_page() -> bytes:
    return b"<!doctype html><title>Gone</title><h1>This picture has moved</h1><p>Please visit our shop.</p>"


def placeholder() -> bytes:
    """The one picture that a host answers for all it has lost."""
    picture = Image.new("RGB", (240, 180), (225, 225, 225))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((70, 40, 170, 115), outline=(160, 160, 160), width=4)
    draw.polygon(((80, 108), (110, 70), (130, 92), (142, 80), (162, 108)), fill=(180, 180, 180))
    draw.text((66, 135), "image not available", fill=(130, 130, 130))
    return encode_jpeg(picture, 85)


def bomb(side: int = 30_000) -> bytes:
    """A white one-bit PNG of side x side pixels in about 110 KB."""
    packer = zlib.compressobj(9)
    row = b"\x00" + b"\xff" * ((side + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _pattern(size: int, rng: random.Random) -> Image.Image:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    wave = sum(
        np.sin(2 * np.pi * (rng.uniform(-9, 9) * x + rng.uniform(-9, 9) * y) + rng.uniform(0, 6)) for _ in range(3)
    )
    mix = np.clip(np.asarray(wave)[..., None] / 4 + 0.5, 0, 1)
    first, second = (np.array([rng.random() for _ in range(3)]) for _ in "12")
    return Image.fromarray(((first * mix + second * (1 - mix)) * 255).astype(np.uint8))


def _chart(size: int, rng: random.Random) -> Image.Image:
    picture = Image.new("RGB", (size, round(size * 0.75)), "white")
    draw = ImageDraw.Draw(picture)
    floor, bars = round(size * 0.68), rng.randint(4, 9)
    colour = tuple(rng.randint(30, 200) for _ in range(3))
    for bar in range(bars):
        left, wide = round(size * (0.1 + 0.85 * bar / bars)), round(size * 0.6 / bars)
        draw.rectangle((left, floor - rng.randint(size // 12, size // 2), left + wide, floor), fill=colour)
    draw.line((size * 0.07, size * 0.08, size * 0.07, floor, size * 0.97, floor), fill="black", width=2)
    return picture


def _text_page(size: int, rng: random.Random) -> Image.Image:
    picture = Image.new("RGB", (round(size * 0.75), size), (250, 248, 244))
    draw = ImageDraw.Draw(picture)
    for row in range(12, size - 12, 9):
        x = size * 0.06
        while x < size * rng.uniform(0.5, 0.66):
            wide = rng.uniform(8, 30)
            draw.rectangle((x, row, x + wide, row + 3), fill=(60, 60, 60))
            x += wide + 5
    return picture


def _landscape(size: int, rng: random.Random) -> Image.Image:
    picture = Image.new("RGB", (size, round(size * 0.66)), tuple(rng.randint(150, 240) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    sun, reach = rng.uniform(0.1, 0.9) * size, size * 0.07
    draw.ellipse((sun - reach, size * 0.12 - reach, sun + reach, size * 0.12 + reach), fill=(255, 235, 150))
    for layer in range(4):
        base, phase = size * (0.25 + 0.1 * layer), rng.uniform(0, 6)
        ridge = [
            (x, base + size * 0.05 * math.sin(phase + x / size * rng.uniform(5, 9))) for x in range(0, size + 8, 8)
        ]
        shade = tuple(round(c * (0.9 - 0.17 * layer)) for c in (110, 160, 120))
        draw.polygon([(0, size), *ridge, (size, size)], fill=shade)
    return picture


_OFF_TOPIC_PAINTERS = {"pattern": _pattern, "chart": _chart, "text page": _text_page, "landscape": _landscape}
