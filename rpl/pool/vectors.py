"""One file of vectors, read block by block from front to back: npy, npz, parquet, HDF5, faiss.

Every reader says its rows and dimension from the header alone. Nothing is unpickled. Knows nothing of metadata, of
other shards, or of what the numbers mean.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rpl.errors import BadInput
from rpl.pool import hdf5
from rpl.pool.files import PoolFile

Block = npt.NDArray[Any]
"""Float [n, dim] of whatever width the file has."""

SUFFIXES = (".npy", ".npz", ".parquet", ".h5", ".hdf5", ".index", ".faiss")
EMBEDDING_COLUMNS = ("embedding", "embeddings", "image_embedding", "img_emb")
HDF5_PATHS = tuple(
    f"{group}{name}" for group in ("", "dataset/") for name in (*EMBEDDING_COLUMNS, "vectors", "features")
)

_HEADER_BYTES = 16_384
_NPY_MAGIC = b"\x93NUMPY"


class VectorFile(Protocol):
    """Vectors in a file; `name` is the file's in messages."""

    name: str
    rows: int
    dim: int

    def blocks(self, rows: int) -> Iterator[Block]:
        """All rows in order, at most `rows` at a time."""


def open_vectors(file: PoolFile, encoder: str | None = None) -> VectorFile:
    """A reader for `file`, by its suffix.

    Args:
        encoder: the CLIP's name; tells which array of a DataComp file is meant.

    Raises:
        BadInput: not a whole file of that kind, or not rows of floating-point numbers.
    """
    if file.suffix == ".npy":
        return _Npy(file.name, file.stream, file.size())
    if file.suffix == ".npz":
        return _open_npz(file, encoder)
    if file.suffix == ".parquet":
        return _Parquet(file)
    if file.suffix in (".h5", ".hdf5"):
        return _Hdf5(file)
    if file.suffix in (".index", ".faiss"):
        return _Faiss(file)
    raise BadInput(f"{file.name}: is of no known kind; give vectors as {', '.join(SUFFIXES)}.")


class _Npy:
    """An array in numpy's format, behind anything that opens a stream of it."""

    def __init__(self, name: str, opener: Callable[[], BinaryIO], size: int) -> None:
        self.name = name
        self._opener = opener
        with opener() as stream:
            head = io.BytesIO(stream.read(_HEADER_BYTES))
        shape, self._dtype = _npy_header(head, name)
        self.rows, self.dim = shape
        self._start = head.tell()
        expected = self._start + self.rows * self.dim * self._dtype.itemsize
        if size != expected:
            raise BadInput(f"{name}: has {size} bytes, but its header promises {expected}; copy or download it again.")

    def blocks(self, rows: int) -> Iterator[Block]:
        row_bytes = self.dim * self._dtype.itemsize
        with self._opener() as stream:
            _read_exactly(stream, self._start, self.name)
            for start in range(0, self.rows, rows):
                count = min(rows, self.rows - start)
                data = _read_exactly(stream, count * row_bytes, self.name)
                yield np.frombuffer(data, self._dtype).reshape(count, self.dim)


class _Parquet:
    """A list column of a parquet file."""

    def __init__(self, file: PoolFile) -> None:
        self.name = file.name
        self._file = file
        with opened_parquet(file) as parquet:
            self.rows = parquet.metadata.num_rows
            self._column = embedding_column(parquet.schema_arrow)
            if self._column is None:
                columns = ", ".join(parquet.schema_arrow.names)
                raise BadInput(f"{file.name}: has no column 'embedding' (but {columns}); rename the one with vectors.")
            first = next(parquet.iter_batches(1, columns=[self._column]), None)
        self.dim = 0 if first is None or first[0][0].as_py() is None else len(first[0][0])
        if self.rows and not self.dim:
            raise BadInput(f"{file.name}: row 0 has no vector; remove the row or correct it.")

    def blocks(self, rows: int) -> Iterator[Block]:
        done = 0
        with opened_parquet(self._file) as parquet:
            for batch in parquet.iter_batches(rows, columns=[self._column]):
                lists = batch[0]
                lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
                wrong = np.flatnonzero(lengths != self.dim)
                if len(wrong):
                    raise BadInput(
                        f"{self.name}: row {done + wrong[0]} has {lengths[wrong[0]]} numbers, but row 0 has "
                        f"{self.dim}; remove the row or correct it."
                    )
                values = lists.flatten().to_numpy(zero_copy_only=False)
                yield _floats(values.reshape(-1, self.dim), self.name)
                done += len(lists)


class _Hdf5:
    """A two-dimensional data set of an HDF5 file."""

    def __init__(self, file: PoolFile) -> None:
        self.name = file.name
        self._file = file
        with hdf5.opened(file) as handle:
            found = [path for path in HDF5_PATHS if hdf5.dataset(handle, file, path) is not None]
            if not found:
                raise BadInput(f"{file.name}: has none of the data sets {', '.join(HDF5_PATHS)}; rename the vectors'.")
            self._path = found[0]
            data: Any = hdf5.dataset(handle, file, self._path)
            self.rows, self.dim = _matrix_shape(data.shape, data.dtype, file.name)

    def blocks(self, rows: int) -> Iterator[Block]:
        with hdf5.opened(self._file) as handle:
            data: Any = hdf5.dataset(handle, self._file, self._path)
            for start in range(0, self.rows, rows):
                yield np.asarray(data[start : start + rows])


class _Faiss:
    """The vectors that a faiss index holds, decoded from its codes: exact for flat ones, else what it would score."""

    def __init__(self, file: PoolFile) -> None:
        self.name = file.name
        self._index = _read_faiss(file)
        self.rows, self.dim = int(self._index.ntotal), int(self._index.d)

    def blocks(self, rows: int) -> Iterator[Block]:
        import faiss

        inverted = faiss.try_extract_index_ivf(self._index)
        if inverted is not None:
            inverted.make_direct_map()  # else each row is looked for in every list
        for start in range(0, self.rows, rows):
            numbers = np.arange(start, min(start + rows, self.rows), dtype=np.int64)
            try:
                yield self._index.reconstruct_batch(numbers)
            except RuntimeError as error:
                raise BadInput(
                    f"{self.name}: this kind of index ({type(self._index).__name__}) does not give its vectors back; "
                    "give the vectors themselves."
                ) from error


def embedding_column(schema: pa.Schema) -> str | None:
    """The column of a parquet file that holds vectors, if one does."""
    return next((name for name in schema.names if name.lower() in EMBEDDING_COLUMNS), None)


def opened_parquet(file: PoolFile) -> pq.ParquetFile:
    """Raises BadInput where the file is no parquet file, or a cut one."""
    try:
        return pq.ParquetFile(file.seekable())
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{file.name}: is not a whole parquet file ({_one_line(error)}); copy it again.") from error


def _open_npz(file: PoolFile, encoder: str | None) -> _Npy:
    member = _npz_member(file, encoder)

    def opener() -> BinaryIO:
        # the archive is closed with the last stream that reads from it
        return cast(BinaryIO, zipfile.ZipFile(file.seekable()).open(member))

    return _Npy(f"{file.name}[{member.filename.removesuffix('.npy')}]", opener, member.file_size)


def _npz_member(file: PoolFile, encoder: str | None) -> zipfile.ZipInfo:
    """The image vectors among a DataComp file's arrays (`b32_img`, `b32_txt`, `l14_img`, `l14_txt`)."""
    try:
        with zipfile.ZipFile(file.seekable()) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise BadInput(f"{file.name}: is not a whole .npz file ({_one_line(error)}); copy it again.") from error
    images = [name for name in members if name.endswith("_img")] or list(members)
    if encoder is not None and len(images) > 1:
        short = encoder.lower().replace("-", "")
        images = [name for name in images if name.removesuffix("_img") in short] or images
    if len(images) != 1:
        raise BadInput(
            f"{file.name}: holds {', '.join(sorted(images)) or 'nothing'}; set pool.encoder to the CLIP to use, such "
            "as ViT-B-32 for b32_img."
        )
    return members[images[0]]


def _npy_header(stream: io.BytesIO, name: str) -> tuple[tuple[int, int], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, columns_first, dtype = readers[version](stream)
    except (ValueError, KeyError) as error:
        raise BadInput(f"{name}: is not a .npy file ({_one_line(error)}); write it with numpy.save.") from error
    if columns_first:
        raise BadInput(f"{name}: is stored column by column; save numpy.ascontiguousarray of it.")
    return _matrix_shape(shape, dtype, name), dtype


def _matrix_shape(shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> tuple[int, int]:
    if len(shape) != 2 or shape[1] < 1:
        raise BadInput(f"{name}: is an array of shape {list(shape)}; give one row of numbers for each picture.")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise BadInput(f"{name}: holds {dtype.name} values; give vectors as float16, float32 or float64.")
    return shape[0], shape[1]


def _floats(block: Block, name: str) -> Block:
    if block.dtype.kind != "f":
        raise BadInput(f"{name}: holds {block.dtype.name} values; give vectors as float16, float32 or float64.")
    return block


def _read_faiss(file: PoolFile) -> Any:
    import faiss

    local = file.store.local(file.path)
    try:
        if local is not None:
            return faiss.read_index(str(local), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        with TemporaryDirectory(prefix="rpl-faiss-") as folder:
            copy = Path(folder) / "pool.index"
            file.store.download(file.path, copy)
            return faiss.read_index(str(copy))
    except RuntimeError as error:
        raise BadInput(f"{file.name}: is not a whole faiss index ({_one_line(error)}); copy it again.") from error


def _read_exactly(stream: BinaryIO, count: int, name: str) -> bytes:
    parts = []
    while count:
        part = stream.read(count)
        if not part:
            raise BadInput(f"{name}: ends early; copy or download it again.")
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
