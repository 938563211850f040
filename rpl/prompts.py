"""Text features of prompts with learned context vectors, for all categories at once, and gradients by the vectors.

PromptDet (Feng et al. 2022, section 3.3): the context vectors stand where word embeddings would, and are all that is
learned. Knows nothing of losses, optimisers or files; `rpl.prompt_tokens` says what a prompt is. Prompts are sorted by
length into few buckets, so that a pass is hardly longer than its texts; their fixed embeddings are looked up once, and
a pass puts the context vectors into their places for all categories at once.

Letters: C categories, N prompts, P prompts of a piece, T tokens, W width of the text tower, K context vectors,
D dimension of the shared space, M prompts of each category.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from rpl.prompt_tokens import PromptTokens
from rpl.ranks import ALONE, Ranks
from rpl.text_tower import TextTower

_BUCKETS = 6  # at most
_BUCKET_COST = 256  # a further pass costs about as much as so many tokens
# Bounds the memory of one pass through the tower, and is what ranks share out. A GPU wants larger pieces.
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16_384}
_GRAPH_BYTES = 4 * 2**30  # activations kept between a pass and its gradient: 1,200 prompts of ViT-B/32 stay below 8 GiB


@dataclass(frozen=True)
class _Piece:
    """Prompts of one length, or padded to it: a pass through the tower."""

    rows: Tensor
    """int64 [P], the prompts, as rows of the bank's tokens."""
    categories: Tensor
    """int64 [P]"""
    embeddings: Tensor
    """[P, T, W]"""
    slots: Tensor
    """int64 [P, K]"""
    ends: Tensor
    """int64 [P]"""

    def own(self, context: Tensor) -> Tensor:
        """The context vectors that act on this piece: [K, W], or [P, K, W] of each prompt's category."""
        return context if context.ndim == 2 else context[self.categories]

    def fill(self, own: Tensor) -> Tensor:
        """Embeddings [P, T, W] with the context vectors in their places."""
        prompts_P1 = torch.arange(len(self.rows), device=self.rows.device)[:, None]
        return self.embeddings.index_put((prompts_P1, self.slots), own.expand(len(self.rows), *own.shape[-2:]))

    def add(self, total: Tensor, gradient: Tensor) -> None:
        """Add a gradient by `own` to one by the whole context."""
        if total.ndim == 2:
            total += gradient
        else:
            total.index_add_(0, self.categories, gradient)


class PromptBank:
    """The prompts of some categories, ready for passes through a text tower.

    A context is [K, W], shared by all categories, or [C, K, W], one for each. With several layouts a category's
    feature is the mean of its prompts' features at length 1; with one it is that prompt's, as the tower gives it.

    Args:
        tokens_at_once: a pass through the tower holds at most about so many tokens; by default what suits the device.
        graph_bytes: a pass keeps at most so much for its gradient; what is beyond is computed a second time.
        ranks: the processes that share the passes; each asks for the same ones, in the same order.
    """

    def __init__(
        self, tower: TextTower, tokens: PromptTokens, *, tokens_at_once: int | None = None,
        graph_bytes: int = _GRAPH_BYTES, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.tower, self.tokens, self.ranks = tower, tokens, ranks
        at_once = tokens_at_once or _TOKENS_AT_ONCE.get(tower.device.type, _TOKENS_AT_ONCE["cpu"])
        pieces = [piece for bucket in self._buckets() for piece in _cut(*bucket, at_once)]
        sizes = [len(rows) * length for length, rows in pieces]
        self.token_count = sum(sizes)
        """Tokens of one pass over all categories, padding included."""
        self._owners = ranks.owners(sizes)
        mine = [size * (owner == ranks.index) for size, owner in zip(sizes, self._owners, strict=True)]
        # A piece's gradient is worth keeping while the graphs up to it fit.
        self._is_kept: list[bool] = (np.cumsum(mine) * tower.bytes_per_token <= graph_bytes).tolist()
        self._pieces = [self._make_piece(*piece) for piece in pieces]

    def __len__(self) -> int:
        """C"""
        return self.tokens.categories

    def features(self, context: Tensor) -> Tensor:
        """Text features [C, D], float32; without gradients, in little memory."""
        with torch.no_grad():
            parts = [self._forward(piece, piece.own(context), owner) for piece, owner in self._shared_out()]
            self.ranks.hand_out(parts, self._owners)
            return self._means(self._in_order(parts))

    def features_and_pullback(self, context: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Text features [C, D], and a function that takes a loss's gradient by them [C, D] to that by `context`.

        The function holds the pass's activations, and may be called once.
        """
        owns, parts = [], []
        for (piece, owner), is_kept in zip(self._shared_out(), self._is_kept, strict=True):
            owns.append(piece.own(context).detach().requires_grad_())
            with torch.set_grad_enabled(is_kept):
                parts.append(self._forward(piece, owns[-1], owner))
        found = [part.detach() for part in parts]
        self.ranks.hand_out(found, self._owners)
        prompts_ND = self._in_order(found)

        def pullback(gradient_CD: Tensor) -> Tensor:
            gradient_ND = self._gradient_of_means(prompts_ND, gradient_CD)
            # Half precision loses numbers below 6e-8: the gradient travels scaled to 1, and is scaled back at the end.
            scale = gradient_ND.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            gradients = [
                self._backward(piece, own, part, gradient_ND[piece.rows] / scale, owner)
                for (piece, owner), own, part in zip(self._shared_out(), owns, parts, strict=True)
            ]
            self.ranks.hand_out(gradients, self._owners)
            total = torch.zeros_like(context, dtype=torch.float32)
            for piece, gradient in zip(self._pieces, gradients, strict=True):
                piece.add(total, gradient)
            return total * scale

        return self._means(prompts_ND), pullback

    def _shared_out(self) -> Iterator[tuple[_Piece, int]]:
        return zip(self._pieces, self._owners, strict=True)

    def _forward(self, piece: _Piece, own: Tensor, owner: int) -> Tensor:
        if owner != self.ranks.index:
            return torch.empty((len(piece.rows), self.tower.dim), device=self.tower.device)
        return self.tower.features(piece.fill(own), piece.ends)

    def _backward(self, piece: _Piece, own: Tensor, part: Tensor, gradient_PD: Tensor, owner: int) -> Tensor:
        if owner != self.ranks.index:
            return torch.empty_like(own)
        if not part.requires_grad:
            with torch.enable_grad():
                part = self._forward(piece, own, owner)
        return torch.autograd.grad(part, own, gradient_PD)[0]

    def _means(self, prompts_ND: Tensor) -> Tensor:
        if self.tokens.layouts == 1:
            return prompts_ND
        units_CMD = functional.normalize(prompts_ND, dim=1).reshape(len(self), self.tokens.layouts, -1)
        return units_CMD.mean(1)

    def _gradient_of_means(self, prompts_ND: Tensor, gradient_CD: Tensor) -> Tensor:
        """The gradient by each prompt's feature, from that by their means."""
        if self.tokens.layouts == 1:
            return gradient_CD
        lengths_N1 = prompts_ND.norm(dim=1, keepdim=True)
        units_ND = prompts_ND / lengths_N1
        each_ND = gradient_CD.repeat_interleave(self.tokens.layouts, dim=0) / self.tokens.layouts
        along_N1 = (each_ND * units_ND).sum(1, keepdim=True)
        return torch.div(each_ND - along_N1 * units_ND, lengths_N1)

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        prompts_ND = torch.empty((len(self.tokens.ids), self.tower.dim), device=self.tower.device)
        for piece, part in zip(self._pieces, parts, strict=True):
            prompts_ND[piece.rows] = part
        return prompts_ND

    def _buckets(self) -> list[tuple[int, npt.NDArray[np.int64]]]:
        lengths_N = self.tokens.lengths.numpy()
        whole = self.tower.context_length
        return bucket_by_length(np.full(len(lengths_N), whole) if self.tower.whole_length else lengths_N)

    def _make_piece(self, length: int, rows: npt.NDArray[np.int64]) -> _Piece:
        chosen, device = torch.from_numpy(rows), self.tower.device
        ids_PT = torch.zeros((len(rows), length), dtype=torch.int64)
        known = self.tokens.ids[chosen, :length]
        ids_PT[:, : known.shape[1]] = known
        return _Piece(
            chosen.to(device), (chosen // self.tokens.layouts).to(device), self.tower.embed(ids_PT),
            self.tokens.slots[chosen].to(device), self.tokens.lengths[chosen].to(device) - 1,
        )  # fmt: skip


def _cut(length: int, rows: npt.NDArray[np.int64], at_once: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """A bucket's (length, rows) in pieces of about equal size."""
    return [(length, piece) for piece in np.array_split(rows, -(-len(rows) * length // at_once))]


def bucket_by_length(
    lengths_C: npt.NDArray[np.integer], most: int = _BUCKETS, cost: int = _BUCKET_COST
) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """(length, rows) of at most `most` buckets, such that padded tokens + `cost` per bucket are fewest.

    Exact, by dynamic programming over the lengths that occur. Rows ascend within a bucket, lengths over buckets.
    """
    values, counts = np.unique(lengths_C, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # best[j]: (tokens, starts) for the j shortest lengths; each start is the number of lengths before a bucket.
    unreached: tuple[int, list[int]] = (2**62, [])
    best: list[tuple[int, list[int]]] = [(0, []), *[unreached] * len(values)]
    answer = best[-1]
    for _ in range(most):
        longer = [
            min((best[i][0] + int((below[j] - below[i]) * values[j - 1]) + cost, [*best[i][1], i]) for i in range(j))
            for j in range(1, len(best))
        ]
        best = [unreached, *longer]
        answer = min(answer, best[-1])
    borders = [*answer[1], len(values)]
    return [
        (int(values[end - 1]), np.flatnonzero((lengths_C >= values[start]) & (lengths_C <= values[end - 1])))
        for start, end in itertools.pairwise(borders)
    ]
