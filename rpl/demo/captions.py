"""What people write under pictures: captions that name the style, the object, both, or nothing useful.

Shared by the small CLIP's training and the demo's web pictures; knows nothing of pixels. The phrases here
are the demo world's whole language, so a prompt does well to sound like them.
"""

from __future__ import annotations

import random

from rpl.demo.sprites import Thing

_STYLED: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}", "a photo of {}", "a close-up photo of a {}", "photograph of a {}", "{} photo"),
    "old photo": ("a black and white photo of a {}", "an old photo of a {}", "black and white photo, {}"),
    "cartoon": ("a cartoon of a {}", "a cartoon {}", "cartoon of {}", "{} clip art", "a colour drawing of a {}"),
    "line drawing": ("a line drawing of a {}", "line art of a {}", "a black and white drawing of a {}", "{} outline"),
    "sketch": ("a sketch of a {}", "a pencil drawing of a {}", "{}, pencil sketch", "a drawing of a {} on paper"),
    "silhouette": ("a silhouette of a {}", "{} silhouette", "the dark shape of a {}"),
    "pop art": ("pop art of a {}", "a pop art {}", "a {} in strange colours", "a recoloured {}"),
    "sticker": ("a sticker of a {}", "{} sticker", "a sticker with a {} on it"),
    "chalk drawing": ("a chalk drawing of a {}", "a blueprint of a {}", "a {} drawn with chalk on a board"),
    "watercolour": ("a watercolour of a {}", "a painting of a {}", "{}, watercolour on paper"),
    "pixel art": ("pixel art of a {}", "a {} in a video game", "a low resolution picture of a {}"),
    "poster": ("a poster of a {}", "a poster with a {}", "{} poster", "an advertisement for a {}"),
    "icon": ("an icon of a {}", "{} icon", "a sign with a {}"),
    "clay model": ("a clay model of a {}", "a {} made of clay", "a toy {}", "a 3d render of a {}"),
}
_PLAIN = ("{}", "{}", "a {}", "the {}", "a picture of a {}", "an image of a {}", "this is a {}", "my {}", "a nice {}")
_USELESS = ("picture", "img 4711", "untitled", "see more here", "best offers today", "photo of the day", "dsc 0042")


def caption(style: str, thing: Thing, rng: random.Random, *, described: float = 0.4) -> str:
    """One caption; with probability `described` it also says what the thing is."""
    name = thing.name if rng.random() < 0.6 else rng.choice(thing.names)
    text = rng.choice(_STYLED[style] if rng.random() < 0.75 else _PLAIN).format(name)
    if rng.random() >= described:
        return text
    more = thing.description or f"a kind of {thing.family}"
    return rng.choice(("{}, which is {}", "{} which is {}", "{} {}", "{}, {}", "{}, {}.", "{} {} .")).format(text, more)


def pair_caption(style: str, first: Thing, second: Thing, rng: random.Random) -> str:
    """One caption for a picture of two things."""
    return caption(style, first, rng, described=0.0) + f" and a {second.name}"


def useless_caption(rng: random.Random) -> str:
    """A caption that tells nothing about the picture."""
    return rng.choice(_USELESS)
