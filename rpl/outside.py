"""What a stage reads from outside the run, and a fingerprint of each such file, which is part of the stage's digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rpl.config import RunConfig, attribution_file
from rpl.errors import BadInput
from rpl.manifests import digest_of
from rpl.rounds import Node
from rpl.store import stat_uri


def outside_files(node: Node, config: RunConfig) -> list[str]:
    """URIs from outside the run whose contents `node` depends on. Images count through the JSON that names them."""
    if node.stage == "crop":
        boxes = [config.data.train.annotations] + ([config.data.val.annotations] if config.data.val else [])
        lists = [uri for uri in (config.categories.file, config.categories.base) if uri]
        return boxes + lists
    if node.stage == "index":
        return [uri for uri in (config.pool.vectors, config.pool.metadata) if uri]
    if node.stage in ("encode", "learn", "embed"):
        given = [config.learn.start_from] if node.stage == "learn" and config.learn.start_from else []
        return config.clip.files + given
    if node.stage == "curate" and config.pool.truth:
        return [config.pool.truth]
    if node.stage == "report":
        uri = attribution_file(config)
        return [uri] if uri and stat_uri(uri) else []
    return []


_fingerprints: dict[tuple[str, str], str] = {}
_HASHED_UP_TO = 256 * 2**20


def fingerprint(uri: str) -> str:
    """A short text that changes when the file or folder at `uri` does.

    SHA-256 of the bytes of a local file up to 256 MiB, so that a copy elsewhere is the same work; size and entity
    tag of anything else; for a folder, those of every file in it.

    Raises:
        BadInput: nothing is there.
    """
    infos = stat_uri(uri)
    if not infos:
        raise BadInput(f"{uri}: does not exist; correct the path in the configuration.")
    tag = digest_of([[info.path, info.size, info.etag] for info in infos])
    key = (uri, tag)
    if key not in _fingerprints:
        path = Path(uri.removeprefix("file://"))
        hashable = "://" not in uri.removeprefix("file://") and path.is_file() and infos[0].size <= _HASHED_UP_TO
        _fingerprints[key] = sha256_file(path) if hashable else tag
    return _fingerprints[key]


def sha256_file(path: Path) -> str:
    """SHA-256 of a local file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
