"""Indexes: built alike twice, probed widely enough for text, equal to exact search where every list is probed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpl.errors import BadInput
from rpl.index import build_ivf, chosen_kind, read_index, search_index, write_index
from rpl.manifests import Manifest, Shard
from rpl.retrieval import search_blocks
from rpl.rounds import Node
from rpl.stage import Run
from tests.fake_stages import do, make_run

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def unit(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def clustered(rows: int, dim: int = 32) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, dim))
    return unit(centres[rng.integers(0, 20, rows)] + 0.6 * rng.normal(size=(rows, dim)))


def blocks(vectors: np.ndarray, size: int = 700) -> Iterator[tuple[int, np.ndarray]]:
    return ((start, vectors[start : start + size]) for start in range(0, len(vectors), size))


def test_auto_streams_small_pools() -> None:
    assert [chosen_kind("auto", rows) for rows in (0, 1_999_999, 2_000_000)] == ["exact", "exact", "ivf"]
    assert (chosen_kind("exact", 10**9), chosen_kind("ivf", 10)) == ("exact", "ivf")


def test_measured_recall_holds_for_queries_far_from_the_pool() -> None:
    vectors = clustered(6000)
    built = build_ivf(lambda: blocks(vectors), *vectors.shape)
    assert built.lists == 150
    assert built.recall >= 0.99
    queries = unit(np.random.default_rng(5).normal(size=(200, 32)))
    scores, rows = search_index(built.index, queries, 100)
    true_scores, true_rows = search_blocks(queries, blocks(vectors), 100)
    recall = np.mean([len(set(a) & set(b)) / 100 for a, b in zip(rows.tolist(), true_rows.tolist(), strict=True)])
    assert recall > 0.97
    assert np.abs(scores[:, 0] - true_scores[:, 0]).max() < 2e-3
    assert built.index.ntotal == 6000


def test_real_text_queries_find_their_neighbours() -> None:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} (public test data) is not here")
    vectors = unit(np.load(DATA / "clip_unsplash_features/features_vitb32_fp16.npy"))
    queries = unit(np.load(DATA / "detic/lvis_v1_clip_a+cname.npy"))
    built = build_ivf(lambda: blocks(vectors), *vectors.shape)
    rows, true_rows = search_index(built.index, queries, 50)[1], search_blocks(queries, blocks(vectors), 50)[1]
    recall = np.mean([len(set(a) & set(b)) / 50 for a, b in zip(rows.tolist(), true_rows.tolist(), strict=True)])
    assert recall > 0.97


def test_a_gpu_finds_the_centres_where_faiss_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the GPU: another flat index of the CPU, which counts what it is asked."""
    vectors = clustered(3000)
    alone = build_ivf(lambda: blocks(vectors), *vectors.shape)
    copied: list[faiss.IndexFlatIP] = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: copied.append(index) or index, raising=False)
    built = build_ivf(lambda: blocks(vectors), *vectors.shape)
    assert [index.d for index in copied] == [32]
    assert copied[0].ntotal == built.lists, "k-means left its centres in it"
    assert (built.lists, built.recall >= 0.99) == (alone.lists, True)
    assert built.index.ntotal == 3000


def test_the_same_vectors_give_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    program = (
        "import sys, hashlib, faiss; faiss.omp_set_num_threads(int(sys.argv[1]))\n"
        "from tests.test_index import blocks, build_ivf, clustered\n"
        "vectors = clustered(4000)\n"
        "built = build_ivf(lambda: blocks(vectors, int(sys.argv[2])), *vectors.shape)\n"
        "print(hashlib.sha256(faiss.serialize_index(built.index).tobytes()).hexdigest(), built.probes)\n"
    )

    def digest(threads: str, block: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", program, threads, block]
        root = Path(__file__).parents[1]
        return subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True, text=True).stdout

    assert digest("1", "4000") == digest("3", "4000") != ""
    assert digest("1", "700") == digest("2", "700") != ""


@pytest.mark.parametrize("rows", [1, 3, 79, 81])
def test_tiny_pools_can_be_indexed_too(rows: int) -> None:
    vectors = clustered(rows)
    built = build_ivf(lambda: blocks(vectors), *vectors.shape)
    scores, found = search_index(built.index, vectors[:1], 100)
    assert found[0, 0] == 0
    assert (found[0] >= 0).sum() == rows
    assert np.isneginf(scores[0, rows:]).all()


def test_copies_of_one_picture_do_not_force_a_full_search() -> None:
    vectors = clustered(6000)
    vectors[2000:4000] = vectors[0]
    built = build_ivf(lambda: blocks(vectors), *vectors.shape)
    assert built.recall >= 0.99
    assert built.probes < built.lists


def test_an_index_reads_back(tmp_path: Path) -> None:
    vectors = clustered(500)
    built = build_ivf(lambda: blocks(vectors), *vectors.shape)
    write_index(built.index, tmp_path / "pool.index")
    again = read_index(tmp_path / "pool.index")
    assert again.nprobe == built.probes
    assert np.array_equal(search_index(again, vectors[:9], 20)[1], search_index(built.index, vectors[:9], 20)[1])


def test_a_cut_index_is_refused(tmp_path: Path) -> None:
    vectors = clustered(500)
    built = build_ivf(lambda: blocks(vectors), *vectors.shape)
    # A file of its own: faiss looks ahead in threads that outlast a search, and a mapped file cut under them kills us.
    (tmp_path / "pool.index").write_bytes(faiss.serialize_index(built.index).tobytes()[:1000])
    with pytest.raises(BadInput, match=r"pool\.index: is not a whole faiss index; run the stage `index` again\."):
        read_index(tmp_path / "pool.index")


def pool_folder(folder: Path, vectors: np.ndarray) -> str:
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    half = len(vectors) // 2
    for shard, part in enumerate((vectors[:half], vectors[half:])):
        np.save(folder / f"img_emb/img_emb_{shard}.npy", part)
        urls = [f"http://h/{shard}/{row}" for row in range(len(part))]
        pq.write_table(pa.table({"url": urls}), folder / f"metadata/metadata_{shard}.parquet")
    return str(folder)


def committed(run: Run) -> Manifest:
    manifest = run.manifest(Node("index"), Shard())
    assert manifest is not None
    return manifest


def test_the_stage_checks_and_describes_the_pool(tmp_path: Path) -> None:
    vectors = clustered(400)
    vectors[3] *= 5
    run = make_run(tmp_path / "x", str(tmp_path / "run"), pool={"vectors": pool_folder(tmp_path / "pool", vectors)})
    do(run, "index")
    manifest = committed(run)
    assert manifest.rows == 400
    assert manifest.facts == {"rows": 400, "dim": 32, "index": "exact", "rows_not_normalised": 1}
    assert set(manifest.files) == {"pool.json"}
    described = json.loads(run.local(manifest.files["pool.json"]).read_text())
    assert described["index"] is None
    assert described["shards"][1] == {
        "vectors": "img_emb/img_emb_1.npy",
        "metadata": "metadata/metadata_1.parquet",
        "first_row": 200,
        "rows": 200,
        "metadata_row": 0,
    }


def test_the_stage_builds_an_index_where_asked(tmp_path: Path) -> None:
    pool = {"vectors": pool_folder(tmp_path / "pool", clustered(400)), "index": "ivf"}
    runs = [make_run(tmp_path / "x", str(tmp_path / name), pool=pool) for name in ("one", "two")]
    for run in runs:
        do(run, "index")
    one, two = (committed(run) for run in runs)
    assert set(one.files) == {"pool.json", "pool.index"}
    assert one.contents == two.contents
    assert (one.facts["index"], one.facts["lists"]) == ("ivf", 10)
    assert json.loads(runs[0].local(one.files["pool.json"]).read_text())["index"] == "pool.index"
    index_file = runs[0].local(one.files["pool.index"])
    assert hashlib.sha256(index_file.read_bytes()).hexdigest() == one.files["pool.index"].sha256


def test_the_stage_refuses_a_row_that_is_not_a_number_and_leaves_nothing(tmp_path: Path) -> None:
    vectors = clustered(400)
    vectors[399, 2] = np.nan
    folder = pool_folder(tmp_path / "pool", vectors)
    run = make_run(tmp_path / "x", str(tmp_path / "run"), pool={"vectors": folder})
    with pytest.raises(BadInput) as raised:
        do(run, "index")
    assert str(raised.value) == (
        f"{folder}/img_emb/img_emb_1.npy: row 199 holds NaN or infinite numbers; remove the row here and in the "
        "metadata."
    )
    assert [info.path for info in run.store.list()] == ["config.yaml"]
