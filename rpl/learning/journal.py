"""What the text passes of an unfinished learning measured, kept so that another attempt need not take them again.

Optimisers are deterministic, and cost nothing beside the passes. So an attempt that starts over asks for the same
passes, finds them here, and comes in no time to where the last one stopped, exact to the bit; no optimiser has to
know how to be saved. Entries are found by what was asked: one that does not fit, of another machine say whose
arithmetic differs in the last bit, is never found and does no harm. Knows nothing of optimisers or stores.

    NNNNNN.safetensors: keys uint8 [n, 32], numbers float64 [n, 4], gradients float32 [n, ...]
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_EVERY_S = 30.0
_NAME = re.compile(r"\d+\.safetensors")


@dataclass(frozen=True)
class Measured:
    """What a text pass found: cross-entropies, accuracies as fractions, dL/dcontext (float32, on the CPU)."""

    loss: float
    accuracy: float
    holdout_loss: float | None
    holdout_accuracy: float | None
    gradient: Tensor


class Journal(Protocol):
    def find(self, key: bytes) -> Measured | None:
        """What was measured under `key`, if it was."""

    def add(self, key: bytes, measured: Measured) -> None:
        """Keep it, soon at the latest."""


class NoJournal:
    """Remembers nothing."""

    def find(self, key: bytes) -> Measured | None:  # noqa: ARG002
        return None

    def add(self, key: bytes, measured: Measured) -> None:
        pass


class FileJournal:
    """Entries in files; a context manager that saves what is left when an exception ends it.

    Args:
        files: what earlier attempts saved, by name. Files of another form are passed over.
        save: is given the name and bytes of a new file.
        every_s: seconds between files.
    """

    def __init__(
        self, files: Mapping[str, bytes], save: Callable[[str, bytes], None], every_s: float = _EVERY_S
    ) -> None:
        self._save, self._every_s = save, every_s
        self._found = {key: each for _, data in sorted(files.items()) for key, each in _entries(data).items()}
        self._unsaved: dict[bytes, Measured] = {}
        numbers = [int(name.split(".")[0]) for name in files if _NAME.fullmatch(name)]
        self._number = max(numbers, default=-1) + 1
        self._saved_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._found)

    def __enter__(self) -> FileJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # what was finished needs no journal
            self._flush()

    def find(self, key: bytes) -> Measured | None:
        return self._found.get(key)

    def add(self, key: bytes, measured: Measured) -> None:
        # Found at once, not only when it is saved: ranks save at different moments, and must take the same passes.
        self._found[key] = self._unsaved[key] = measured
        if time.monotonic() - self._saved_at >= self._every_s:
            self._flush()

    def _flush(self) -> None:
        if self._unsaved:
            self._save(f"{self._number:06d}.safetensors", _file(self._unsaved))
            self._number += 1
            self._unsaved = {}
        self._saved_at = time.monotonic()


def _file(entries: Mapping[bytes, Measured]) -> bytes:
    rows = [(e.loss, e.accuracy, *(math.nan if n is None else n for n in (e.holdout_loss, e.holdout_accuracy)))
            for e in entries.values()]  # fmt: skip
    data: bytes = save(
        {
            "keys": torch.frombuffer(bytearray(b"".join(entries)), dtype=torch.uint8).reshape(len(entries), -1),
            "numbers": torch.tensor(rows, dtype=torch.float64),
            "gradients": torch.stack([e.gradient for e in entries.values()]),
        }
    )
    return data


def _entries(data: bytes) -> dict[bytes, Measured]:
    try:
        tensors = load(data)
        rows = zip(tensors["keys"], tensors["numbers"].tolist(), tensors["gradients"].float(), strict=True)
        return {bytes(key.tolist()): _measured(numbers, gradient) for key, numbers, gradient in rows}
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        return {}


def _measured(numbers: list[float], gradient: Tensor) -> Measured:
    loss, accuracy, *held = numbers
    holdout_loss, holdout_accuracy = (None if math.isnan(number) else number for number in held)
    return Measured(loss, accuracy, holdout_loss, holdout_accuracy, gradient)
