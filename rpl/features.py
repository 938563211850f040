"""Image features as files: clip-retrieval's layout, row-aligned `.npy` (fp16) and `.parquet`, and the views beside it.

    features.npy [N, D], features.parquet (key, split, category, view_row), views.npy [M, V, D]

`split` is train, val or web; `category` is -1 for web pictures; `view_row` is the row in views.npy, -1 for none.
Knows nothing of CLIP or stages; numpy and pyarrow only. A data set's features come in shards, read here as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rpl.errors import BadInput

Half = npt.NDArray[np.float16]

_SCHEMA = pa.schema(
    [("key", pa.string()), ("split", pa.string()), ("category", pa.int32()), ("view_row", pa.int32())]
)  # fmt: skip


class FeatureWriter:
    """Writes the three files into `folder`, row after row, whatever their number; a context manager.

    Args:
        dim: D.
        views: V; every picture has so many views, or none.
    """

    def __init__(self, folder: Path, dim: int, views: int) -> None:
        self._folder, self._dim, self._views = folder, dim, views
        self._columns: tuple[list[str], list[str], list[int], list[int]] = ([], [], [], [])
        self._view_rows = 0
        self._raw = {name: (folder / f"{name}.raw").open("wb") for name in ("features", "views")}

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._raw.values():
            file.close()

    def add(self, key: str, split: str, category: int, feature: Half, views: Half) -> None:
        """A picture's feature [D] and views [V, D] or [0, D]."""
        row = (key, split, category, self._view_rows if len(views) else -1)
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)  # type: ignore[attr-defined]
        self._raw["features"].write(feature.tobytes())
        self._raw["views"].write(views.tobytes())
        self._view_rows += bool(len(views))

    def finish(self) -> list[Path]:
        """The paths of the finished files."""
        shapes = {"features": (len(self._columns[0]), self._dim), "views": (self._view_rows, self._views, self._dim)}
        for name, shape in shapes.items():
            self._raw[name].close()
            raw = self._folder / f"{name}.raw"
            # Mapped, so that millions of views pass to the finished file without being in memory at once.
            rows: Half = np.memmap(raw, np.float16, "r", shape=shape) if shape[0] else np.empty(shape, np.float16)
            np.save(self._folder / f"{name}.npy", rows)
            raw.unlink()
        table = pa.table(dict(zip(_SCHEMA.names, self._columns, strict=True)), schema=_SCHEMA)
        pq.write_table(table, self._folder / "features.parquet", compression="zstd")
        return [self._folder / name for name in ("features.npy", "features.parquet", "views.npy")]


class FeatureSet:
    """The features of all shards as one: arrays by row, views by number.

    Args:
        features, tables, views: paths of the shards' files, each in the same order.

    Raises:
        BadInput: a shard's files disagree in their number of rows.
    """

    def __init__(self, features: Sequence[Path], tables: Sequence[Path], views: Sequence[Path]) -> None:
        parts = [np.load(path, mmap_mode="r", allow_pickle=False) for path in features]
        self._views = [np.load(path, mmap_mode="r", allow_pickle=False) for path in views]
        read = [pq.read_table(path, schema=_SCHEMA) for path in tables]
        for path, part, table in zip(features, parts, read, strict=True):
            if len(part) != table.num_rows:
                raise BadInput(f"{path}: has {len(part)} rows, its parquet {table.num_rows}; run encode again.")
        joined = pa.concat_tables(read)
        self.features: Half = np.concatenate(parts)
        """[N, D]"""
        self.keys: list[str] = joined["key"].to_pylist()
        self.split = np.array(joined["split"].to_pylist(), dtype=object)
        self.category: npt.NDArray[np.int64] = joined["category"].to_numpy().astype(np.int64)
        # Each shard counts its views from 0; here they are counted through.
        starts = np.cumsum([0, *[len(part) for part in self._views]])
        numbers = [table["view_row"].to_numpy() for table in read]
        counted = [np.where(number < 0, -1, number + start) for number, start in zip(numbers, starts, strict=False)]
        self._view_row = np.concatenate(counted).astype(np.int64)
        self._starts = starts

    def views(self, rows: npt.NDArray[np.integer]) -> Half:
        """[n, V, D]: the views of the pictures at `rows`.

        Raises:
            BadInput: one of them has none.
        """
        wanted = self._view_row[rows]
        if (wanted < 0).any():
            key = self.keys[int(rows[int(np.argmax(wanted < 0))])]
            raise BadInput(f"picture {key}: has no views to learn from; run encode again.")
        found: Half = np.empty((len(rows), *self._views[0].shape[1:]), np.float16)
        for part, start in zip(self._views, self._starts, strict=False):
            here = (wanted >= start) & (wanted < start + len(part))
            found[here] = part[wanted[here] - start]
        return found
