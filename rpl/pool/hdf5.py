"""HDF5 files from strangers: data sets by path, without the format's ways to reach other files.

External and soft links, external storage and virtual data sets can name any file on this machine; all are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py

from rpl.errors import BadInput
from rpl.pool.files import PoolFile


@contextmanager
def opened(file: PoolFile) -> Iterator[h5py.File]:
    """The file, open for reading. Raises BadInput where it is no HDF5 file, or a cut one."""
    try:
        handle = h5py.File(file.seekable(), "r")
    except OSError as error:
        raise BadInput(f"{file.name}: is not a whole HDF5 file ({error}); give another file.") from error
    with handle:
        yield handle


def dataset(handle: h5py.File, file: PoolFile, path: str) -> Any | None:
    """The data set at `path` ("dataset/url"), or None if nothing is there.

    Raises:
        BadInput: the way there is a link to elsewhere, or its data lie in another file.
    """
    group: Any = handle
    for part in path.split("/"):
        if not isinstance(group, h5py.Group):
            return None
        link = group.get(part, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise BadInput(f"{file.name}: {path} is a link to elsewhere; store the data in the file itself.")
        group = group[part]
    if not isinstance(group, h5py.Dataset):
        return None
    if group.external or group.is_virtual:
        raise BadInput(f"{file.name}: {path} keeps its data in another file; store them in the file itself.")
    return group
