"""Learned context vectors as files: this project's safetensors, and the reference's checkpoints, both ways.

Knows nothing of how they were learned. Nothing in a file is trusted: no code runs from it, shapes and numbers are
checked. Equal vectors give equal bytes.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rpl.config import DEFAULT_LAYOUT, Learn
from rpl.encoder import Encoder
from rpl.errors import BadInput

_FORMAT = "rpl-prompts-1"
_METADATA = "rpl"  # one key only: safetensors writes several in a random order
# What the readers of safetensors and torch answer malformed bytes, or other content, with.
_MALFORMED = (
    SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, TypeError, LookupError,
    AttributeError, AssertionError, struct.error,
)  # fmt: skip


class _Ignored:
    """Stands in for an object in a checkpoint that is not needed; none of its own code runs."""


def _plain_dict(*_: object) -> dict[object, object]:
    return {}


# The reference saves its scheduler whole, and with it the optimiser.
_SAFE: list[Any] = [
    (_Ignored, "torch.optim.sgd.SGD"),
    (_Ignored, "torch.optim.lr_scheduler.CosineAnnealingLR"),
    (_plain_dict, "collections.defaultdict"),
    dict,
]


@dataclass(frozen=True)
class Prompts:
    """Context vectors, float32: ctx1 [n_ctx1, W] before the name, ctx2 [n_ctx2, W] before the description.

    Class-specific ones have a further dimension in front, one row for each of `names`.
    """

    ctx1: Tensor
    ctx2: Tensor
    encoder: Encoder
    """The CLIP they were learned on; on another they mean nothing."""
    settings: Mapping[str, Any]
    """The configuration's section `learn`, and the seed."""
    names: tuple[str, ...] | None = None
    """Categories of class-specific vectors; None: the vectors are shared by all."""

    @property
    def context(self) -> Tensor:
        """[K, W] or [names, K, W], ctx1 first, as `rpl.prompts` wants it."""
        return torch.cat([self.ctx1, self.ctx2], dim=-2)

    @property
    def layouts(self) -> tuple[str, ...]:
        """In which the vectors were learned."""
        return tuple(self.settings.get("layouts", (DEFAULT_LAYOUT,)))

    def context_for(self, names: Sequence[str]) -> Tensor:
        """Context of these categories: [K, W] if shared, else [len(names), K, W].

        A category that class-specific vectors were not learned for takes the mean of those that were.
        """
        context = self.context
        if self.names is None:
            return context
        mean = context.mean(0)
        row = {name: context[number] for number, name in enumerate(self.names)}
        return torch.stack([row.get(name, mean) for name in names])


def write_prompts(path: Path, prompts: Prompts) -> None:
    metadata: dict[str, Any] = {
        "format": _FORMAT,
        "encoder": prompts.encoder.to_facts(),
        "settings": dict(prompts.settings),
    }
    if prompts.names is not None:
        metadata["names"] = prompts.names
    tensors = {"ctx1": prompts.ctx1.contiguous(), "ctx2": prompts.ctx2.contiguous()}
    save_file(tensors, path, metadata={_METADATA: json.dumps(metadata, sort_keys=True)})


def read_prompts(path: Path) -> Prompts:
    """What `write_prompts` wrote.

    Raises:
        BadInput: the file is something else, or holds other shapes or no numbers.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()[_METADATA])
            tensors = {name: file.get_tensor(name) for name in ("ctx1", "ctx2")}
        encoder, settings = Encoder.from_facts(metadata["encoder"]), dict(metadata["settings"])
        names = _names(metadata["names"]) if "names" in metadata else None
        Learn.model_validate({"layouts": settings.get("layouts", [DEFAULT_LAYOUT])})  # refuses what cannot be filled
    except _MALFORMED as error:
        raise BadInput(
            f"{path}: does not hold learned prompts; give a prompts.safetensors that learn wrote."
        ) from error
    ctx1, ctx2 = _checked(tensors, path, None if names is None else len(names))
    return Prompts(ctx1, ctx2, encoder, settings, names)


def read_reference_checkpoint(path: Path) -> tuple[Tensor, Tensor, int]:
    """ctx1, ctx2 (float32) and the epoch of a checkpoint of fcjian/RPL (`prompt_learner/model.pth.tar-N`).

    It says nothing of the CLIP it was learned on, which was OpenAI's ViT-B/32 unless its owner knows better.

    Raises:
        BadInput: not such a checkpoint, or one that would have to run code.
    """
    try:
        with torch.serialization.safe_globals(_SAFE):
            raw = torch.load(path, map_location="cpu", weights_only=True)
        state, epoch = raw["state_dict"], int(raw["epoch"])
        tensors = {name: state[name] for name in ("ctx1", "ctx2")}
    except _MALFORMED as error:
        raise BadInput(
            f"{path}: is not a checkpoint of the reference's prompt learner; give a model.pth.tar-N of its output."
        ) from error
    return *_checked(tensors, path, None), epoch


def write_reference_checkpoint(path: Path, ctx1: Tensor, ctx2: Tensor, epoch: int, embedding: Tensor | None) -> None:
    """A checkpoint that the reference's scripts load: half precision, as its CLIP is.

    Args:
        epoch: the N of the file's name, `model.pth.tar-N`.
        embedding: [C, 77, W], the fixed token embeddings of the prompts, which the reference saves beside them. With
            it, its trainer loads the checkpoint for the same categories only; None: for any.
    """
    state = OrderedDict(ctx1=ctx1.half(), ctx2=ctx2.half())
    if embedding is not None:
        state["embedding"] = embedding.half()
    torch.save({"state_dict": state, "epoch": epoch, "optimizer": None, "scheduler": None}, path)


def _names(found: object) -> tuple[str, ...]:
    if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
        raise ValueError("names of categories are a list of texts")
    return tuple(found)


def _checked(tensors: Mapping[str, Any], path: Path, rows: int | None) -> tuple[Tensor, Tensor]:
    """`rows`: of class-specific vectors; None for shared ones."""
    for name, tensor in tensors.items():
        shape = list(tensor.shape) if isinstance(tensor, Tensor) and tensor.is_floating_point() else []
        if len(shape) != (2 if rows is None else 3) or shape[:-2] != ([] if rows is None else [rows]):
            raise BadInput(f"{path}: {name} is not a table of context vectors; give a file of learned prompts.")
        if not bool(tensor.isfinite().all()):
            raise BadInput(f"{path}: {name} holds values that are not numbers; learn the prompts again.")
    ctx1, ctx2 = (tensor.detach().float() for tensor in tensors.values())
    if ctx1.shape[-1] != ctx2.shape[-1]:
        raise BadInput(f"{path}: ctx1 and ctx2 differ in width ({ctx1.shape[-1]}, {ctx2.shape[-1]}); learn them again.")
    return ctx1, ctx2
