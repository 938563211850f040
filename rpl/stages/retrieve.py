"""Stage `retrieve`: category embeddings against the pool; candidates with URLs out.

A round asks for base categories, the novel pass for novel ones. Search is in `rpl.retrieval` and `rpl.index`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rpl.candidates import candidate_table, query_vectors
from rpl.categories import Split, categories_from_json
from rpl.encoder import Encoder
from rpl.errors import BadInput
from rpl.pool import Pool, pool_from_json
from rpl.progress import Progress
from rpl.retrieval import Floats, Ints, search_blocks
from rpl.stage import Context


def run(ctx: Context) -> None:
    split: Split = "novel" if ctx.node.round == "novel" else "base"
    categories = categories_from_json(ctx.input_files("crops", "categories.json")[0].read_bytes())
    chosen = [row for row, category in enumerate(categories) if category.split == split]
    described = json.loads(ctx.input_file("index", "pool.json").read_bytes())
    pool = pool_from_json(described, ctx.config.pool)
    _check_encoder(ctx, pool)

    embeddings = np.load(ctx.input_file("embeddings", "category_embeddings.npy"), allow_pickle=False)
    queries = query_vectors(embeddings, chosen, str(ctx.node))
    wanted = getattr(ctx.config.rounds.candidates, split)
    scores, rows = _search(ctx, pool, described["index"], queries, wanted)
    table = candidate_table(chosen, scores, rows, pool)

    pq.write_table(table, ctx.scratch / "candidates.parquet", compression="zstd")
    ctx.add(ctx.scratch / "candidates.parquet")
    ctx.rows = table.num_rows
    ctx.facts = {"candidates": table.num_rows, "unique_urls": pc.count_distinct(table["url"]).as_py()}


def _search(ctx: Context, pool: Pool, index: str | None, queries: Floats, k: int) -> tuple[Floats, Ints]:
    if not len(queries):
        return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    if index is None:
        with ctx.progress(pool.rows, "vectors") as progress:
            return search_blocks(queries, _counted(pool, progress), k)
    from rpl.index import read_index, search_index

    with ctx.progress(len(queries), "categories") as progress:
        found = search_index(read_index(ctx.input_file("index", index)), queries, k)
        progress.update(len(queries))
    return found


def _counted(pool: Pool, progress: Progress) -> Iterator[tuple[int, Floats]]:
    for first_row, vectors in pool.blocks():
        yield first_row, vectors
        progress.update(len(vectors))


def _check_encoder(ctx: Context, pool: Pool) -> None:
    """Embeddings must come from the CLIP that made the pool: its dimension, and its name where the user gave one.

    Raises:
        BadInput: they do not.
    """
    encoder = Encoder.from_facts(ctx.inputs["embeddings"][0].facts["encoder"])
    settings = ctx.config.pool
    if encoder.dim != pool.dim:
        raise BadInput(
            f"{settings.vectors}: vectors of {pool.dim} numbers, but {encoder} embeds categories in {encoder.dim}; set "
            "clip.model and clip.pretrained to the CLIP that made the pool."
        )
    names = (encoder.model, f"{encoder.model}/{encoder.pretrained}", encoder.digest)
    if settings.encoder is not None and settings.encoder not in names:
        raise BadInput(
            f"{settings.vectors}: was made by {settings.encoder} (pool.encoder), but the categories are embedded by "
            f"{names[1]}; set clip to the pool's CLIP, or correct pool.encoder."
        )
