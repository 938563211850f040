"""One file of URLs and captions, looked up by row: parquet, arrow, csv, HDF5.

Column names differ between public pools (`url`, `URL`; `caption`, `TEXT`), so they are found, case aside. Rows are
read by row group, never the whole file where the format allows. Knows nothing of vectors or of other shards.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from rpl.errors import BadInput
from rpl.pool import hdf5
from rpl.pool.files import PoolFile
from rpl.pool.vectors import opened_parquet

SUFFIXES = (".parquet", ".arrow", ".feather", ".csv", ".tsv", ".h5", ".hdf5")
URL_COLUMNS = ("url", "image_url", "img_url")
CAPTION_COLUMNS = ("caption", "text", "top_caption", "alt_text")

_HDF5_ROWS = 65_536
"""Rows read at once from HDF5, where picking single rows is slow."""

Rows = npt.NDArray[np.int64]
"""Row numbers, from 0."""

Records = tuple[list[str], list[str]]
"""URLs and captions; a missing one is empty."""


class MetadataFile(Protocol):
    """URLs and captions in a file."""

    rows: int

    def take(self, rows: Rows) -> Records:
        """Those of the given rows, which are sorted and inside the file."""


def open_metadata(file: PoolFile) -> MetadataFile:
    """A reader for `file`, by its suffix.

    Raises:
        BadInput: not a whole file of that kind, or without URLs; the message names the columns found.
    """
    if file.suffix == ".parquet":
        return _Parquet(file)
    if file.suffix in (".h5", ".hdf5"):
        return _Hdf5(file)
    if file.suffix in (".arrow", ".feather"):
        return _Table(file, _read_arrow(file))
    if file.suffix in (".csv", ".tsv"):
        return _Table(file, _read_csv(file))
    raise BadInput(f"{file.name}: is of no known kind; give metadata as {', '.join(SUFFIXES)}.")


class _Parquet:
    def __init__(self, file: PoolFile) -> None:
        self._file = file
        with opened_parquet(file) as parquet:
            self._columns = _columns(parquet.schema_arrow, file)
            counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        self._starts = np.cumsum([0, *counts])
        self.rows = int(self._starts[-1])

    def take(self, rows: Rows) -> Records:
        urls: list[str] = []
        captions: list[str] = []
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        with opened_parquet(self._file) as parquet:
            for group in np.unique(groups):
                table = parquet.read_row_group(int(group), columns=[name for name in self._columns if name])
                inside = rows[groups == group] - self._starts[group]
                _extend(urls, captions, table.take(inside), self._columns)
        return urls, captions


class _Table:
    """Formats that are read whole, or mapped into memory."""

    def __init__(self, file: PoolFile, table: pa.Table) -> None:
        self._columns = _columns(table.schema, file)
        self._table = table.select([name for name in self._columns if name])
        self.rows = table.num_rows

    def take(self, rows: Rows) -> Records:
        urls: list[str] = []
        captions: list[str] = []
        _extend(urls, captions, self._table.take(rows), self._columns)
        return urls, captions


class _Hdf5:
    """`dataset/url` and `dataset/caption`, as LAION's metadata service and the reference read them."""

    def __init__(self, file: PoolFile) -> None:
        self._file = file
        with hdf5.opened(file) as handle:
            url = self._find(handle, URL_COLUMNS)
            if url is None:
                raise BadInput(f"{file.name}: has no data set 'dataset/url'; store the URLs under that name.")
            self._url, self._caption = url, self._find(handle, CAPTION_COLUMNS)
            self.rows = len(hdf5.dataset(handle, file, url))  # type: ignore[arg-type]

    def take(self, rows: Rows) -> Records:
        with hdf5.opened(self._file) as handle:
            urls = self._values(handle, self._url, rows)
            return urls, self._values(handle, self._caption, rows) if self._caption else [""] * len(rows)

    def _find(self, handle: Any, names: Sequence[str]) -> str | None:
        for path in (f"{group}{name}" for group in ("dataset/", "") for name in names):
            data = hdf5.dataset(handle, self._file, path)
            if data is None:
                continue
            if len(data.shape) != 1 or not (h5py.check_string_dtype(data.dtype) or data.dtype.kind == "S"):
                raise BadInput(f"{self._file.name}: {path} is no list of texts ({data.dtype}); store strings there.")
            return path
        return None

    def _values(self, handle: Any, path: str, rows: Rows) -> list[str]:
        data: Any = hdf5.dataset(handle, self._file, path)
        found: list[str] = []
        blocks = rows // _HDF5_ROWS
        for block in np.unique(blocks):
            wanted = rows[blocks == block]
            values = data[int(wanted[0]) : int(wanted[-1]) + 1]
            found += [_text(values[row]) for row in wanted - wanted[0]]
        return found


def _columns(schema: pa.Schema, file: PoolFile) -> tuple[str, str | None]:
    """Names of the URL and caption columns. Raises BadInput where there are no URLs, or the column holds no text."""
    url = _named(schema, URL_COLUMNS)
    if url is None:
        raise BadInput(f"{file.name}: has no column 'url' (but {', '.join(schema.names)}); rename the one with URLs.")
    caption = _named(schema, CAPTION_COLUMNS)
    for name in (url, caption):
        if name is not None and not _is_text(schema.field(name).type):
            raise BadInput(
                f"{file.name}: column {name!r} holds {schema.field(name).type}, not text; store strings there."
            )
    return url, caption


def _named(schema: pa.Schema, wanted: Sequence[str]) -> str | None:
    by_small = {name.lower(): name for name in reversed(schema.names)}  # of `url` and `URL`, the first stays
    return next((by_small[name] for name in wanted if name in by_small), None)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    checks: tuple[Callable[[pa.DataType], bool], ...] = (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null,
    )  # fmt: skip
    return any(check(kind) for check in checks)


def _extend(urls: list[str], captions: list[str], table: pa.Table, columns: tuple[str, str | None]) -> None:
    url, caption = columns
    urls += [_text(value) for value in table[url].to_pylist()]
    captions += [_text(value) for value in table[caption].to_pylist()] if caption else [""] * table.num_rows


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _read_arrow(file: PoolFile) -> pa.Table:
    """Arrow's file format (mapped where it is local) or its stream format, which Hugging Face's files are in."""
    place = file.seekable()
    source = pa.memory_map(str(place)) if not hasattr(place, "read") else pa.PythonFile(place, "r")
    try:
        try:
            return pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{file.name}: is not a whole arrow file ({_one_line(error)}); copy it again.") from error


def _read_csv(file: PoolFile) -> pa.Table:
    """The URL and caption columns, as text whatever they look like."""
    with file.stream() as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        lines = csv.reader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            schema = pa.schema([(name, pa.string()) for name in next(lines, [])])
            places = {name: schema.names.index(name) for name in _columns(schema, file) if name}
            columns: dict[str, list[str]] = {name: [] for name in places}
            for row in lines:
                if len(row) != len(schema):
                    raise BadInput(
                        f"{file.name}: line {lines.line_num} has {len(row)} fields, not {len(schema)}; correct it."
                    )
                for name, place in places.items():
                    columns[name].append(row[place])
        except (csv.Error, UnicodeDecodeError) as error:
            raise BadInput(f"{file.name}: line {lines.line_num + 1} cannot be read ({error}); correct it.") from error
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
