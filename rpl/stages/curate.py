"""Stage `curate`: score the downloaded pictures, refuse and keep. How is in `rpl.curation`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rpl import curation
from rpl.categories import Split, categories_from_json
from rpl.encoder import Encoder, check_same
from rpl.errors import BadInput
from rpl.evaluation import purity, retrieval_precision
from rpl.stage import Context
from rpl.store import local_copy


def run(ctx: Context) -> None:
    categories = categories_from_json(ctx.local(ctx.inputs["crops"][0], "categories.json").read_bytes())
    split: Split = "novel" if ctx.node.round == "novel" else "base"
    kept: int = getattr(ctx.config.rounds.kept, split)
    embedded = ctx.inputs["embeddings"][0].facts
    encoder = _encoder(ctx)

    tables = [pq.read_table(path) for path in ctx.input_files("downloads", "downloads.parquet")]
    downloads = pa.concat_tables(tables).sort_by([("category", "ascending"), ("rank", "ascending")])
    pictures = _pictures(ctx, downloads.filter(pc.equal(downloads["status"], "ok")), encoder.dim)
    outcomes = curation.curate(pictures, ctx.config.curate, kept)
    made_by = {"round": str(ctx.node.round), "encoder": str(encoder), "prompts_digest": embedded["prompts_digest"]}
    sourced = curation.record(downloads, outcomes, categories, made_by)

    pq.write_table(sourced, ctx.scratch / "sourced.parquet", compression="zstd")
    ctx.add(ctx.scratch / "sourced.parquet")
    own = [row for row, category in enumerate(categories) if category.split == split]
    yields = curation.yields(sourced, categories, own, kept)
    ctx.write_json("yield.json", yields)
    ctx.rows = sourced.num_rows
    ctx.facts = {
        "kept": sum(each["kept"] for each in yields),
        "target": kept * len(own),
        "categories_full": sum(each["kept"] == kept for each in yields),
        "by_reason": curation.by_reason(sourced),
        **_measured(ctx, sourced),
    }


def _encoder(ctx: Context) -> Encoder:
    """The CLIP of the category embeddings. Raises BadInput where the pictures were encoded by another one."""
    encoder = Encoder.from_facts(ctx.inputs["embeddings"][0].facts["encoder"])
    for manifest in ctx.inputs["web_features"]:
        found = Encoder.from_facts(manifest.facts["encoder"])
        check_same(encoder, found, f"{ctx.node.path}: the web pictures were encoded", "run encode again")
    return encoder


def _pictures(ctx: Context, downloaded: pa.Table, dim: int) -> curation.Pictures:
    category = downloaded["category"].to_numpy()
    text_CD = np.load(ctx.input_file("embeddings", "category_embeddings.npy"), allow_pickle=False)
    features_ND = _features(ctx, downloaded["key"].to_pylist(), dim)
    return curation.Pictures(
        category=category,
        url=downloaded["url"].to_pylist(),
        sha256=downloaded["sha256"].to_pylist(),
        phash=np.array([int(phash, 16) for phash in downloaded["phash"].to_pylist()], np.uint64),
        score=curation.image_scores(features_ND, text_CD, category),
    )


def _features(ctx: Context, keys: list[str], dim: int) -> npt.NDArray[np.float16]:
    """Features of the pictures `keys`, in their order."""
    parts = [np.load(path, allow_pickle=False) for path in ctx.input_files("web_features", "features.npy")]
    known: list[str] = []
    for path in ctx.input_files("web_features", "features.parquet"):
        known += pq.read_table(path, columns=["key"])["key"].to_pylist()
    place = {key: row for row, key in enumerate(known)}
    missing = [key for key in keys if key not in place]
    if missing:
        raise BadInput(f"{ctx.node.path}: picture {missing[0]} has no features; run encode of this round again.")
    features: npt.NDArray[np.float16] = np.concatenate([np.empty((0, dim), np.float16), *parts])
    return features[[place[key] for key in keys]]


def _measured(ctx: Context, sourced: pa.Table) -> dict[str, float | None]:
    """Retrieval precision and purity, where the pool's truth is known."""
    uri = ctx.config.pool.truth
    if uri is None:
        return {"retrieval_precision": None, "purity": None}
    truth = _truth(uri, ctx)
    names, urls = sourced["category_name"].to_pylist(), sourced["url"].to_pylist()
    kept = [row for row, status in enumerate(sourced["status"].to_pylist()) if status == "kept"]
    precision = retrieval_precision(names, urls, truth)
    pure = purity([names[row] for row in kept], [urls[row] for row in kept], truth)
    return {
        "retrieval_precision": None if precision is None else round(precision, 6),
        "purity": None if pure is None else round(pure, 6),
    }


def _truth(uri: str, ctx: Context) -> Mapping[str, str | None]:
    try:
        table = pq.read_table(local_copy(uri, ctx.scratch), columns=["url", "category"])
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise BadInput(f"{uri}: is not a parquet table with columns url and category; correct pool.truth.") from error
    return dict(zip(table["url"].to_pylist(), table["category"].to_pylist(), strict=True))
