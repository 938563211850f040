"""Curation on small tables where the right answer is plain, near pairs against all pairs, and the stage's files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpl import curation
from rpl.categories import Category, categories_to_json
from rpl.config import Curate
from rpl.curation import Outcome, Pictures, curate, image_scores, near_pairs, refusals
from rpl.encoder import Encoder
from rpl.errors import BadInput
from rpl.reasons import Reason
from rpl.stages import curate as stage

FAR = [0x0000_0000_0000_0000, 0xFFFF_FFFF_0000_0000, 0x0F0F_0F0F_0F0F_0F0F, 0xF0F0_F0F0_FFFF_0000]


def pictures(*rows: tuple[int, str, str, int, float]) -> Pictures:
    """Rows of category, url, sha256, phash, score."""
    category, url, sha256, phash, score = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    return Pictures(np.array(category, np.int32), url, sha256, np.array(phash, np.uint64), np.array(score, np.float32))


def test_good_pictures_are_kept_by_rank_and_the_rest_are_spare() -> None:
    rows = [(category, f"{category}{rank}", f"{category}{rank}", FAR[2 * category + rank], 0.5)
            for category in (0, 1) for rank in (0, 1)]  # fmt: skip
    assert curate(pictures(*rows), Curate(), 1) == [
        Outcome(None, True, 0.5), Outcome(None, False, 0.5), Outcome(None, True, 0.5), Outcome(None, False, 0.5)
    ]  # fmt: skip


def test_bytes_behind_many_addresses_are_placeholders_everywhere() -> None:
    rows = [(0, "a", "same", FAR[0], 0.5), (0, "b", "same", FAR[0], 0.5), (1, "a", "same", FAR[0], 0.9)]
    assert refusals(pictures(*rows), Curate(max_urls_per_picture=1)) == [Reason.PLACEHOLDER] * 3
    # Two addresses are two, however many categories want them.
    assert Reason.PLACEHOLDER not in refusals(pictures(*rows), Curate(max_urls_per_picture=2))


def test_a_low_score_is_refused_and_does_not_hide_its_better_copy() -> None:
    rows = [(0, "a", "1", FAR[0], 0.1), (0, "b", "2", FAR[0], 0.4)]
    assert refusals(pictures(*rows), Curate(min_score=0.2)) == [Reason.LOW_SCORE, None]


def test_within_a_category_the_better_rank_stays() -> None:
    rows = [(0, "a", "1", FAR[0], 0.1), (0, "b", "2", FAR[0] ^ 0b1111, 0.9), (0, "c", "3", FAR[0] ^ 0b11111, 0.9)]
    # The third is 5 bits from the first and 1 from the second, which is no longer there to be copied.
    assert refusals(pictures(*rows), Curate(phash_distance=4)) == [None, Reason.DUPLICATE, None]
    assert refusals(pictures(*rows), Curate(phash_distance=0)) == [None, None, None]


def test_across_categories_the_higher_score_stays() -> None:
    rows = [
        (0, "a", "1", FAR[0], 0.3), (0, "b", "2", FAR[1], 0.8),
        (1, "a", "1", FAR[0], 0.4), (1, "c", "3", FAR[1] ^ 1, 0.7),
        (2, "a", "1", FAR[0], 0.4),
    ]  # fmt: skip
    elsewhere = Reason.DUPLICATE_ELSEWHERE
    assert refusals(pictures(*rows), Curate()) == [elsewhere, None, None, elsewhere, elsewhere]


def test_no_pictures_at_all() -> None:
    assert curate(pictures(), Curate(), 3) == []


@given(st.data())
def test_every_refused_copy_has_a_good_original_and_no_two_good_ones_are_copies(data: st.DataObject) -> None:
    base = [0, 0xFF, 0xFF00]
    row = st.tuples(
        st.integers(0, 2), st.sampled_from("abcdef"), st.sampled_from("uvwxyz"),
        st.builds(lambda start, bits: start ^ bits, st.sampled_from(base), st.integers(0, 15)),
        st.sampled_from([0.1, 0.2, 0.3]),
    )  # fmt: skip
    rows = sorted(data.draw(st.lists(row, max_size=12)), key=lambda row: row[0])
    distance = data.draw(st.integers(0, 8))
    reasons = refusals(pictures(*rows), Curate(phash_distance=distance, max_urls_per_picture=6))
    good = [index for index, reason in enumerate(reasons) if reason is None]

    def near(one: int, other: int) -> bool:
        return bin(rows[one][3] ^ rows[other][3]).count("1") <= distance

    assert not any(near(one, other) for one in good for other in good if one != other)
    for index, reason in enumerate(reasons):
        if reason == Reason.DUPLICATE_ELSEWHERE:
            assert any(near(index, other) and rows[other][4] >= rows[index][4] for other in good)


@given(st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=40), st.integers(0, 16), st.data())
def test_near_pairs_are_those_of_all_pairs(hashes: list[int], distance: int, data: st.DataObject) -> None:
    flips = st.lists(st.integers(0, 63), max_size=distance + 1)
    for original in hashes[:10]:
        flipped = original
        for bit in data.draw(flips):
            flipped ^= 1 << bit
        if flipped not in hashes:
            hashes.append(flipped)
    expected = [
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if bin(hashes[i] ^ hashes[j]).count("1") <= distance
    ]
    first, second = near_pairs(np.array(hashes, np.uint64), distance)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == expected


def test_near_pairs_of_many_hashes_are_found_without_comparing_all() -> None:
    """50,000 hashes: 1.2 billion pairs, of which a comparison of all would take minutes and 20 GB."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 50_000, np.uint64)
    hashes[1000] = hashes[40_000] ^ np.uint64(0b1011 << 30)
    first, second = near_pairs(hashes, 4)
    assert (1000, 40_000) in set(zip(first.tolist(), second.tolist(), strict=True))
    assert len(first) < 5


def test_image_scores_are_cosines_whatever_the_lengths() -> None:
    rng = np.random.default_rng(0)
    features, text, category = rng.normal(size=(9000, 8)), rng.normal(size=(3, 8)) * 7, rng.integers(0, 3, 9000)
    scores = image_scores(features.astype(np.float16), text.astype(np.float32), category)
    chosen = text[category]
    expected = (features * chosen).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(chosen, axis=1)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=2e-3)
    np.testing.assert_array_equal(scores[8500:8600], image_scores(
        features[8500:8600].astype(np.float16), text.astype(np.float32), category[8500:8600]
    ))  # fmt: skip


# The stage

CATEGORIES = [
    Category(10, "cat", "small", "base"),
    Category(20, "dog", "loyal", "novel"),
    Category(30, "cow", "large", "base"),
    Category(40, "emu", "tall", "base"),
]
ENCODER = Encoder("tiny", None, "d" * 64, 2)
COLUMNS = (
    "category", "rank", "score", "pool_row", "url", "caption", "status", "reason", "key", "sha256", "phash", "width",
    "height", "mime", "fetched_at",
)  # fmt: skip


def downloaded(category: int, rank: int, url: str, status: str, reason: str | None = None, sha: str = "") -> list[Any]:
    found = (sha[:24], sha, f"{FAR[ord(sha[0]) - ord('a')]:016x}", 5, 4, "image/jpeg") if sha else (None,) * 6
    return [category, rank, 0.5, rank, url, "words", status, reason, *found, "2020-01-01T00:00:00Z"]


def context(folder: Path, rows: list[list[Any]], **changes: Any) -> Any:
    """The parts of a Context that the stage uses; the contract around it is tested elsewhere."""
    folder.mkdir(exist_ok=True)
    for index in range(2):  # two shards, by category
        part = [dict(zip(COLUMNS, row, strict=True)) for row in rows if row[0] % 4 // 2 == index]
        types = {"category": pa.int32(), "rank": pa.int32(), "width": pa.int32(), "height": pa.int32()}
        types |= {"score": pa.float32(), "pool_row": pa.int64()}
        schema = pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])
        pq.write_table(pa.Table.from_pylist(part, schema=schema), folder / f"{index}.downloads.parquet")
        keys = sorted({row["key"] for row in part if row["key"]})
        pq.write_table(pa.table({"key": pa.array(keys, pa.string())}), folder / f"{index}.features.parquet")
        np.save(folder / f"{index}.features.npy", np.array([[1, 0]] * len(keys), np.float16).reshape(-1, 2))
    (folder / "categories.json").write_bytes(categories_to_json(CATEGORIES))
    np.save(folder / "category_embeddings.npy", np.array([[1, 0], [1, 1], [0, 1], [2, 2]], np.float32))
    written: dict[str, Any] = {}
    facts = {"encoder": ENCODER.to_facts(), "prompts_digest": "p" * 8}
    config = SimpleNamespace(
        curate=Curate(),
        rounds=SimpleNamespace(kept=SimpleNamespace(base=1, novel=7)),
        pool=SimpleNamespace(truth=changes.get("truth")),
    )
    return SimpleNamespace(
        config=config,
        node=SimpleNamespace(round=2, path="round-2/curate"),
        inputs={
            "crops": [None],
            "embeddings": [SimpleNamespace(facts=facts)],
            "web_features": [SimpleNamespace(facts={"encoder": changes.get("encoder", ENCODER).to_facts()})],
        },
        local=lambda _manifest, name: folder / name,
        input_file=lambda _edge, name: folder / name,
        input_files=lambda _edge, name: [folder / f"{index}.{name}" for index in range(2)],
        scratch=folder,
        add=lambda path: None,
        write_json=written.__setitem__,
        written=written,
        rows=0,
        facts={},
    )


ROWS = [
    downloaded(0, 0, "u0", "failed", "not_found"),
    downloaded(0, 1, "u1", "ok", sha="a"),
    downloaded(0, 2, "u2", "ok", sha="b"),
    downloaded(0, 3, "u3", "not_needed"),
    downloaded(2, 0, "u0", "failed", "not_found"),
    downloaded(2, 1, "u1", "ok", sha="a"),
    downloaded(2, 2, "u5", "ok", sha="c"),
    downloaded(2, 3, "u6", "refused", "opted_out"),
]


def test_the_stage_writes_the_record_the_yields_and_the_facts(tmp_path: Path) -> None:
    truth = pa.table({"url": ["u0", "u1", "u2", "u5"], "category": ["cat", "cat", "cow", ""]})
    pq.write_table(truth, tmp_path / "truth.parquet")
    ctx = context(tmp_path / "work", ROWS, truth=str(tmp_path / "truth.parquet"))
    stage.run(ctx)
    table = pq.read_table(ctx.scratch / "sourced.parquet")
    assert table.column_names == [
        "category", "category_id", "category_name", "rank", "score", "pool_row", "url", "caption", "status", "reason",
        "key", "sha256", "phash", "width", "height", "mime", "fetched_at", "image_score", "round", "encoder",
        "prompts_digest",
    ]  # fmt: skip
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == [
        "failed", "kept", "spare", "not_needed", "failed", "refused", "kept", "refused"
    ]  # fmt: skip
    reasons = ["not_found", None, None, None, "not_found", "duplicate_elsewhere", None, "opted_out"]
    assert [row["reason"] for row in rows] == reasons
    assert [row["image_score"] for row in rows] == [None, 1.0, 1.0, None, None, 0.0, 0.0, None]
    assert (rows[4]["category"], rows[4]["category_id"], rows[4]["category_name"]) == (2, 30, "cow")
    assert (rows[0]["round"], rows[0]["encoder"], rows[0]["prompts_digest"]) == (
        "2", "tiny with random weights (dddddddddddd, 2 dimensions)", "pppppppp"
    )  # fmt: skip
    assert ctx.written["yield.json"] == [
        {"category": 0, "name": "cat", "split": "base", "target": 1, "candidates": 4, "downloaded": 2, "kept": 1,
         "refused": {"not_found": 1}},
        {"category": 2, "name": "cow", "split": "base", "target": 1, "candidates": 4, "downloaded": 2, "kept": 1,
         "refused": {"duplicate_elsewhere": 1, "not_found": 1, "opted_out": 1}},
        {"category": 3, "name": "emu", "split": "base", "target": 1, "candidates": 0, "downloaded": 0, "kept": 0,
         "refused": {}},
    ]  # fmt: skip
    assert json.dumps(ctx.facts) == json.dumps(
        {
            "kept": 2,
            "target": 3,
            "categories_full": 2,
            "by_reason": {"duplicate_elsewhere": 1, "not_found": 1, "opted_out": 1},
            "retrieval_precision": round(2 / 6, 6),  # u0 and u1 for cat; u2, u0, u1, u5 are something else
            "purity": 0.5,
        }
    )
    assert ctx.rows == 8


def test_without_truth_nothing_is_measured_and_without_pictures_nothing_fails(tmp_path: Path) -> None:
    ctx = context(tmp_path / "work", [downloaded(0, 0, "u0", "failed", "not_found")])
    stage.run(ctx)
    assert (ctx.facts["kept"], ctx.facts["retrieval_precision"], ctx.facts["purity"]) == (0, None, None)


def test_pictures_of_another_encoder_are_refused(tmp_path: Path) -> None:
    ctx = context(tmp_path / "work", ROWS, encoder=Encoder("other", "tag", "e" * 64, 2))
    with pytest.raises(BadInput) as caught:
        stage.run(ctx)
    assert str(caught.value) == (
        "round-2/curate: the web pictures were encoded with other tag (eeeeeeeeeeee, 2 dimensions), but this run's "
        "CLIP is tiny with random weights (dddddddddddd, 2 dimensions); run encode again."
    )


def test_a_picture_without_features_is_named(tmp_path: Path) -> None:
    ctx = context(tmp_path / "work", ROWS)
    for index in range(2):
        pq.write_table(pa.table({"key": pa.array([], pa.string())}), tmp_path / "work" / f"{index}.features.parquet")
    with pytest.raises(BadInput) as caught:
        stage.run(ctx)
    assert str(caught.value) == "round-2/curate: picture a has no features; run encode of this round again."


@pytest.mark.parametrize("content", [b"no parquet", None])
def test_a_truth_of_another_form_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "truth.parquet"
    if content is None:
        pq.write_table(pa.table({"address": ["a"]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        stage.run(context(tmp_path / "work", ROWS, truth=str(path)))
    assert str(caught.value) == (f"{path}: is not a parquet table with columns url and category; correct pool.truth.")


def test_the_yields_name_every_category_once() -> None:
    table = curation.record(pa.table({name: [] for name in COLUMNS}), [], CATEGORIES, {"round": "novel"})
    assert [each["name"] for each in curation.yields(table, CATEGORIES, [1], 5)] == ["dog"]
