"""Objects at `s3://` and `file://` URIs: read, write, list, put-if-absent, streams.

Knows nothing of runs and stages. `base` says what a store promises, `files` and `s3` keep it; this module chooses
between them by URI. boto3 is loaded when the first `s3://` URI is opened.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import BinaryIO

from rpl.errors import BadInput
from rpl.store.base import ObjectInfo, Store
from rpl.store.files import FileStore

__all__ = ["ObjectInfo", "Store", "exists_uri", "local_copy", "open_store", "open_uri", "read_uri", "stat_uri"]


def open_store(uri: str) -> Store:
    """The store at `s3://BUCKET/PREFIX`, `file:///FOLDER` or a plain path. Nothing is read or made yet.

    What follows `file://` and `s3://BUCKET/` is taken as it stands, without percent-decoding.

    Raises:
        BadInput: the URI is of no such form.
    """
    path = _local_path(uri)
    if path is not None:
        return FileStore(path, uri.rstrip("/") if path.name else uri)
    bucket, prefix = _split_s3(uri)
    from rpl.store.s3 import S3Store

    return S3Store(bucket, prefix.rstrip("/"))


def read_uri(uri: str) -> bytes:
    """The bytes of one object. Raises BadInput where it is absent."""
    store, name = _parent(uri)
    return store.read(name)


def open_uri(uri: str) -> BinaryIO:
    """One object as a stream. Raises BadInput where it is absent."""
    store, name = _parent(uri)
    return store.open(name)


def stat_uri(uri: str) -> list[ObjectInfo]:
    """What is at `uri`: one object (its path is its name), or all inside a folder or prefix, sorted; else nothing."""
    store, name = _parent(uri)
    found = store.stat(name) if name else None
    return [found] if found is not None else list(open_store(uri).list())


def exists_uri(uri: str) -> bool:
    """Whether there is an object at `uri`, or anything inside such a folder or prefix."""
    store, name = _parent(uri)
    return bool(name and store.stat(name)) or any(True for _ in open_store(uri).list())


def local_copy(uri: str, folder: Path) -> Path:
    """A local file with the bytes of the object at `uri`: the object itself if it is local, else a copy in `folder`.

    A copy that is there already is used again if the object has not changed since.

    Raises:
        BadInput: the object is absent.
    """
    store, name = _parent(uri)
    local = store.local(name)
    info = store.stat(name)
    if info is None:
        raise BadInput(f"{uri}: does not exist; correct the path.")
    if local is not None:
        return local
    tag = hashlib.sha256(f"{uri}\n{info.etag}\n{info.size}".encode()).hexdigest()[:16]
    target = folder / tag / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        store.download(name, target)
    return target


def _local_path(uri: str) -> Path | None:
    """The path that a `file://` URI or a plain path names, absolute; None for `s3://`."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme is None:
        if not uri or "\0" in uri or re.match(r"(file|s3):", uri):
            raise BadInput(f"{uri!r} is no URI; write s3://BUCKET/PREFIX, file:///FOLDER or a path.")
        return Path(uri).absolute()
    if scheme[1] == "s3":
        return None
    rest = uri.removeprefix("file://")
    if scheme[1] != "file" or not rest.startswith("/") or "\0" in rest:
        raise BadInput(f"{uri!r} cannot be opened; write s3://BUCKET/PREFIX, file:///FOLDER (three slashes) or a path.")
    return Path(rest)


def _split_s3(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}", bucket):
        raise BadInput(f"{uri!r} names no bucket; write s3://BUCKET/PREFIX, the bucket in letters, digits and hyphens.")
    return bucket, key


def _parent(uri: str) -> tuple[Store, str]:
    """The store around one object and the object's name in it; "" where `uri` can only be a folder or a bucket."""
    path = _local_path(uri)
    if path is not None:
        return FileStore(path.parent, str(path.parent)), "" if path.name == ".." else path.name
    bucket, key = _split_s3(uri)
    prefix, _, name = key.rpartition("/")
    return open_store(f"s3://{bucket}/{prefix}"), name
