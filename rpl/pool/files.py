"""One file of a pool, local or remote, as libraries like it: a path, or something that can seek.

Knows nothing of what the file holds.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rpl.store import Store

_READ_AHEAD = 1 << 20


@dataclass(frozen=True)
class PoolFile:
    """The object at `path` in `store`."""

    store: Store
    path: str

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.store.uri.rstrip('/')}/{self.path}"

    @property
    def suffix(self) -> str:
        return Path(self.path).suffix.lower()

    @property
    def stem(self) -> str:
        return Path(self.path).stem

    def size(self) -> int:
        """Bytes; 0 where it is absent."""
        info = self.store.stat(self.path)
        return info.size if info is not None else 0

    def stream(self) -> BinaryIO:
        """From the first byte on, for reading once."""
        return self.store.open(self.path)

    def seekable(self) -> Path | BinaryIO:
        """The local path, or a seekable stream that fetches ranges of a remote object as they are asked for."""
        local = self.store.local(self.path)
        if local is not None:
            return local
        return io.BufferedReader(_RangeFile(self), buffer_size=_READ_AHEAD)


class _RangeFile(io.RawIOBase):
    """A remote object under `read`, `seek` and `tell`."""

    def __init__(self, file: PoolFile) -> None:
        super().__init__()
        self._file = file
        self._size = file.size()
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._size - self._at)
        if wanted <= 0:
            return 0
        data = self._file.store.read_range(self._file.path, self._at, wanted)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)
