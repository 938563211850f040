"""The frozen text tower of an open_clip model, fed with embeddings instead of token ids, and no longer than needed.

Knows nothing of prompts or learning. In CLIP's text tower attention is causal and the result is read at the end
token, so nothing behind that token can reach it: positions, mask and sequence are cut to the longest text of a
batch, and outputs and gradients stay those of the padded pass. A tower of the same family that is not causal, or not
read at its end token, gets whole-length sequences instead (`whole_length`); any other tower is refused.

Letters: N texts, T tokens, W width of the tower, D dimension of the shared space, V words of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

READ_AT_END = ("argmax", "eos")
READ_AT_EDGE = ("first", "last")


class UnfitTower(Exception):
    """This tower cannot be fed with embeddings; the message says why, as a clause."""


class TextTower:
    """The text half of `model` (open_clip's CLIP or CustomTextCLIP), as functions of embeddings.

    Args:
        model: frozen and in evaluation mode.
        end_token: id of the tokeniser's end token.
        vocabulary: number of ids the tokeniser may give.

    Raises:
        UnfitTower: the tower appends a class token, masks padding, or is not open_clip's own.
    """

    def __init__(self, model: nn.Module, *, end_token: int, vocabulary: int) -> None:
        parts, pool, end_id = _parts(model)
        self._transformer: nn.Module = parts.transformer
        self._positions_LW: Tensor = parts.positional_embedding
        self._mask_LL: Tensor | None = parts.attn_mask
        self._norm: nn.Module = parts.ln_final
        self._projection: nn.Linear | Tensor | None = parts.text_projection
        self._table_VW: Tensor = parts.token_embedding.weight
        self._pool = pool
        if pool not in READ_AT_END + READ_AT_EDGE:
            raise UnfitTower(f"it is read by {pool!r} pooling")
        if pool == "eos" and end_id != end_token:
            raise UnfitTower(f"it is read at token {end_id}, and its tokeniser ends texts with token {end_token}")
        if len(self._table_VW) < vocabulary:
            raise UnfitTower(f"it knows {len(self._table_VW)} tokens, and its tokeniser {vocabulary}")
        self.whole_length: bool = pool not in READ_AT_END or not _is_causal(self._mask_LL)
        """True: every sequence must have `context_length` tokens, since the ones behind the end token count."""

    @property
    def context_length(self) -> int:
        return len(self._positions_LW)

    @property
    def width(self) -> int:
        return self._table_VW.shape[1]

    @property
    def dim(self) -> int:
        """D"""
        if isinstance(self._projection, nn.Linear):
            return int(self._projection.out_features)
        return self.width if self._projection is None else self._projection.shape[1]

    @property
    def device(self) -> torch.device:
        return self._table_VW.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic inside; embeddings are cast to it, features come back as float32."""
        return _compute_dtype(self._transformer)

    @property
    def bytes_per_token(self) -> int:
        """Activations that a pass keeps for its gradient: about 10 W per layer (measured)."""
        return 10 * self.width * len(self._transformer.resblocks) * self.dtype.itemsize  # type: ignore[arg-type]

    def embed(self, ids_NT: Tensor) -> Tensor:
        """Token embeddings [N, T, W], float32."""
        return self._table_VW[ids_NT.to(self.device)].float()

    def features(self, embeddings_NTW: Tensor, ends_N: Tensor) -> Tensor:
        """Text features [N, D], float32, not normalised; differentiable in the embeddings.

        Args:
            embeddings_NTW: T at most `context_length`, and equal to it where `whole_length`.
            ends_N: int64, position of each text's end token. Embeddings behind it have no effect unless
                `whole_length`.
        """
        length = embeddings_NTW.shape[1]
        if self.whole_length and length != self.context_length:
            raise ValueError(f"{length} tokens, but this tower needs all {self.context_length}")
        dtype = self.dtype
        x_NTW = embeddings_NTW.to(dtype) + self._positions_LW[:length].to(dtype)
        mask = None if self._mask_LL is None else self._mask_LL[:length, :length]
        x_NTW = self._transformer(x_NTW, attn_mask=mask)
        # The norm works on each token alone, so the one that is read is enough.
        x_NW: Tensor = self._norm(x_NTW[torch.arange(len(x_NTW), device=x_NTW.device), self._read_at(ends_N, length)])
        if isinstance(self._projection, nn.Linear):
            x_NW = self._projection(x_NW)
        elif self._projection is not None:
            x_NW = x_NW @ self._projection
        return x_NW.float()

    def _read_at(self, ends_N: Tensor, length: int) -> Tensor:
        if self._pool in READ_AT_END:
            return ends_N
        return torch.full_like(ends_N, 0 if self._pool == "first" else length - 1)


def _parts(model: Any) -> tuple[Any, str, int | None]:
    """The module that holds the tower's parts, how it is read, and the end token it looks for."""
    if not hasattr(model, "text"):  # open_clip.CLIP keeps the parts in itself
        if not hasattr(model, "text_pool_type"):
            raise UnfitTower("it is not open_clip's own text transformer")
        return model, model.text_pool_type, getattr(model, "text_eos_id", None)
    tower = model.text
    if not all(hasattr(tower, part) for part in ("transformer", "positional_embedding", "ln_final", "pool_type")):
        raise UnfitTower("it is not open_clip's own text transformer")
    if getattr(tower, "cls_emb", None) is not None:
        raise UnfitTower("it appends a class token")
    if getattr(tower, "use_pad_mask", False):
        raise UnfitTower("it masks padding")
    return tower, tower.pool_type, getattr(tower, "eos_id", None)


def _is_causal(mask_LL: Tensor | None) -> bool:
    if mask_LL is None:
        return False
    future_LL = torch.ones_like(mask_LL, dtype=torch.bool).triu(1)
    return bool((mask_LL[future_LL] == -torch.inf).all() and (mask_LL[~future_LL] == 0).all())


def _compute_dtype(transformer: Any) -> torch.dtype:
    dtype: torch.dtype = transformer.get_cast_dtype()
    return dtype
