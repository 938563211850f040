"""What every store offers, as a Protocol, and the rule for object paths.

Knows nothing of any backend. A path is relative to the store's URI, with "/" between its parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from rpl.errors import BadInput

TEMPORARY = ".tmp-"
"""How names of unfinished files begin; never an object's name."""


class ObjectInfo(NamedTuple):
    """One object. `path` is relative to the store, `size` in bytes, `modified` in seconds since 1970.

    `etag` changes when the bytes do; compare it with nothing but another etag of the same object.
    """

    path: str
    size: int
    etag: str
    modified: float


class Store(Protocol):
    """Objects under one URI.

    Every method may raise TryAgain (the store does not answer, a disk is full) and BadInput (keys, permissions, a
    bucket that is not there, an impossible path). A write is seen by every reader that starts after it returned.
    """

    uri: str

    def stat(self, path: str) -> ObjectInfo | None:
        """The object, or None if there is none."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose path begins with the text `prefix`, at any depth, sorted by path (code points)."""

    def read(self, path: str) -> bytes:
        """All bytes. Raises BadInput where the object is absent."""

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from offset `start`; fewer, or none, at the end. Raises BadInput where absent."""

    def open(self, path: str) -> BinaryIO:
        """A stream from the first byte on, not seekable everywhere. Raises BadInput where absent.

        A connection that breaks is taken up again where it broke, and only on the very same object.
        """

    def write(self, path: str, data: bytes) -> None:
        """Put or replace an object. A reader sees the old bytes or the new ones, never a part."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Put an object unless one is there. Of any number of callers at once, exactly one gets True.

        Returns:
            True: the object is this call's. False: somebody else's was there.

        Raises:
            TryAgain: the store did not say which; the object may or may not be this call's, so delete nothing.
            BadInput: the store overwrites although it is asked not to.
        """

    def upload(self, path: str, file: Path) -> None:
        """Put or replace an object with a local file's bytes; atomic as `write`, for any size."""

    def download(self, path: str, file: Path) -> None:
        """Copy an object's bytes to the local `file`, which is complete when this returns. BadInput where absent."""

    def copy_from(self, other: Store, source: str, path: str) -> None:
        """Put or replace an object with the bytes of `source` in `other`; atomic as `write`, for any size.

        Within one S3 server the bytes do not pass through this machine. BadInput where `source` is absent; it must not
        be replaced meanwhile.
        """

    def delete(self, paths: Iterable[str]) -> None:
        """Delete objects. Absent ones are passed over."""

    def discard_unfinished(self, older_than_s: float) -> Sequence[str]:
        """Remove what killed writers left half-written, unseen by readers, longer ago than that; what was removed.

        A write still under way counts from its last sign of life; choose an age beyond the longest one.
        """

    def local(self, path: str) -> Path | None:
        """The object's place in the local file system, whether or not it is there; None in a store that has none."""


def check_path(path: str, uri: str) -> str:
    """`path`, if it names an object inside the store.

    Raises:
        BadInput: it is empty, absolute, leaves the store, or has parts that some store would rewrite ("a//b").
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") or part.startswith(TEMPORARY) or "\0" in part for part in parts):
        raise BadInput(f"{uri}: {path!r} is no object path; give names joined by single slashes, without '.' or '..'.")
    return path


def check_prefix(prefix: str, uri: str) -> str:
    """`prefix`, if everything that begins with it lies inside the store. Raises BadInput otherwise."""
    parts = prefix.split("/")
    if any(part in ("", ".", "..") for part in parts[:-1]) or parts[-1] == ".." or "\0" in prefix:
        raise BadInput(f"{uri}: {prefix!r} is no prefix of object paths; give names joined by single slashes.")
    return prefix
