"""Which CLIP made a set of vectors: recorded in every output, compared wherever two outputs meet.

Knows nothing of torch, so that every stage can import it; `rpl.clip` fills it in. Vectors of two encoders live in
unrelated spaces: their cosines are numbers without meaning, and nothing else would show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rpl.errors import BadInput


@dataclass(frozen=True)
class Encoder:
    """A CLIP's identity: open_clip name (or config file's name), weights' tag (or file's name), digest, dimension."""

    model: str
    pretrained: str | None
    digest: str
    """SHA-256, hex, of the weights in fp32 with their names and shapes, the activation and the preprocessing."""
    dim: int

    def __str__(self) -> str:
        return f"{self.model} {self.pretrained or 'with random weights'} ({self.digest[:12]}, {self.dim} dimensions)"

    def to_facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Encoder:
        return cls(**facts)


def check_same(expected: Encoder, found: Encoder, what: str, fix: str) -> None:
    """Do nothing where both are the same CLIP, by weights and preprocessing; names may differ.

    Args:
        what: the thing that `found` made, with its verb: "the crops' features were made".
        fix: what to do, as the end of the sentence.

    Raises:
        BadInput: they differ.
    """
    if (expected.digest, expected.dim) != (found.digest, found.dim):
        raise BadInput(f"{what} with {found}, but this run's CLIP is {expected}; {fix}.")
