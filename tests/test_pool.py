"""Pools in every public layout, on a folder and on a real S3 server: rows, URLs, and every way they may not fit."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpl.config import Pool as Settings
from rpl.errors import BadInput
from rpl.pool import Pool, open_pool, pool_from_json
from rpl.store import open_store

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} (public test data) is not here")

ROWS, DIM = 25, 8
VECTORS = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
UNIT = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
URLS = [f"http://h/{row}.jpg" for row in range(ROWS)]
CAPTIONS = [f"picture ünd {row}" for row in range(ROWS)]

Write = Callable[[bytes], None]


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def table(start: int = 0, end: int = ROWS, **names: str) -> pa.Table:
    return pa.table({names.get("url", "url"): URLS[start:end], names.get("caption", "caption"): CAPTIONS[start:end]})


def parquet(content: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(content, out, **options)
    return out.getvalue()


def arrow(content: pa.Table, kind: str) -> bytes:
    out = io.BytesIO()
    opener = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with opener(out, content.schema) as writer:
        writer.write_table(content, max_chunksize=7)
    return out.getvalue()


def csv_bytes(content: pa.Table) -> bytes:
    out = io.BytesIO()
    pa.csv.write_csv(content, out)
    return out.getvalue()


def hdf5(**content: Any) -> bytes:
    out = io.BytesIO()
    with h5py.File(out, "w") as handle:
        for name, values in content.items():
            handle.create_dataset(name.replace("__", "/"), data=values)
    return out.getvalue()


def faiss_index(key: str) -> bytes:
    index = faiss.index_factory(DIM, key, faiss.METRIC_INNER_PRODUCT)
    index.train(VECTORS)
    index.add(VECTORS)
    return faiss.serialize_index(index).tobytes()


def embedding_table(kind: pa.DataType) -> pa.Table:
    rows = VECTORS.astype(np.float16) if kind.value_type == pa.float16() else VECTORS
    return table().append_column("embedding", pa.array(list(rows.tolist()), kind))


META = parquet(table(), row_group_size=6)
LAYOUTS: dict[str, dict[str, bytes]] = {
    "clip-retrieval": {
        "img_emb/img_emb_0.npy": npy(VECTORS[:9].astype(np.float16)),
        "img_emb/img_emb_9.npy": npy(VECTORS[9:10]),
        "img_emb/img_emb_10.npy": npy(VECTORS[10:].astype(np.float64)),
        "text_emb/text_emb_0.npy": npy(VECTORS[:9]),
        "metadata/metadata_0.parquet": parquet(table(0, 9)),
        "metadata/metadata_9.parquet": parquet(table(9, 10)),
        "metadata/metadata_10.parquet": parquet(table(10), row_group_size=4),
    },
    "datacomp": {
        "00ab.npz": npz(b32_img=VECTORS[:13], b32_txt=UNIT[:13], l14_img=UNIT[:13, :4]),
        "00ab.parquet": parquet(table(0, 13)),
        "00cd.npz": npz(l14_img=UNIT[13:, :4], b32_img=VECTORS[13:]),
        "00cd.parquet": parquet(table(13).append_column("uid", pa.array(range(ROWS - 13)))),
    },
    "laion": {
        "img_emb_0000.npy": npy(VECTORS[:20]),
        "img_emb_0001.npy": npy(VECTORS[20:]),
        "metadata_0000.parquet": parquet(table(0, 20, url="URL", caption="TEXT")),
        "metadata_0001.parquet": parquet(table(20, url="URL", caption="TEXT")),
    },
    "npy + arrow file": {"x.npy": npy(VECTORS), "x.arrow": arrow(table(), "file")},
    "npy + arrow stream": {"x.npy": npy(VECTORS), "x.arrow": arrow(table(), "stream")},
    "npy + csv": {"x.npy": npy(VECTORS), "x.csv": csv_bytes(table(url="image_url"))},
    "shards + one hdf5": {
        "img_emb_0.npy": npy(VECTORS[:20]),
        "img_emb_1.npy": npy(VECTORS[20:]),
        "metadata.h5": hdf5(dataset__url=URLS, dataset__caption=[c.encode() for c in CAPTIONS]),
    },
    "npz with one array": {"x.npz": npz(arr_0=VECTORS), "x.parquet": META},
    "parquet alone": {"x.parquet": parquet(embedding_table(pa.list_(pa.float32())), row_group_size=6)},
    "parquet alone, fixed size": {"x.parquet": parquet(embedding_table(pa.list_(pa.float16(), DIM)))},
    "hdf5 alone": {"x.h5": hdf5(embeddings=VECTORS), "metadata.parquet": META},
    "faiss flat": {
        "image.index": faiss_index("Flat"),
        "metadata.h5": hdf5(dataset__url=URLS, dataset__caption=CAPTIONS),
    },
    "faiss ivf": {"image.index": faiss_index("IVF3,Flat"), "metadata.parquet": META},
}


def put(uri: str, files: dict[str, bytes]) -> None:
    store = open_store(uri)
    for name, data in files.items():
        store.write(name, data)


def opened(uri: str, **settings: Any) -> Pool:
    return open_pool(Settings.model_validate({"vectors": uri, **settings}))


def all_vectors(pool: Pool, rows_per_block: int = 7) -> np.ndarray:
    blocks = list(pool.blocks(rows_per_block))
    assert [first for first, _ in blocks] == np.cumsum([0, *(len(block) for _, block in blocks[:-1])]).tolist()
    assert all(block.dtype == np.float32 and len(block) <= rows_per_block for _, block in blocks)
    return np.concatenate([block for _, block in blocks])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_one_table(layout: str, store_uri: str) -> None:
    put(store_uri, LAYOUTS[layout])
    pool = opened(store_uri, encoder="ViT-B-32/openai")
    assert (pool.rows, pool.dim) == (ROWS, DIM)
    assert np.allclose(all_vectors(pool), UNIT, atol=2e-3)
    wanted = np.array([0, 8, 9, 10, 12, 13, 19, 20, 24])
    expected = ([URLS[row] for row in wanted], [CAPTIONS[row] for row in wanted])
    assert pool.records(wanted) == expected
    again = pool_from_json(pool.to_json(), Settings(vectors=store_uri, encoder="ViT-B-32"))
    assert again.records(wanted) == expected
    assert np.array_equal(all_vectors(again, 1000), all_vectors(pool))


@pytest.mark.parametrize("metadata", ["x.parquet", "metadata.parquet"])
def test_a_single_file_finds_its_metadata_beside_it(metadata: str, store_uri: str) -> None:
    put(store_uri, {"deep/x.npy": npy(VECTORS), f"deep/{metadata}": META, "deep/other.parquet": b"not read"})
    pool = opened(f"{store_uri}/deep/x.npy")
    assert pool.to_json()["shards"] == [
        {"vectors": "x.npy", "metadata": metadata, "first_row": 0, "rows": ROWS, "metadata_row": 0}
    ]
    assert pool.records(np.array([3]))[0] == [URLS[3]]


def test_metadata_may_lie_elsewhere(store_uri: str) -> None:
    put(store_uri, {"v/a.npy": npy(VECTORS), "m/b.parquet": META})
    for metadata in ("m", "m/b.parquet"):
        pool = opened(f"{store_uri}/v", metadata=f"{store_uri}/{metadata}")
        assert pool.records(np.array([24])) == ([URLS[24]], [CAPTIONS[24]])


def test_the_description_does_not_depend_on_the_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        put(str(tmp_path / place), LAYOUTS["clip-retrieval"])
    assert opened(str(tmp_path / "one")).to_json() == opened(str(tmp_path / "two")).to_json()


def test_missing_urls_and_captions_are_empty(tmp_path: Path) -> None:
    content = pa.table({"url": [None, *URLS[1:]]})
    put(str(tmp_path), {"x.npy": npy(VECTORS), "x.parquet": parquet(content)})
    assert opened(str(tmp_path)).records(np.array([0, 1])) == (["", URLS[1]], ["", ""])


def test_datacomp_reads_the_array_of_the_pools_encoder(tmp_path: Path) -> None:
    put(str(tmp_path), LAYOUTS["datacomp"])
    assert opened(str(tmp_path), encoder="ViT-L-14").dim == 4
    assert opened(str(tmp_path), encoder="ViT-B-32").dim == DIM
    with pytest.raises(BadInput) as raised:
        opened(str(tmp_path))
    assert str(raised.value) == (
        f"{tmp_path}/00ab.npz: holds b32_img, l14_img; set pool.encoder to the CLIP to use, such as ViT-B-32 for "
        "b32_img."
    )


def test_check_counts_rows_that_were_not_normalised(tmp_path: Path) -> None:
    mixed = UNIT.astype(np.float16).copy()
    mixed[3] *= 2
    put(str(tmp_path), {"x.npy": npy(mixed), "x.parquet": META})
    assert list(opened(str(tmp_path)).check(10)) == [(10, 1), (10, 0), (5, 0)]


@given(st.integers(1, 30))
def test_rows_have_the_same_bits_in_any_block(tmp_path_factory: pytest.TempPathFactory, rows: int) -> None:
    folder = tmp_path_factory.mktemp("pool")
    put(str(folder), {"x.npy": npy(VECTORS), "x.parquet": META})
    assert np.array_equal(all_vectors(opened(str(folder)), rows), all_vectors(opened(str(folder)), 3))


@needs_data
def test_real_metadata_and_real_features() -> None:
    laion = DATA / "laion_meta/img2dataset_laion_url_text.parquet"
    from rpl.pool.files import PoolFile
    from rpl.pool.metadata import open_metadata

    metadata = open_metadata(PoolFile(open_store(str(laion.parent)), laion.name))
    assert metadata.rows == 9827
    urls, captions = metadata.take(np.array([0, 5000, 9826]))
    rows = pq.read_table(laion).take([0, 5000, 9826])
    assert (urls, captions) == (rows["URL"].to_pylist(), rows["TEXT"].to_pylist())
    assert all(url.startswith("http") for url in urls)


def test_real_clip_features_with_their_csv(tmp_path: Path) -> None:
    source = DATA / "clip_unsplash_features"
    if not source.is_dir():
        pytest.skip(f"{source} (public test data) is not here")
    names = (source / "files.csv").read_text().splitlines()[1:]
    (tmp_path / "urls.csv").write_text("url\n" + "\n".join(names) + "\n")
    pool = opened(str(source / "features_vitb32_fp16.npy"), metadata=str(tmp_path / "urls.csv"))
    assert (pool.rows, pool.dim) == (3045, 512)
    assert sum(count for _, count in pool.check()) == 0
    assert pool.records(np.array([3044]))[0] == [names[-1].split(",")[0]]


def spoiled(row: int, value: float) -> np.ndarray:
    array = VECTORS.copy()
    array[row] = value
    return array


def cut(data: bytes) -> bytes:
    return data[:-3]


BAD: list[tuple[str, dict[str, bytes], str]] = [
    (
        "counts differ",
        {"x.npy": npy(VECTORS), "x.parquet": parquet(table(0, 24))},
        "{uri}/x.npy: 25 vectors, but {uri}/x.parquet has 24 rows; give files of the same pool.",
    ),
    (
        "counts differ with one file for all",
        {"a_0.npy": npy(VECTORS), "a_1.npy": npy(VECTORS), "metadata.parquet": META},
        "{uri}/a_0.npy and 1 more: 50 vectors, but {uri}/metadata.parquet has 25 rows; give files of the same pool.",
    ),
    (
        "dimensions differ",
        {"a_0.npy": npy(VECTORS), "a_0.parquet": META, "a_1.npy": npy(VECTORS[:, :4]), "a_1.parquet": META},
        "{uri}/a_1.npy: has vectors of 4 numbers, but {uri}/a_0.npy of 8; give files that one CLIP made.",
    ),
    (
        "no rows",
        {"x.npy": npy(VECTORS[:0]), "x.parquet": parquet(table(0, 0))},
        "{uri}/x.npy: has no rows; remove it from the pool.",
    ),
    ("nothing", {}, "{uri}: does not exist or is empty; correct the path in the configuration."),
    (
        "no vectors",
        {"readme.txt": b"", "urls.parquet": META},
        "{uri}: holds no vectors (.npy, .npz, .parquet, .h5, .hdf5, .index, .faiss); correct pool.vectors.",
    ),
    (
        "no metadata",
        {"x.npy": npy(VECTORS)},
        "{uri}: holds no URLs for the vectors (.parquet, .arrow, .feather, .csv, .tsv, .h5, .hdf5); set pool.metadata "
        "to them.",
    ),
    (
        "no url column",
        {"x.npy": npy(VECTORS), "x.parquet": parquet(table(url="link"))},
        "{uri}/x.parquet: has no column 'url' (but link, caption); rename the one with URLs.",
    ),
    (
        "urls are no text",
        {"x.npy": npy(VECTORS), "x.parquet": parquet(pa.table({"url": range(ROWS)}))},
        "{uri}/x.parquet: column 'url' holds int64, not text; store strings there.",
    ),
    (
        "hdf5 without urls",
        {"x.npy": npy(VECTORS), "x.h5": hdf5(other=URLS)},
        "{uri}/x.h5: has no data set 'dataset/url'; store the URLs under that name.",
    ),
    (
        "hdf5 urls are no text",
        {"x.npy": npy(VECTORS), "x.h5": hdf5(dataset__url=np.arange(ROWS))},
        "{uri}/x.h5: dataset/url is no list of texts (int64); store strings there.",
    ),
    (
        "one shard without metadata",
        {
            "img_emb/a_0.npy": npy(VECTORS),
            "img_emb/a_1.npy": npy(VECTORS),
            "metadata/m_0.parquet": META,
            "metadata/m_2.parquet": META,
        },
        "{uri}/img_emb/a_1.npy: has no metadata of the same name or number; add it or set pool.metadata.",
    ),
    (
        "metadata without its shard",
        {"img_emb/a_0.npy": npy(VECTORS), "metadata/m_0.parquet": META, "metadata/m_2.parquet": META},
        "{uri}/metadata/m_2.parquet: belongs to no vectors by name or number; remove it or add the vectors.",
    ),
    (
        "cut npy",
        {"x.npy": cut(npy(VECTORS)), "x.parquet": META},
        "{uri}/x.npy: has 925 bytes, but its header promises 928; copy or download it again.",
    ),
    (
        "integers",
        {"x.npy": npy(np.ones((ROWS, DIM), np.int64)), "x.parquet": META},
        "{uri}/x.npy: holds int64 values; give vectors as float16, float32 or float64.",
    ),
    (
        "pickles",
        {"x.npy": npy(np.array([[{}]])), "x.parquet": META},
        "{uri}/x.npy: holds object values; give vectors as float16, float32 or float64.",
    ),
    (
        "one number per row",
        {"x.npy": npy(np.ones(ROWS)), "x.parquet": META},
        "{uri}/x.npy: is an array of shape [25]; give one row of numbers for each picture.",
    ),
    (
        "column order",
        {"x.npy": npy(np.asfortranarray(VECTORS)), "x.parquet": META},
        "{uri}/x.npy: is stored column by column; save numpy.ascontiguousarray of it.",
    ),
    (
        "parquet row of another length",
        {"x.parquet": parquet(table(0, 2).append_column("embedding", pa.array([[1.0, 2.0], [1.0]])))},
        "{uri}/x.parquet: row 1 has 1 numbers, but row 0 has 2; remove the row or correct it.",
    ),
    (
        "parquet row without a vector",
        {"x.parquet": parquet(table(0, 2).append_column("embedding", pa.array([None, [1.0]])))},
        "{uri}/x.parquet: row 0 has no vector; remove the row or correct it.",
    ),
    (
        "csv line of another length",
        {"x.npy": npy(VECTORS), "x.csv": b"url,caption\nhttp://h/1,one\nhttp://h/2\n"},
        "{uri}/x.csv: line 3 has 1 fields, not 2; correct it.",
    ),
    (
        "NaN",
        {"x.npy": npy(spoiled(17, np.nan)), "x.parquet": META},
        "{uri}/x.npy: row 17 holds NaN or infinite numbers; remove the row here and in the metadata.",
    ),
    (
        "infinite",
        {"x.npy": npy(spoiled(17, np.inf).astype(np.float16)), "x.parquet": META},
        "{uri}/x.npy: row 17 holds NaN or infinite numbers; remove the row here and in the metadata.",
    ),
    (
        "NaN in the second shard",
        {"a_0.npy": npy(VECTORS), "a_0.parquet": META, "a_1.npy": npy(spoiled(2, np.nan)), "a_1.parquet": META},
        "{uri}/a_1.npy: row 2 holds NaN or infinite numbers; remove the row here and in the metadata.",
    ),
    (
        "all zeros",
        {"x.npy": npy(spoiled(0, 0)), "x.parquet": META},
        "{uri}/x.npy: row 0 is all zeros; remove the row here and in the metadata.",
    ),
]


@pytest.mark.parametrize(("files", "expected"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_does_not_fit_gets_one_sentence(tmp_path: Path, files: dict[str, bytes], expected: str) -> None:
    put(str(tmp_path / "pool"), files)
    with pytest.raises(BadInput) as raised:
        list(opened(str(tmp_path / "pool")).check())
    assert str(raised.value) == expected.format(uri=tmp_path / "pool")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.npy", ".npy file"),
        ("x.npz", "whole .npz file"),
        ("x.h5", "whole HDF5 file"),
        ("x.index", "whole faiss index"),
    ],
)
def test_vectors_that_are_something_else(tmp_path: Path, name: str, kind: str) -> None:
    put(str(tmp_path), {name: b"<html>not found</html>", "x.parquet": META})
    with pytest.raises(BadInput, match=rf"{name}: is not a {kind} \(.+\); "):
        opened(str(tmp_path))


@pytest.mark.parametrize(("name", "kind"), [("x.parquet", "parquet"), ("x.h5", "HDF5"), ("x.arrow", "arrow")])
def test_metadata_that_are_something_else(tmp_path: Path, name: str, kind: str) -> None:
    put(str(tmp_path), {"x.npy": npy(VECTORS), name: b"<html>not found</html>"})
    with pytest.raises(BadInput, match=rf"{name}: is not a whole {kind} file \(.+\); "):
        opened(str(tmp_path))


def test_hdf5_files_cannot_reach_other_files(tmp_path: Path) -> None:
    (tmp_path / "secret.h5").write_bytes(hdf5(dataset__url=URLS))
    (tmp_path / "raw").write_bytes(b"x" * 100)
    layout = h5py.VirtualLayout((ROWS,), "S9")
    layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "dataset/url", (ROWS,), "S9")

    def external_link(handle: h5py.File) -> None:
        handle["dataset"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/dataset")

    def soft_link(handle: h5py.File) -> None:
        handle["elsewhere/url"] = URLS
        handle["dataset"] = h5py.SoftLink("/elsewhere")

    def external_data(handle: h5py.File) -> None:
        handle.create_dataset("dataset/url", (ROWS,), "S4", external=[(str(tmp_path / "raw"), 0, 100)])

    def virtual_data(handle: h5py.File) -> None:
        handle.create_virtual_dataset("dataset/url", layout)

    link = "dataset/url is a link to elsewhere; store the data in the file itself."
    data = "dataset/url keeps its data in another file; store them in the file itself."
    for make, said in ((external_link, link), (soft_link, link), (external_data, data), (virtual_data, data)):
        folder = tmp_path / make.__name__
        put(str(folder), {"x.npy": npy(VECTORS)})
        with h5py.File(folder / "x.h5", "w") as handle:
            make(handle)
        with pytest.raises(BadInput) as raised:
            opened(str(folder))
        assert str(raised.value) == f"{folder}/x.h5: {said}"


def test_an_index_that_keeps_no_vectors_is_refused(tmp_path: Path) -> None:
    index = faiss.index_factory(DIM, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    index.add_with_ids(VECTORS, np.arange(ROWS))
    put(str(tmp_path), {"x.index": faiss.serialize_index(index).tobytes(), "x.parquet": META})
    with pytest.raises(BadInput) as raised:
        list(opened(str(tmp_path)).blocks())
    assert str(raised.value) == (
        f"{tmp_path}/x.index: this kind of index (IndexIDMap) does not give its vectors back; give the vectors "
        "themselves."
    )


def test_compressed_archives_are_read_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b32_img.npy", npy(VECTORS))
    (tmp_path / "x.parquet").write_bytes(META)
    assert np.allclose(all_vectors(opened(str(tmp_path))), UNIT, atol=1e-6)
