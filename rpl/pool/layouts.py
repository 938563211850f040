"""Which files of a place are vectors, which are metadata, and which belong together.

    clip-retrieval    img_emb/img_emb_0.npy, metadata/metadata_0.parquet
    DataComp          UID.npz (b32_img, l14_img), UID.parquet
    LAION             img_emb_0000.npy, metadata_0000.parquet in one folder
    single files      x.npy (npz, h5, index) with x.parquet (arrow, csv, h5)
    self-contained    x.parquet with a column of vectors

Only lists and names; files are opened by `vectors` and `metadata`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rpl.errors import BadInput
from rpl.pool import metadata, vectors
from rpl.pool.files import PoolFile
from rpl.store import Store, open_store, stat_uri

_TEXT_FOLDERS = ("text_emb", "metadata")
"""Folders of clip-retrieval's layout that hold no image vectors."""


def find_files(vectors_uri: str, metadata_uri: str | None) -> tuple[list[PoolFile], list[PoolFile]]:
    """Vector files in pool order and their metadata files: one for each, or a single one for all rows.

    Raises:
        BadInput: nothing is there, or the files do not pair up; the message names the first that stands alone.
    """
    files = _listed(vectors_uri)
    found = _vector_files(files)
    if not found:
        raise BadInput(f"{vectors_uri}: holds no vectors ({', '.join(vectors.SUFFIXES)}); correct pool.vectors.")
    records = _of_first_kind(_listed(metadata_uri)) if metadata_uri is not None else _beside(found, files)
    if not records:
        where = metadata_uri or vectors_uri
        raise BadInput(
            f"{where}: holds no URLs for the vectors ({', '.join(metadata.SUFFIXES)}); set pool.metadata to them."
        )
    return _paired(found, records)


def root(uri: str) -> Store:
    """The store that a place's files are named in: the folder itself, or the one around a single file."""
    store = open_store(uri)
    if next(iter(store.list()), None) is not None:
        return store
    return open_store(uri.rpartition("/")[0] or "/")


def _listed(uri: str) -> list[PoolFile]:
    """The files in a folder, or the file itself, in natural order (9 before 10)."""
    infos = stat_uri(uri)
    if not infos:
        raise BadInput(f"{uri}: does not exist or is empty; correct the path in the configuration.")
    store = root(uri)
    return sorted((PoolFile(store, info.path) for info in infos), key=lambda file: _natural(file.path))


def _vector_files(files: Sequence[PoolFile]) -> list[PoolFile]:
    """The most telling group of files; a folder may hold several, such as parquet beside npy."""
    images = [file for file in files if "img_emb" in file.path.split("/")[:-1] and file.suffix == ".npy"]
    if images:
        return images
    plain = [file for file in files if not set(file.path.split("/")[:-1]) & set(_TEXT_FOLDERS)]
    for suffixes in ((".npz",), (".npy",), (".index", ".faiss"), (".parquet",), (".h5", ".hdf5")):
        group = [file for file in plain if file.suffix in suffixes]
        if group and suffixes != (".parquet",):
            return group
        if group and _holds_vectors(group[0]):
            return group
    return []


def _holds_vectors(file: PoolFile) -> bool:
    with vectors.opened_parquet(file) as parquet:
        return vectors.embedding_column(parquet.schema_arrow) is not None


def _beside(found: Sequence[PoolFile], files: Sequence[PoolFile]) -> list[PoolFile]:
    """Metadata near the vectors: their own parquet, a folder `metadata`, or files named after them."""
    if found[0].suffix == ".parquet":
        return list(found)
    in_folder = [file for file in files if "metadata" in file.path.split("/")[:-1]]
    if in_folder:
        return _of_first_kind(in_folder)
    names = {name for file in found for name in _names_beside(file)}
    if len(files) > 1:
        return _of_first_kind([file for file in files if file.path in names and file not in found])
    near = [PoolFile(found[0].store, name) for name in _names_beside(found[0]) if name != found[0].path]
    return _of_first_kind([file for file in near if file.store.stat(file.path) is not None])


def _names_beside(file: PoolFile) -> list[str]:
    """`x.parquet` beside `x.npy`, LAION's `metadata_0000.parquet` beside `img_emb_0000.npy`, or `metadata.parquet`."""
    folder = file.path.rpartition("/")[0]
    number = re.search(r"[-_]?\d*$", file.stem)
    stems = dict.fromkeys([file.stem, "metadata" + (number[0] if number else ""), "metadata"])
    return [f"{folder}/{stem}{suffix}".lstrip("/") for stem in stems for suffix in metadata.SUFFIXES]


def _of_first_kind(files: Sequence[PoolFile]) -> list[PoolFile]:
    """Those with the first suffix of `metadata.SUFFIXES` that occurs, since the same rows may be there in two forms."""
    groups = ([file for file in files if file.suffix == suffix] for suffix in metadata.SUFFIXES)
    return next((group for group in groups if group), [])


def _paired(found: list[PoolFile], records: list[PoolFile]) -> tuple[list[PoolFile], list[PoolFile]]:
    if len(records) == 1:
        return found, records
    for key in (_stem, _number):
        by_key = {key(file): file for file in records}
        if len(by_key) == len(records) and set(by_key) == {key(file) for file in found}:
            return found, [by_key[key(file)] for file in found]
    known = {_number(file) for file in records}
    lonely = next((file for file in found if _number(file) not in known), None)
    if lonely is not None:
        raise BadInput(f"{lonely.name}: has no metadata of the same name or number; add it or set pool.metadata.")
    numbers = {_number(file) for file in found}
    left = next((file for file in records if _number(file) not in numbers), records[-1])
    raise BadInput(f"{left.name}: belongs to no vectors by name or number; remove it or add the vectors.")


def _stem(file: PoolFile) -> str:
    return file.stem


def _number(file: PoolFile) -> str:
    """The number that ends a stem, without leading zeros; the stem where there is none."""
    match = re.search(r"(\d+)$", file.stem)
    return str(int(match[1])) if match else file.stem


def _natural(path: str) -> list[tuple[int, int, str]]:
    """A sort key under which 9 comes before 10."""
    parts = re.split(r"(\d+)", path)
    return [(0, int(part), part) if part.isdigit() and part.isascii() else (1, 0, part) for part in parts if part]
