"""WebDataset tars: samples of files that share a key, written so that equal samples give equal bytes.

Knows nothing of what the files hold. USTAR, time 0, owner 0, mode 644. Keys hold no dot, since readers of the format
split names at the first one and a dotted key would merge samples silently. Reading trusts nothing: names, member
types and sizes are checked, and nothing is ever unpacked to a path.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from rpl.errors import BadInput

MAX_MEMBER_BYTES = 256 * 2**20
"""Larger members are refused when reading; the pictures written here stay far below."""

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_EXTENSION = re.compile(r"[a-z0-9]{1,16}")
_NAME = re.compile(rf"(?:\./)?({_KEY.pattern})\.({_EXTENSION.pattern})")

Sample = tuple[str, Mapping[str, bytes]]
"""A key and its files by extension (without the dot)."""


def write_tar(path: Path, samples: Iterable[Sample]) -> int:
    """Write `samples` in their order, each one's files by extension; the number of samples.

    Raises:
        ValueError: a key or extension holds other characters than letters, digits, `_`, `-`, or a key comes twice.
    """
    seen: set[str] = set()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, files in samples:
            if not _KEY.fullmatch(key) or key in seen:
                raise ValueError(f"key {key!r} is {'written twice' if key in seen else 'not a plain name'}")
            seen.add(key)
            for extension in sorted(files):
                _add(tar, key, extension, files[extension])
    return len(seen)


def read_tar(path: Path, *, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar in its order, one at a time in memory.

    Raises:
        BadInput: not a tar, truncated, a member that is not a plain file `KEY.EXT`, too large or there twice. Raised
            where it is met: samples before it have been given out.
    """
    with path.open("rb") as stream:
        yield from _samples(stream, str(path), max_member_bytes)


def _samples(stream: IO[bytes], source: str, max_member_bytes: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    key: str | None = None
    files: dict[str, bytes] = {}
    seen: set[str] = set()
    for name, data in _members(stream, source, max_member_bytes):
        match = _NAME.fullmatch(name)
        if match is None:
            raise BadInput(f"{source}: member {name[:200]!r} is not named KEY.EXT; make the tar again.")
        if match[1] != key:
            if key is not None:
                yield key, files
            key, files = match[1], {}
            if key in seen:
                raise BadInput(f"{source}: key {key} comes twice; make the tar again with its files together.")
            seen.add(key)
        if match[2] in files:
            raise BadInput(f"{source}: member {name} comes twice; make the tar again.")
        files[match[2]] = data
    if key is not None:
        yield key, files


def _members(stream: IO[bytes], source: str, max_member_bytes: int) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if not member.isreg() or member.issparse():
                    raise BadInput(f"{source}: member {member.name[:200]!r} is not a plain file; make the tar again.")
                if member.size > max_member_bytes:
                    raise BadInput(
                        f"{source}: member {member.name[:200]!r} has {member.size} bytes, more than "
                        f"{max_member_bytes}; make the tar again."
                    )
                content = tar.extractfile(member)
                assert content is not None  # it is a regular file
                yield member.name, content.read()
                tar.members = []  # type: ignore[attr-defined]  # else every header read so far stays in memory
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("its end is missing")  # tarfile takes a cut between two members for an end
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise BadInput(f"{source}: is not a whole tar ({error}); make it again.") from error


def _add(tar: tarfile.TarFile, key: str, extension: str, data: bytes) -> None:
    if not _EXTENSION.fullmatch(extension):
        raise ValueError(f"extension {extension!r} of {key} is not a plain one")
    member = tarfile.TarInfo(f"{key}.{extension}")  # time 0, owner 0 and mode 644 are TarInfo's defaults
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
