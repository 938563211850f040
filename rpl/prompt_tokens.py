"""Prompts as token ids, with the places where learned context vectors go: `[ctx1] name [ctx2] description .`

A layout says in which order a prompt's parts stand. The first is PromptDet's (Feng et al. 2022, section 3.3, and its
code); several make several prompts of each category, whose features are averaged. Knows nothing of towers or losses.

Letters: C categories, M layouts, N = C M prompts, T tokens, K context vectors (first ctx1's, then ctx2's).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rpl.clip import ClipModel
from rpl.config import DEFAULT_LAYOUT
from rpl.errors import BadInput

_PLACEHOLDER = 0  # id under a context vector; its embedding is never used

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of all prompts, category by category, and where the context vectors go."""

    ids: Tensor
    """int64 [N, T], T of the longest; zeros behind the end token and under context vectors."""
    lengths: Tensor
    """int64 [N], tokens of each prompt, start and end included."""
    slots: Tensor
    """int64 [N, K], position of each context vector."""
    layouts: int = 1
    """M, prompts of each category; row r is of category r // M."""

    @property
    def categories(self) -> int:
        return len(self.ids) // self.layouts

    def select(self, categories: npt.NDArray[np.integer]) -> PromptTokens:
        """The prompts of some categories, in their order."""
        rows = torch.from_numpy((categories[:, None] * self.layouts + np.arange(self.layouts)).ravel().astype(np.int64))
        return PromptTokens(self.ids[rows], self.lengths[rows], self.slots[rows], self.layouts)


def tokenise_prompts(
    clip: ClipModel, names: Sequence[str], descriptions: Sequence[str], n_ctx1: int, n_ctx2: int,
    *, layouts: Sequence[str] = (DEFAULT_LAYOUT,),
) -> PromptTokens:  # fmt: skip
    """The prompts of all categories in all layouts.

    With the default layout the ids are those of the reference's `X name X description.`, X being a context vector's
    place. A category without a description reads `[ctx1] name [ctx2] .`: ctx2 stays, so that both contexts act on
    every category. A prompt that is too long for the tower loses the end of its description, with a warning.

    Raises:
        BadInput: a prompt does not fit into the tower even without its description.
    """
    ids, lengths, slots = [], [], []
    room, counts = clip.context_length, {"ctx1": n_ctx1, "ctx2": n_ctx2}
    for name, description in zip(names, descriptions, strict=True):
        for layout in layouts:
            tokens, places = _one(clip, layout, name, description, counts)
            ids.append(tokens + [0] * (room - len(tokens)))
            lengths.append(len(tokens))
            slots.append(places)
    count = len(ids)
    return PromptTokens(
        torch.tensor(ids, dtype=torch.int64).reshape(count, room)[:, : max(lengths, default=0)],
        torch.tensor(lengths, dtype=torch.int64),
        torch.tensor(slots, dtype=torch.int64).reshape(count, n_ctx1 + n_ctx2),
        len(layouts),
    )


def fill_template(template: str, name: str, description: str) -> str:
    """A hand-written prompt; the name stands in for a description that is not there."""
    return template.format(name=name, description=description or name)


def _one(
    clip: ClipModel, layout: str, name: str, description: str, counts: Mapping[str, int]
) -> tuple[list[int], list[int]]:
    """Ids of one prompt, start and end included, and the places of ctx1's and ctx2's vectors."""
    room = clip.context_length
    *head, tail = re.split(r"\{(ctx[12])\}", layout)
    tokens = [clip.start_token]
    places: dict[str, list[int]] = {}
    for text, context in zip(head[::2], head[1::2], strict=True):
        tokens += clip.token_ids(text.format(name=name))
        places[context] = [*range(len(tokens), len(tokens) + counts[context])]
        tokens += [_PLACEHOLDER] * counts[context]
    # The configuration lets a description stand only behind all that matters more, so that it may be cut.
    kept = tail.partition("{description}")[0]
    if len(tokens) + len(clip.token_ids(kept.format(name=name))) >= room:
        raise BadInput(f"category {name[:60]!r}: its name alone fills the {room} tokens of a prompt; shorten it.")
    tokens += clip.token_ids(tail.format(name=name, description=description))
    if len(tokens) >= room:
        log.warning("category %r: its description is cut, since a prompt has room for %d tokens", name, room)
    return [*tokens[: room - 1], clip.end_token], places["ctx1"] + places["ctx2"]
