"""Stage `index`: find the pool's files, read every vector once to check it, build an index where it pays."""

from __future__ import annotations

from collections.abc import Iterator

from rpl.index import build_ivf, chosen_kind, write_index
from rpl.pool import Pool, open_pool
from rpl.progress import Progress
from rpl.retrieval import Floats
from rpl.stage import Context

INDEX = "pool.index"


def run(ctx: Context) -> None:
    pool = open_pool(ctx.config.pool)
    kind = chosen_kind(ctx.config.pool.index, pool.rows)
    passes = 3 if kind == "ivf" else 1
    with ctx.progress(passes * pool.rows, "vectors") as progress:
        not_unit = 0
        for rows, count in pool.check():
            not_unit += count
            progress.update(rows)
        ctx.facts = {"rows": pool.rows, "dim": pool.dim, "index": kind, "rows_not_normalised": not_unit}
        if kind == "ivf":
            built = build_ivf(lambda: _counted(pool, progress), pool.rows, pool.dim)
            ctx.facts |= {"lists": built.lists, "probes": built.probes, "recall": round(built.recall, 4)}
            write_index(built.index, ctx.scratch / INDEX)
            ctx.add(ctx.scratch / INDEX)
    ctx.write_json("pool.json", {**pool.to_json(), "index": INDEX if kind == "ivf" else None})
    ctx.rows = pool.rows


def _counted(pool: Pool, progress: Progress) -> Iterator[tuple[int, Floats]]:
    for first_row, vectors in pool.blocks():
        yield first_row, vectors
        progress.update(len(vectors))
