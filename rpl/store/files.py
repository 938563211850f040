"""A store in a folder of the local (or a mounted) file system.

Knows nothing of URIs. An object is written beside its place under a `.tmp-` name, flushed to the disk, and put there
by one rename or, where it must not replace anything, by one hard link.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rpl.errors import BadInput, TryAgain
from rpl.store.base import TEMPORARY, ObjectInfo, Store, check_path, check_prefix

Fill = Callable[[BinaryIO], object]
"""Writes an object's bytes to a stream."""
Place = Callable[[Path, Path], bool]
"""Puts a finished temporary file at an object's place; whether it did."""

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class FileStore:
    """Objects as files under `root`, which is made by the first write. Promises: `rpl.store.base.Store`."""

    def __init__(self, root: Path, uri: str) -> None:
        self.uri = uri
        self._root = root

    def stat(self, path: str) -> ObjectInfo | None:
        file = self.local(path)
        with explained_file(file):
            return _info(file, path)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix, self.uri)
        top = self._root / prefix.rpartition("/")[0]
        found = []
        with explained_file(top):
            for file in _files_below(top):
                path = file.relative_to(self._root).as_posix()
                info = _info(file, path) if path.startswith(prefix) and not _is_temporary(file) else None
                if info is not None:  # None: deleted since the folder was read
                    found.append(info)
        # A walk yields a folder's files together; "a-b" sorts before "a/c" all the same.
        return iter(sorted(found))

    def read(self, path: str) -> bytes:
        file = self.local(path)
        with explained_file(file):
            return file.read_bytes()

    def read_range(self, path: str, start: int, length: int) -> bytes:
        file = self.local(path)
        with explained_file(file), file.open("rb") as stream:
            stream.seek(start)
            return stream.read(length)

    def open(self, path: str) -> BinaryIO:
        file = self.local(path)
        with explained_file(file):
            return file.open("rb")

    def write(self, path: str, data: bytes) -> None:
        self._put(path, lambda stream: stream.write(data))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        if self.stat(path) is not None:
            return False
        return self._put(path, lambda stream: stream.write(data), _link)

    def upload(self, path: str, file: Path) -> None:
        self._put(path, lambda stream: _copy(file, stream))

    def download(self, path: str, file: Path) -> None:
        source = self.local(path)
        with explained_file(source), source.open("rb") as stream, explained_file(file):
            write_atomically(file, lambda target: shutil.copyfileobj(stream, target, 1 << 20))

    def copy_from(self, other: Store, source: str, path: str) -> None:
        with other.open(source) as stream:
            self._put(path, lambda target: shutil.copyfileobj(stream, target, 1 << 20))

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            file = self.local(path)
            with explained_file(file):
                file.unlink(missing_ok=True)
                self._remove_empty_folders(file.parent)

    def discard_unfinished(self, older_than_s: float) -> Sequence[str]:
        limit = time.time() - older_than_s
        removed = []
        with explained_file(self._root):
            for file in _files_below(self._root):
                info = _info(file, file.relative_to(self._root).as_posix()) if _is_temporary(file) else None
                if info is not None and info.modified < limit:
                    file.unlink(missing_ok=True)
                    self._remove_empty_folders(file.parent)
                    removed.append(info.path)
        return sorted(removed)

    def local(self, path: str) -> Path:
        return self._root / check_path(path, self.uri)

    def _put(self, path: str, fill: Fill, place: Place | None = None) -> bool:
        file = self.local(path)
        with explained_file(file):
            return write_atomically(file, fill, place)

    def _remove_empty_folders(self, folder: Path) -> None:
        """Objects have no folders: the ones that a delete left empty go with it."""
        while folder != self._root:
            try:
                folder.rmdir()
            except OSError:
                return  # not empty, or gone already
            folder = folder.parent


def write_atomically(file: Path, fill: Fill, place: Place | None = None) -> bool:
    """Let `fill` write a temporary file beside `file`, flush it to the disk, then rename it or `place` it otherwise.

    Returns:
        Whether it was placed; a rename always is.
    """
    temporary = file.with_name(TEMPORARY + secrets.token_hex(8))
    try:
        with _open_new(temporary) as stream:
            fill(stream)
            stream.flush()
            os.fsync(stream.fileno())
        placed = (place or _replace)(temporary, file)
        _sync_folder(file.parent)
        return placed
    finally:
        temporary.unlink(missing_ok=True)


def _open_new(file: Path) -> BinaryIO:
    """Open a new file, its folders made; another process's delete may remove them in between, hence the second try."""
    for _ in range(3):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            return file.open("xb")
        except FileNotFoundError:
            continue
    return file.open("xb")


def _replace(temporary: Path, file: Path) -> bool:
    temporary.replace(file)
    return True


def _link(temporary: Path, file: Path) -> bool:
    """Put `temporary` at `file` unless something is there; whether it was put."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        # A network file system may repeat a call whose answer was lost and meet its own success (open(2)).
        return temporary.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _rename_under_lock(temporary, file)
    return True


def _rename_under_lock(temporary: Path, file: Path) -> bool:
    """As `_link`, for file systems without hard links; the folder's lock falls with the process that holds it."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if file.exists():
            return False
        temporary.replace(file)
        return True
    finally:
        os.close(folder)


def _sync_folder(folder: Path) -> None:
    """Make a new name in `folder` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some mounted file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _copy(file: Path, stream: BinaryIO) -> None:
    with file.open("rb") as source:
        shutil.copyfileobj(source, stream, 1 << 20)


def _files_below(folder: Path) -> Iterator[Path]:
    def complain(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for parent, _, names in os.walk(folder, onerror=complain):
        for name in names:
            yield Path(parent, name)


def _is_temporary(file: Path) -> bool:
    return file.name.startswith(TEMPORARY)


def _info(file: Path, path: str) -> ObjectInfo | None:
    try:
        found = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not file.is_file():
        return None
    return ObjectInfo(path, found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}", found.st_mtime)


@contextmanager
def explained_file(file: Path) -> Iterator[None]:
    """Turn the operating system's refusals about `file` into sentences."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadInput(f"{_named(error, file)}: does not exist; correct the path.") from error
    except IsADirectoryError as error:
        raise BadInput(f"{_named(error, file)}: is a folder, not a file; correct the path.") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise BadInput(f"{file}: a part of this path is a file, not a folder; correct the path.") from error
    except OSError as error:
        name = _named(error, file)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TryAgain(f"{file}: the disk is full; free space, then run it again.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP):
            reason = os.strerror(error.errno).lower()
            raise BadInput(f"{name}: {reason}; correct the path or its permissions.") from error
        raise TryAgain(f"{name}: the file system answered {error.strerror!r}; try again.") from error


def _named(error: OSError, file: Path) -> str:
    """The file that `error` is about, as the user knows it: a temporary file stands for `file`."""
    return str(file if error.filename is None or TEMPORARY in str(error.filename) else error.filename)
