"""Small learning problems whose answer is known: features of pictures are scattered around those of hidden prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from rpl.clip import ClipModel
from rpl.config import DEFAULT_LAYOUT
from rpl.learning import OnStep, Step, Task, initial_contexts
from rpl.objective import CachedViews
from rpl.prompt_tokens import tokenise_prompts
from rpl.prompts import PromptBank
from rpl.ranks import ALONE, Ranks

NAMES = ["cat", "dog", "fire engine", "bow tie", "cup", "lemon", "violin", "tent"]
MANY_NAMES = [f"{colour} {name}" for colour in ("red", "blue", "old", "small", "wet") for name in NAMES]
"""So many that the race of starts is run among a sample of them, once `fast.RACE_CATEGORIES` is small."""
SCALE = 20.0


def views_of(text_CD: torch.Tensor, per_category: int, noise: float, seed: int) -> CachedViews:
    """Views scattered around the text features of their category, three of each image."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(text_CD)).repeat_interleave(per_category)
    centre = functional.normalize(text_CD[labels], dim=1)
    scatter = torch.randn((len(labels), 3, text_CD.shape[1]), generator=generator) * noise
    features = functional.normalize(centre[:, None] + scatter, dim=2).half()
    return CachedViews(features, labels, torch.ones(len(labels)))


def make_task(
    clip: ClipModel, *, names: Sequence[str] = NAMES, layouts: Sequence[str] = (DEFAULT_LAYOUT,),
    class_specific: bool = False, starts: int = 2, ranks: Ranks = ALONE,
) -> Task:  # fmt: skip
    """Features made with a hidden context, one for all categories or one for each; the starts are others."""
    tokens = tokenise_prompts(clip, names, ["a thing"] * len(names), 1, 1, layouts=layouts)
    bank = PromptBank(clip.text, tokens, ranks=ranks)
    size = (len(names),) if class_specific else ()
    hidden = bank.features(torch.randn((*size, 2, clip.text.width), generator=torch.Generator().manual_seed(9)))
    contexts = initial_contexts(starts, 2, clip.text.width, seed=0)
    if class_specific:
        contexts = contexts[:, None].repeat(1, len(names), 1, 1)
    return Task(bank, contexts, views_of(hidden, 32, 0.15, seed=1), views_of(hidden, 8, 0.15, seed=2), SCALE)


class TornAway(Exception):
    pass


def torn_at(step: int) -> OnStep:
    """Raises when that many steps were made; 0: never."""
    made = 0

    def on_step(_step: Step) -> None:
        nonlocal made
        made += 1
        if made == step:
            raise TornAway

    return on_step
