"""Prompts with learned context vectors: `[ctx1] name [ctx2] description .` for every category, as tensors.

PromptDet (Feng et al. 2022, section 3.3): the context vectors stand where word embeddings would, are shared by all
categories, and are all that is learned. Knows nothing of losses, optimisers or files. Prompts are sorted by length
into few buckets, so that a pass is hardly longer than its texts; their fixed embeddings are looked up once, and a
pass puts the context vectors into their places for all categories at once.

Letters: C categories, T tokens, W width of the text tower, K context vectors (first ctx1's, then ctx2's),
D dimension of the shared space.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rpl.clip import ClipModel
from rpl.errors import BadInput
from rpl.text_tower import TextTower

_PLACEHOLDER = 0  # id under a context vector; its embedding is never used
_BUCKETS = 6  # at most
_BUCKET_COST = 256  # a further pass costs about as much as so many tokens
_TOKENS_AT_ONCE = 16_384  # bounds the memory of one pass through the tower
_GRAPH_BYTES = 4 * 2**30  # activations kept between a pass and its gradient: 1,200 prompts of ViT-B/32 stay below 8 GiB

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of all prompts, and where the context vectors go."""

    ids: Tensor
    """int64 [C, T], T of the longest; zeros behind the end token and under context vectors."""
    lengths: Tensor
    """int64 [C], tokens of each prompt, start and end included."""
    slots: Tensor
    """int64 [C, K], position of each context vector."""

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: npt.NDArray[np.integer]) -> PromptTokens:
        """The prompts of some categories, in the order of `rows`."""
        chosen = torch.from_numpy(rows.astype(np.int64))
        return PromptTokens(self.ids[chosen], self.lengths[chosen], self.slots[chosen])


def tokenise_prompts(
    clip: ClipModel, names: Sequence[str], descriptions: Sequence[str], n_ctx1: int, n_ctx2: int
) -> PromptTokens:
    """Prompts as the reference builds them, `X name X description.`, with X the places of context vectors.

    A category without a description reads `[ctx1] name [ctx2] .`: ctx2 stays, so that both contexts act on every
    category. A prompt that is too long for the tower loses the end of its description, with a warning in the log.

    Raises:
        BadInput: a name alone does not fit into the tower.
    """
    ids, lengths, slots = [], [], []
    room = clip.context_length
    for name, description in zip(names, descriptions, strict=True):
        before = [clip.start_token, *[_PLACEHOLDER] * n_ctx1, *clip.token_ids(name)]
        head = [*before, *[_PLACEHOLDER] * n_ctx2]
        if len(head) >= room:
            raise BadInput(f"category {name[:60]!r}: its name alone fills the {room} tokens of a prompt; shorten it.")
        tail = clip.token_ids(f"{description}.")
        if len(head) + len(tail) >= room:
            log.warning("category %r: its description is cut, since a prompt has room for %d tokens", name, room)
        whole = [*(head + tail)[: room - 1], clip.end_token]
        ids.append(whole + [0] * (room - len(whole)))
        lengths.append(len(whole))
        slots.append([*range(1, 1 + n_ctx1), *range(len(before), len(head))])
    ids_CT = torch.tensor(ids, dtype=torch.int64).reshape(len(ids), room)[:, : max(lengths, default=0)]
    slots_CK = torch.tensor(slots, dtype=torch.int64).reshape(len(ids), n_ctx1 + n_ctx2)
    return PromptTokens(ids_CT, torch.tensor(lengths, dtype=torch.int64), slots_CK)


def fill_template(template: str, name: str, description: str) -> str:
    """A hand-written prompt; the name stands in for a description that is not there."""
    return template.format(name=name, description=description or name)


@dataclass(frozen=True)
class _Bucket:
    """Prompts padded to one length: rows [C] of the bank, embeddings [C, T, W], slots [C, K], end tokens [C]."""

    rows: Tensor
    embeddings: Tensor
    slots: Tensor
    ends: Tensor

    def fill(self, context_KW: Tensor) -> Tensor:
        """Embeddings [C, T, W] with the context vectors in their places."""
        categories_C1 = torch.arange(len(self.rows), device=self.rows.device)[:, None]
        values_CKW = context_KW.expand(len(self.rows), *context_KW.shape)
        return self.embeddings.index_put((categories_C1, self.slots), values_CKW)


class PromptBank:
    """The prompts of some categories, ready for passes through a text tower.

    Args:
        tokens_at_once: a pass through the tower holds at most about so many tokens.
        graph_bytes: a pass keeps at most so much for its gradient; what is beyond is computed a second time.
    """

    def __init__(
        self, tower: TextTower, tokens: PromptTokens, tokens_at_once: int = _TOKENS_AT_ONCE,
        graph_bytes: int = _GRAPH_BYTES,
    ) -> None:  # fmt: skip
        self._tower = tower
        self._count = len(tokens)
        self.token_count = 0
        """Tokens of one pass over all categories, padding included."""
        self._buckets = list(self._make_buckets(tokens, tokens_at_once))
        graphs = np.cumsum([bucket.embeddings[..., 0].numel() * tower.bytes_per_token for bucket in self._buckets])
        self._kept = int(np.searchsorted(graphs, graph_bytes, side="right"))

    def features(self, context_KW: Tensor) -> Tensor:
        """Text features [C, D], float32, not normalised; without gradients, in little memory."""
        with torch.no_grad():
            return self._in_order([self._pass(bucket, context_KW) for bucket in self._buckets])

    def features_and_pullback(self, context_KW: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Text features [C, D], and a function that takes a loss's gradient by them [C, D] to that by `context_KW`.

        The function holds the pass's activations, and may be called once.
        """
        context_KW = context_KW.detach().requires_grad_()
        parts = []
        for number, bucket in enumerate(self._buckets):
            with torch.set_grad_enabled(number < self._kept):
                parts.append(self._pass(bucket, context_KW))

        def pullback(gradient_CD: Tensor) -> Tensor:
            # Half precision loses numbers below 6e-8: the gradient travels scaled to 1, and is scaled back at the end.
            scale = gradient_CD.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            total_KW = torch.zeros_like(context_KW)
            for bucket, part in zip(self._buckets, parts, strict=True):
                if not part.requires_grad:
                    with torch.enable_grad():
                        part = self._pass(bucket, context_KW)
                total_KW += torch.autograd.grad(part, context_KW, gradient_CD[bucket.rows] / scale)[0]
            return total_KW * scale

        return self._in_order([part.detach() for part in parts]), pullback

    def _pass(self, bucket: _Bucket, context_KW: Tensor) -> Tensor:
        return self._tower.features(bucket.fill(context_KW), bucket.ends)

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        features_CD = torch.empty((self._count, parts[0].shape[1]), device=parts[0].device)
        for bucket, part in zip(self._buckets, parts, strict=True):
            features_CD[bucket.rows] = part
        return features_CD

    def _make_buckets(self, tokens: PromptTokens, tokens_at_once: int) -> Iterator[_Bucket]:
        device = self._tower.device
        whole = self._tower.whole_length
        lengths_C = np.full(self._count, self._tower.context_length) if whole else tokens.lengths.numpy()
        for length, rows in bucket_by_length(lengths_C):
            pieces = -(-len(rows) * length // tokens_at_once)
            for piece in np.array_split(rows, pieces):
                chosen = torch.from_numpy(piece)
                ids_CT = torch.zeros((len(piece), length), dtype=torch.int64)
                known = tokens.ids[chosen, :length]
                ids_CT[:, : known.shape[1]] = known
                self.token_count += ids_CT.numel()
                yield _Bucket(
                    chosen.to(device), self._tower.embed(ids_CT), tokens.slots[chosen].to(device),
                    tokens.lengths[chosen].to(device) - 1,
                )  # fmt: skip


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
