"""The table of candidates, and the stage `retrieve` between scripted neighbours."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpl.candidates import SCHEMA, candidate_table, query_vectors
from rpl.categories import Category, categories_to_json
from rpl.config import Pool as PoolSettings
from rpl.encoder import Encoder
from rpl.errors import BadInput
from rpl.manifests import Shard
from rpl.pool import Pool, open_pool
from rpl.rounds import Node
from rpl.stage import Context, Run
from tests.fake_stages import do, make_run

ROWS, DIM = 300, 8
VECTORS = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
EMBEDDINGS = 7 * np.random.default_rng(1).normal(size=(4, DIM)).astype(np.float32)
SPLITS = ("base", "novel", "base", "novel")
ENCODER = Encoder("ViT-B-32", "openai", "abc" * 20, DIM)


@pytest.fixture
def pool_uri(tmp_path: Path) -> str:
    """A pool in which URL 5 comes twice."""
    folder = tmp_path / "pool"
    folder.mkdir()
    urls = [f"http://h/{row}.jpg" for row in range(ROWS)]
    urls[17] = urls[5]
    np.save(folder / "x.npy", VECTORS)
    table = pa.table({"url": urls, "caption": [f"caption {row}" for row in range(ROWS)]})
    pq.write_table(table, folder / "x.parquet")
    return str(folder)


@pytest.fixture
def pool(pool_uri: str) -> Pool:
    return open_pool(PoolSettings(vectors=pool_uri))


def cosines() -> np.ndarray:
    vectors = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    return (EMBEDDINGS / np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True)) @ vectors.T


def test_a_url_is_listed_once_for_a_category_at_its_best_rank(pool: Pool) -> None:
    scores = np.array([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]], np.float32)
    rows = np.array([[17, 5, 1], [5, 2, 17]])
    table = candidate_table([3, 8], scores, rows, pool)
    assert table.schema == SCHEMA
    assert table.select(["category", "rank", "pool_row", "url"]).to_pylist() == [
        {"category": 3, "rank": 0, "pool_row": 17, "url": "http://h/5.jpg"},
        {"category": 3, "rank": 1, "pool_row": 1, "url": "http://h/1.jpg"},
        {"category": 8, "rank": 0, "pool_row": 5, "url": "http://h/5.jpg"},
        {"category": 8, "rank": 1, "pool_row": 2, "url": "http://h/2.jpg"},
    ]
    assert table["score"].to_pylist() == pytest.approx([0.9, 0.7, 0.6, 0.5])
    assert table["caption"][0].as_py() == "caption 17"


def test_rows_of_minus_one_are_no_candidates(pool: Pool) -> None:
    rows = np.array([[4, -1], [-1, -1], [9, 2]])
    table = candidate_table([0, 1, 2], np.zeros((3, 2), np.float32), rows, pool)
    assert table["category"].to_pylist() == [0, 2, 2]
    assert table["rank"].to_pylist() == [0, 0, 1]
    assert candidate_table([], np.empty((0, 5), np.float32), np.empty((0, 5), np.int64), pool).num_rows == 0


def test_queries_have_length_one() -> None:
    queries = query_vectors(EMBEDDINGS.astype(np.float16), [2, 0], "embed")
    assert np.allclose(queries, (EMBEDDINGS / np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True))[[2, 0]], atol=1e-3)
    assert queries.dtype == np.float32


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_an_embedding_without_direction_is_refused(value: float) -> None:
    embeddings = EMBEDDINGS.copy()
    embeddings[2] = value
    with pytest.raises(BadInput) as raised:
        query_vectors(embeddings, [0, 2], "round-1/retrieve")
    assert str(raised.value) == (
        "round-1/retrieve: the embedding of category 2 is no direction; learn and embed again."
    )


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def crop(context: Context) -> None:
    names = [Category(row + 1, f"name {row}", "", split) for row, split in enumerate(SPLITS)]
    context.write("categories.json", categories_to_json(names))


def embed(context: Context) -> None:
    context.write("category_embeddings.npy", npy(EMBEDDINGS))
    context.facts = {"encoder": ENCODER.to_facts(), "accuracy": {"learned": {"base": 0.5, "novel": 0.5}}}


def nothing(context: Context) -> None:
    context.facts = {}


@pytest.fixture
def start(tmp_path: Path, pool_uri: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Makes a run of one round with all that `retrieve` reads, `index` real and the rest scripted."""
    scripted = {
        "crop": crop,
        "embed": embed,
        "encode": nothing,
        "learn": nothing,
        "download": nothing,
        "curate": nothing,
    }
    for stage, function in scripted.items():
        module = types.ModuleType(f"rpl.stages.{stage}")
        module.run = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"rpl.stages.{stage}", module)

    def run(name: str = "run", **pool: Any) -> Run:
        rounds = {"max_rounds": 1, "candidates": {"base": 20, "novel": 400}}
        made = make_run(tmp_path / "x", str(tmp_path / name), pool={"vectors": pool_uri, **pool}, rounds=rounds)
        for stage, round_ in [("crop", None), ("encode", None), ("index", None), ("learn", 1), ("embed", 1)]:
            do(made, stage, round_)
        return made

    return run


def candidates(run: Run, round_: Any) -> pa.Table:
    manifest = run.manifest(Node("retrieve", round_), Shard())
    assert manifest is not None
    table = pq.read_table(run.local(manifest.files["candidates.parquet"]))
    assert manifest.rows == table.num_rows
    assert manifest.facts == {"candidates": table.num_rows, "unique_urls": len(set(table["url"].to_pylist()))}
    return table


def test_a_round_asks_for_base_categories(start: Callable[..., Run]) -> None:
    run = start()
    do(run, "retrieve", 1)
    table = candidates(run, 1)
    assert sorted(set(table["category"].to_pylist())) == [0, 2]
    for category in (0, 2):
        rows = [row for row in table.to_pylist() if row["category"] == category]
        expected = np.argsort(-cosines()[category])[:20]
        assert [row["pool_row"] for row in rows] == [row for row in expected if row != 17 or 5 not in expected]
        assert [row["rank"] for row in rows] == list(range(len(rows)))
        assert [row["score"] for row in rows] == pytest.approx([cosines()[category, row["pool_row"]] for row in rows])


def test_the_novel_pass_asks_for_the_others_and_may_want_more_than_there_is(start: Callable[..., Run]) -> None:
    run = start()
    for stage in ("retrieve", "download", "encode", "curate"):
        do(run, stage, 1)
    do(run, "embed", "novel")  # type: ignore[arg-type]
    do(run, "retrieve", "novel")  # type: ignore[arg-type]
    table = candidates(run, "novel")
    assert table["category"].to_pylist() == [1] * (ROWS - 1) + [3] * (ROWS - 1)
    assert set(table["pool_row"].to_pylist()) <= set(range(ROWS))


def test_an_index_gives_nearly_the_same_candidates(start: Callable[..., Run]) -> None:
    exact, indexed = start("exact"), start("indexed", index="ivf")
    for run in (exact, indexed):
        do(run, "retrieve", 1)
    found, true = (set(candidates(run, 1)["pool_row"].to_pylist()) for run in (indexed, exact))
    assert len(found & true) > 0.9 * len(true)


def test_a_pool_of_another_dimension_is_refused(start: Callable[..., Run], pool_uri: str) -> None:
    np.save(Path(pool_uri) / "x.npy", VECTORS[:, :4])
    with pytest.raises(BadInput) as raised:
        do(start(), "retrieve", 1)
    assert str(raised.value) == (
        f"{pool_uri}: vectors of 4 numbers, but ViT-B-32 openai (abcabcabcabc, 8 dimensions) embeds categories in 8; "
        "set clip.model and clip.pretrained to the CLIP that made the pool."
    )


def test_a_pool_that_another_clip_made_is_refused(start: Callable[..., Run], pool_uri: str) -> None:
    for name in ("ViT-B-32", "ViT-B-32/openai", "abc" * 20):
        do(start(name.replace("/", "-"), encoder=name), "retrieve", 1)
    with pytest.raises(BadInput) as raised:
        do(start("other", encoder="ViT-B-16"), "retrieve", 1)
    assert str(raised.value) == (
        f"{pool_uri}: was made by ViT-B-16 (pool.encoder), but the categories are embedded by ViT-B-32/openai; set "
        "clip to the pool's CLIP, or correct pool.encoder."
    )
