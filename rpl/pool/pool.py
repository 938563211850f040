"""A pool as one long table: vectors streamed in blocks from the first row to the last, URLs and captions by row.

Vectors leave this module as float32 of length 1, whatever the file held, so a dot product is a cosine. A row that
cannot be made so (NaN, infinite, all zeros) stops the stage by name. Knows nothing of queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rpl import config
from rpl.errors import BadInput
from rpl.pool.files import PoolFile
from rpl.pool.layouts import find_files, root
from rpl.pool.metadata import Records, Rows, open_metadata
from rpl.pool.vectors import VectorFile, open_vectors

Vectors = npt.NDArray[np.float32]

ROWS_PER_BLOCK = 16_384
"""Rows held at once: 34 MB of float32 at dimension 512."""

NOT_UNIT = 0.01
"""Vectors whose length differs from 1 by more were not normalised; half precision differs by less."""


@dataclass(frozen=True)
class PoolShard:
    """A vector file with the stretch of a metadata file that goes with it."""

    vectors: str
    """Path below pool.vectors, or the file's own name where that is a file."""
    metadata: str
    """The same below pool.metadata; below pool.vectors where that is not set."""
    first_row: int
    """Row of its first vector in the pool."""
    rows: int
    metadata_row: int
    """Row of the same picture in the metadata file; above 0 only where one file serves several shards."""


class Pool:
    """`rows` vectors of `dim` numbers in `shards`. Made by `open_pool` or `pool_from_json`; files open when read."""

    def __init__(self, settings: config.Pool, dim: int, shards: Sequence[PoolShard]) -> None:
        self.dim = dim
        self.shards = tuple(shards)
        self.rows = sum(shard.rows for shard in shards)
        self._encoder = settings.encoder
        self._vectors = root(settings.vectors)
        self._metadata = root(settings.metadata) if settings.metadata else self._vectors
        self._first_rows = np.array([shard.first_row for shard in shards], np.int64)

    def blocks(self, rows_per_block: int = ROWS_PER_BLOCK) -> Iterator[tuple[int, Vectors]]:
        """`(first_row, vectors)`, float32 [n, dim] of length 1, in row order; a block never spans two files.

        Raises:
            BadInput: a row is no direction; the message names file and row.
        """
        for first_row, block, _ in self._blocks(rows_per_block):
            yield first_row, block

    def check(self, rows_per_block: int = ROWS_PER_BLOCK) -> Iterator[tuple[int, int]]:
        """Read everything once; for each block its rows, and how many of them were not of length 1 in the file.

        Raises:
            BadInput: as `blocks`.
        """
        for _, block, lengths in self._blocks(rows_per_block):
            yield len(block), int((np.abs(lengths - 1) > NOT_UNIT).sum())

    def records(self, rows: Rows) -> Records:
        """URLs and captions of `rows`, which are sorted."""
        urls: list[str] = []
        captions: list[str] = []
        owners = np.searchsorted(self._first_rows, rows, side="right") - 1
        for owner in np.unique(owners):
            shard = self.shards[owner]
            inside = rows[owners == owner] - shard.first_row + shard.metadata_row
            found_urls, found_captions = open_metadata(PoolFile(self._metadata, shard.metadata)).take(inside)
            urls += found_urls
            captions += found_captions
        return urls, captions

    def to_json(self) -> dict[str, Any]:
        """What `pool_from_json` needs to open the pool again without looking at every file."""
        return {"rows": self.rows, "dim": self.dim, "shards": [asdict(shard) for shard in self.shards]}

    def _blocks(self, rows_per_block: int) -> Iterator[tuple[int, Vectors, Vectors]]:
        for shard in self.shards:
            file = open_vectors(PoolFile(self._vectors, shard.vectors), self._encoder)
            done = 0
            for block in file.blocks(rows_per_block):
                unit, lengths = _unit_rows(block, file.name, done)
                yield shard.first_row + done, unit, lengths
                done += len(block)


def open_pool(settings: config.Pool) -> Pool:
    """Find the pool's files and check that they fit together: counts of rows, dimensions, URLs.

    Raises:
        BadInput: they do not, or one is missing, empty, cut or of an unknown kind. Vectors themselves are checked as
            they are read.
    """
    vector_files, metadata_files = find_files(settings.vectors, settings.metadata)
    opened = [open_vectors(file, settings.encoder) for file in vector_files]
    for file in opened:
        if file.rows == 0:
            raise BadInput(f"{file.name}: has no rows; remove it from the pool.")
        if file.dim != opened[0].dim:
            raise BadInput(
                f"{file.name}: has vectors of {file.dim} numbers, but {opened[0].name} of {opened[0].dim}; give files "
                "that one CLIP made."
            )
    if len(metadata_files) == 1:
        _check_rows(opened, metadata_files[0])
    else:
        for file, records in zip(opened, metadata_files, strict=True):
            _check_rows([file], records)
    shards, first_row = [], 0
    for number, file in enumerate(opened):
        records = metadata_files[0 if len(metadata_files) == 1 else number]
        metadata_row = first_row if len(metadata_files) == 1 else 0
        shards.append(PoolShard(vector_files[number].path, records.path, first_row, file.rows, metadata_row))
        first_row += file.rows
    return Pool(settings, opened[0].dim, shards)


def pool_from_json(raw: dict[str, Any], settings: config.Pool) -> Pool:
    """The pool that `Pool.to_json` described, at the places that `settings` name."""
    return Pool(settings, raw["dim"], [PoolShard(**shard) for shard in raw["shards"]])


def _check_rows(vectors: Sequence[VectorFile], file: PoolFile) -> None:
    total, records = sum(one.rows for one in vectors), open_metadata(file).rows
    if records != total:
        name = vectors[0].name if len(vectors) == 1 else f"{vectors[0].name} and {len(vectors) - 1} more"
        raise BadInput(f"{name}: {total} vectors, but {file.name} has {records} rows; give files of the same pool.")


def _unit_rows(block: npt.NDArray[Any], name: str, first_row: int) -> tuple[Vectors, Vectors]:
    """`block` as float32 with rows of length 1, and the lengths that they had."""
    with np.errstate(over="ignore", invalid="ignore"):  # what they would warn of is refused below, by name
        vectors = np.array(block, np.float32)
        # Row by row, without casts or BLAS: the same bits wherever in a block the row stands.
        lengths: Vectors = np.sqrt((vectors * vectors).sum(axis=1))
    wrong = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if len(wrong):
        problem = "is all zeros" if lengths[wrong[0]] == 0 else "holds NaN or infinite numbers"
        raise BadInput(f"{name}: row {first_row + wrong[0]} {problem}; remove the row here and in the metadata.")
    vectors /= lengths[:, None]
    return vectors, lengths
