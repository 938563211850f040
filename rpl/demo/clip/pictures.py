"""Training pictures and captions of the small CLIP, made while it trains and never stored.

Draws on the styles and captions that the demo's web uses too, from random streams of its own. Knows nothing
of the model. The demo's scenes (its data set) are printed in a style that is never drawn here.
"""

from __future__ import annotations

import random
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from rpl.demo.captions import caption, pair_caption, useless_caption
from rpl.demo.sprites import Thing, rasterise
from rpl.demo.styles import STYLES, Placed, place, stack

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
SPRITE_PIXELS = 72


@dataclass(frozen=True)
class Batch:
    """Pictures [B, 3, S, S], normalised as open_clip does, their B captions, and the row [B] of what they show."""

    pictures: Tensor
    captions: list[str]
    things: Tensor


class PictureSource:
    """Endless batches; the n-th batch of a seed is always the same.

    A batch knows few styles, and shows each of its things in two of them. So the style alone tells little,
    the thing must be seen; and two captions that differ only in what they say of the style must be told apart.
    """

    STYLES_PER_BATCH = 4

    def __init__(self, things: Sequence[Thing], familiar: Container[str], *, size: int, seed: int) -> None:
        """`familiar` are the emojis met more often, as some things are on the real web."""
        self.things = list(things)
        self.size = size
        self.seed = seed
        self.sprites = torch.from_numpy(rasterise([thing.emoji for thing in things], SPRITE_PIXELS))
        self.weights = torch.tensor([3.0 if thing.emoji in familiar else 1.0 for thing in things])

    def batch(self, number: int, count: int, difficulty: float) -> Batch:
        """`difficulty` 0..1: how small, cut off, crowded and worn the pictures are."""
        gen = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        rng = random.Random(f"pictures {self.seed} {number}")
        drawn = torch.multinomial(self.weights, count // 2, generator=gen).repeat(2)
        names = rng.sample(list(STYLES), self.STYLES_PER_BATCH)
        pairs = [rng.sample(names, 2) for _ in range(count // 2)]
        style_of = [first for first, _ in pairs] + [second for _, second in pairs]
        pictures = torch.empty(count, 3, self.size, self.size)
        captions = [""] * count
        for style in names:
            rows = [row for row, name in enumerate(style_of) if name == style]
            if not rows:
                continue
            index = drawn[rows]
            other = torch.randint(len(self.things), (len(rows),), generator=gen)
            is_pair = torch.rand(len(rows), generator=gen) < 0.06 * difficulty
            placed = self._placed(index, other, is_pair, difficulty, gen)
            pictures[rows] = worsen(STYLES[style](placed, gen).clamp(0, 1), difficulty, gen)
            for position, row in enumerate(rows):
                first, second = self.things[int(index[position])], self.things[int(other[position])]
                captions[row] = self._caption(style, first, second, bool(is_pair[position]), rng)
        return Batch((pictures - MEAN) / STD, captions, drawn)

    def _placed(self, index: Tensor, other: Tensor, is_pair: Tensor, difficulty: float, gen: Generator) -> Placed:
        """The thing itself, and beside or behind it another one: a partner, a stranger cut off, or none."""
        count = len(index)
        angle = torch.rand(count, generator=gen) * 2 * torch.pi
        away = torch.stack([torch.cos(angle), torch.sin(angle) * 0.6], 1)
        pair = is_pair.float().view(-1, 1)
        main = place(
            self.sprites[index],
            self.size,
            gen,
            low=0.8 - 0.35 * difficulty,
            high=1.0 + 0.05 * difficulty,
            shift=0.05 + 0.13 * difficulty,
            centre=-0.35 * away * pair,
        )
        neighbour = place(
            self.sprites[other], self.size, gen, low=0.45, high=1.0, shift=0.1, centre=away * (1.05 - 0.6 * pair)
        )
        has_neighbour = (torch.rand(count, 1, generator=gen) < 0.35 * difficulty).float()
        is_there = (has_neighbour + pair).clamp(max=1).view(-1, 1, 1, 1)
        return stack(main, Placed(neighbour.rgb, neighbour.fill * is_there, neighbour.ink * is_there))

    @staticmethod
    def _caption(style: str, first: Thing, second: Thing, is_pair: bool, rng: random.Random) -> str:
        if is_pair:
            return pair_caption(style, first, second, rng)
        return useless_caption(rng) if rng.random() < 0.01 else caption(style, first, rng)


def worsen(pictures: Tensor, difficulty: float, gen: Generator) -> Tensor:
    """What cameras, printers and rescaling do: a change of contrast, a loss of detail, some noise."""
    count, size = len(pictures), pictures.shape[-1]
    contrast = torch.rand(count, 1, 1, 1, generator=gen) * 0.5 + 0.7
    bright = (torch.rand(count, 1, 1, 1, generator=gen) - 0.5) * 0.3
    pictures = (pictures - 0.5) * contrast + 0.5 + bright
    if torch.rand(1, generator=gen) < 0.35 * difficulty:
        small = int(torch.randint(24, 52, (1,), generator=gen))
        lost = functional.interpolate(pictures, size=(small, small), mode="bilinear", antialias=True)
        pictures = functional.interpolate(lost, size=(size, size), mode="bicubic")
    amount = torch.rand(count, 1, 1, 1, generator=gen).pow(3) * 0.1 * difficulty
    return (pictures + torch.randn(pictures.shape, generator=gen) * amount).clamp(0, 1)
