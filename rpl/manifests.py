"""What a shard of a node committed, as data: its manifest, where that lies, and the one put that makes it visible.

Knows nothing of how work is done or of what a stage computes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rpl.errors import BadInput
from rpl.rounds import Node
from rpl.store import Store

Outcome = Literal["done", "already done", "done by another", "adopted"]
"""adopted: the previous run had done the very same work, and its files were copied."""


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


@dataclass(frozen=True)
class File:
    """A committed file. `path` is relative to the run, `sha256` of its bytes in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What one shard of a node committed; readable JSON."""

    stage: str
    round: int | str | None
    shard: str
    digest: str
    attempt: str
    files: dict[str, File]
    rows: int
    facts: dict[str, Any]
    """Small results that later stages and the report read without opening a file."""
    inputs: dict[str, list[str]]
    """Contents digests of the manifests that were read, by the edge's name."""
    outside: dict[str, str]
    """Fingerprints of the files from outside the run, by URI."""
    wall_s: float
    peak_memory_bytes: int
    versions: dict[str, str] = field(default_factory=dict)
    adopted_from: str | None = None
    """The run whose files these are copies of; None: they were made here."""

    @property
    def contents(self) -> str:
        """Digest of the outputs, hex: equal for equal files and facts, whoever made them and whenever."""
        return digest_of({"files": {name: file.sha256 for name, file in self.files.items()}, "facts": self.facts})

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes, source: str) -> Manifest:
        """Raises BadInput where the bytes are not a manifest."""
        try:
            raw = json.loads(data)
            raw["files"] = {name: File(**file) for name, file in raw["files"].items()}
            return cls(**raw)
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f"{source}: is not a manifest of this version; delete it to run the stage again.") from error


@dataclass(frozen=True)
class Work:
    """What a shard of a node has to do: its digest (hex), the manifests it reads by edge, outside fingerprints."""

    digest: str
    inputs: dict[str, list[Manifest]]
    outside: dict[str, str]


def manifest_path(node: Node, shard: Shard, digest: str) -> str:
    return f"{node.path}/{shard}.{digest[:16]}.json"


def checkpoints_path(node: Node, shard: Shard, digest: str) -> str:
    """Where attempts at the same work leave what the next may use; collected like an attempt's files."""
    return f"{node.path}/attempts/checkpoint-{shard}.{digest[:16]}"


def commit(store: Store, node: Node, shard: Shard, manifest: Manifest) -> bool:
    """Make `manifest` visible, unless another attempt was first: then its files go. Whether it is visible."""
    is_ours = store.put_if_absent(manifest_path(node, shard, manifest.digest), manifest.to_json())
    store.delete([info.path for info in store.list(f"{checkpoints_path(node, shard, manifest.digest)}/")])
    if not is_ours:
        store.delete([file.path for file in manifest.files.values()])
    return is_ours


def base_accuracy(embedded: Manifest) -> float | None:
    """Validation accuracy of the learned prompt on base categories, by which rounds go on; None: unmeasured."""
    accuracy: float | None = embedded.facts["accuracy"]["learned"]["base"]
    return accuracy


def digest_of(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON, hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
