"""The sourcing walk against a plain one, a wave through img2dataset against the hostile server, and the whole stage's
outputs, which must not depend on threads or on the order in which answers come."""

from __future__ import annotations

import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rpl import download, waves
from rpl.config import Download
from rpl.demo.server import Exchange, WebServer
from rpl.errors import BadInput
from rpl.fetch import Fetched, Fetcher
from rpl.images import decode_image
from rpl.progress import Reporter
from rpl.reasons import Reason, Refused
from rpl.stages import download as stage
from rpl.tars import read_tar, write_tar
from rpl.waves import Verdict, WaveDownloader, examine, interleaved


def jpeg(seed: int, size: tuple[int, int] = (96, 80), **options: Any) -> bytes:
    """A picture of its own for each seed, smooth, so that its pHash survives re-encoding."""
    small = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(out, options.pop("format", "JPEG"), **options)
    return out.getvalue()


# The walk


def ok(sha256: str) -> Verdict:
    return Verdict("ok", None, "2020-01-01T00:00:00Z", sha256[:24], sha256, "0" * 16, 1, 1, "image/jpeg")


def bad(reason: Reason) -> Verdict:
    return Verdict(reason.kind, reason.value, "2020-01-01T00:00:00Z")


class Judge:
    """Gives fixed verdicts and remembers what it was asked."""

    def __init__(self, verdicts: dict[str, Verdict]) -> None:
        self.verdicts = verdicts
        self.waves: list[list[str]] = []

    def __call__(self, urls: Sequence[str]) -> dict[str, Verdict]:
        self.waves.append(list(urls))
        return {url: self.verdicts[url] for url in urls}


def test_the_walk_stops_at_the_target_in_rank_order() -> None:
    verdicts = {str(rank): ok(str(rank)) if rank % 2 else bad(Reason.NOT_FOUND) for rank in range(20)}
    judge = Judge(verdicts)
    walked = download.walk({7: list(verdicts)}, 3, judge)
    assert walked.needed == {7: 6}, "ranks 1, 3 and 5 are the three good ones"
    assert judge.waves[0] == ["0", "1", "2"]
    assert sum(map(len, judge.waves)) <= 8


def test_an_address_is_asked_once_for_all_categories() -> None:
    judge = Judge({url: bad(Reason.TIMED_OUT) for url in "abcd"})
    walked = download.walk({0: ["a", "b", "c"], 1: ["c", "a", "d", "a"]}, 2, judge)
    assert Counter(url for wave in judge.waves for url in wave) == Counter("abcd")
    assert walked.needed == {0: 3, 1: 4}


def test_the_same_bytes_again_do_not_count_towards_the_target() -> None:
    judge = Judge({"a": ok("x"), "b": ok("x"), "c": ok("x"), "d": ok("y"), "e": ok("z")})
    assert download.walk({0: list("abcde")}, 2, judge).needed == {0: 4}


@given(st.data())
def test_the_walk_agrees_with_one_that_takes_one_candidate_after_the_other(data: st.DataObject) -> None:
    addresses = [f"u{number}" for number in range(12)]
    verdict = st.one_of(st.sampled_from("xyz").map(ok), st.just(bad(Reason.NOT_FOUND)))
    verdicts = {url: data.draw(verdict) for url in addresses}
    lists = st.lists(st.sampled_from(addresses), max_size=12)
    candidates = {category: data.draw(lists) for category in range(data.draw(st.integers(0, 3)))}
    target = data.draw(st.integers(1, 4))
    judge = Judge(verdicts)
    walked = download.walk(candidates, target, judge)
    for category, urls in candidates.items():
        good: set[str | None] = set()
        needed = 0
        while needed < len(urls) and len(good) < target:
            if verdicts[urls[needed]].status == "ok":
                good.add(verdicts[urls[needed]].sha256)
            needed += 1
        assert walked.needed[category] == needed
        assert set(urls[:needed]) <= walked.verdicts.keys()
    assert all(count == 1 for count in Counter(url for wave in judge.waves for url in wave).values())


def test_record_facts_and_samples_leave_out_what_was_not_needed() -> None:
    candidates = pa.table({"category": [0, 0, 0, 1, 1], "url": list("abcac"), "caption": ["A", None, "C", "D", "E"]})
    verdicts = {"a": ok("aa"), "b": bad(Reason.OPTED_OUT), "c": ok("cc")}
    table = download.record(candidates, download.Walk(verdicts, {0: 2, 1: 1}))
    assert table["status"].to_pylist() == ["ok", "refused", "not_needed", "ok", "not_needed"]
    assert table["reason"].to_pylist() == [None, "opted_out", None, None, None]
    assert table["key"].to_pylist() == ["aa", None, None, "aa", None]
    assert table.schema.field("width").type == pa.int32()
    assert download.facts(table) == {"urls": 2, "ok": 1, "by_reason": {"opted_out": 1}}
    (key, files), *rest = download.samples(table, lambda key: f"jpeg of {key}".encode())
    assert (key, files["jpg"], rest) == ("aa", b"jpeg of aa", [])
    assert json.loads(files["json"]) == {"url": "a", "caption": "A", "sha256": "aa", "width": 1, "height": 1}


def test_shards_share_the_categories_out() -> None:
    table = pa.table({"category": pa.array([0, 1, 2, 3, 4], pa.int32())})
    parts = [download.shard_of(table, index, 2)["category"].to_pylist() for index in range(2)]
    assert parts == [[0, 2, 4], [1, 3]]


# One picture


def test_a_good_picture_is_kept_with_its_facts() -> None:
    data = jpeg(1)
    picture = examine(data, Download())
    assert (picture.width, picture.height, picture.mime) == (96, 80, "image/jpeg")
    assert picture.sha256 == hashlib.sha256(data).hexdigest() and picture.key == picture.sha256[:24]
    assert len(picture.phash) == 16 and int(picture.phash, 16)
    again = examine(jpeg(1, (300, 250), format="PNG"), Download())
    assert again.mime == "image/png"
    assert bin(int(again.phash, 16) ^ int(picture.phash, 16)).count("1") <= 4, "a larger copy is nearly the same"


def test_large_pictures_shrink_and_small_ones_stay() -> None:
    wide = examine(jpeg(1, (3000, 1000)), Download())
    assert (wide.width, wide.height) == (1024, 341)
    assert decode_image(wide.data, max_pixels=10**7).size == (1024, 341)


def test_the_references_square_is_padded_with_white() -> None:
    picture = examine(jpeg(1, (200, 100)), Download(resize="reference", max_side=256))
    image = decode_image(picture.data, max_pixels=10**7)
    assert image.size == (256, 256) == (picture.width, picture.height)
    assert image.getpixel((128, 10)) == image.getpixel((128, 245)) == (255, 255, 255)
    assert np.asarray(image)[70:186].mean() < 250, "the picture itself is in the middle"


def test_turned_pictures_are_stored_upright_and_without_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    exif[0x010E] = "a secret place"
    picture = examine(jpeg(1, (200, 100), exif=exif), Download())
    assert (picture.width, picture.height) == (100, 200)
    assert b"secret" not in picture.data and b"Exif" not in picture.data


def png_bomb(side: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + b"\x01\x00\x00\x00\x00"
    rows = zlib.compress(bytes((1 + (side + 7) // 8) * side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.NOT_AN_IMAGE),
        (b"<!doctype html><title>Gone</title>", Reason.NOT_AN_IMAGE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.NOT_AN_IMAGE),
        (jpeg(1, format="TIFF"), Reason.NOT_AN_IMAGE),
        (jpeg(1)[:400], Reason.DAMAGED_IMAGE),
        (png_bomb(8000), Reason.TOO_MANY_PIXELS),
        (jpeg(1, (63, 100)), Reason.TOO_SMALL),
        (jpeg(1, (64, 321)), Reason.TOO_ELONGATED),
    ],
)
def test_pictures_that_are_refused(data: bytes, reason: Reason) -> None:
    with pytest.raises(Refused) as caught:
        examine(data, Download())
    assert caught.value.reason == reason


def test_hosts_take_turns() -> None:
    urls = ["http://a/1", "http://a/2", "http://a/3", "http://b/1", "http://[", "http://b/2"]
    assert interleaved(urls) == ["http://a/1", "http://b/1", "http://[", "http://a/2", "http://b/2", "http://a/3"]


# A wave, through img2dataset


class FakeFetcher:
    """Answers from a table: bytes, or an exception to raise. It suffices where connections do not matter."""

    def __init__(self, answers: dict[str, bytes | BaseException]) -> None:
        self.answers = answers

    def fetch(self, url: str) -> Fetched:
        answer = self.answers[url]
        if isinstance(answer, BaseException):
            raise answer
        return Fetched(answer, "image/jpeg", url)


def run_wave(answers: dict[str, Any], folder: Path, threads: int = 4) -> tuple[dict[str, Verdict], list[bytes]]:
    done: list[None] = []
    fetcher: Any = FakeFetcher(answers)
    with WaveDownloader(fetcher, Download(), threads, folder, lambda: done.append(None)) as judge:
        verdicts = judge(list(answers))
        pictures = [judge.read(verdict.key) for verdict in verdicts.values() if verdict.key]
    assert len(done) == len(answers)
    return verdicts, pictures


def test_a_wave_gives_a_verdict_for_each_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    verdicts, pictures = run_wave(
        {"a": jpeg(1), "b": Refused(Reason.TIMED_OUT, ""), "c": b"no", "d": jpeg(1), "e": jpeg(2)}, tmp_path
    )
    first = examine(jpeg(1), Download())
    assert (
        verdicts["a"]
        == verdicts["d"]
        == Verdict("ok", None, "2023-11-14T22:13:20Z", first.key, first.sha256, first.phash, 96, 80, "image/jpeg")
    )
    assert verdicts["b"] == Verdict("failed", "timed_out", "2023-11-14T22:13:20Z")
    assert verdicts["c"] == Verdict("refused", "not_an_image", "2023-11-14T22:13:20Z")
    assert sorted(pictures) == sorted([first.data, first.data, examine(jpeg(2), Download()).data])
    assert (tmp_path / "pictures").stat().st_size == len(first.data) + len(examine(jpeg(2), Download()).data)


def test_one_address_alone_is_a_wave_too(tmp_path: Path) -> None:
    assert run_wave({"a": jpeg(1)}, tmp_path)[0]["a"].status == "ok"


def test_a_bug_ends_the_wave_and_is_not_counted_as_a_refusal(tmp_path: Path) -> None:
    answers: dict[str, Any] = {f"u{number}": jpeg(1) for number in range(50)}
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_wave({**answers, "u20": ZeroDivisionError("a bug")}, tmp_path)


def test_a_full_disk_ends_the_wave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.BytesIO):
        def write(self, _data: Any) -> int:
            raise OSError(28, "No space left on device")

    fetcher: Any = FakeFetcher({"a": jpeg(1)})
    with WaveDownloader(fetcher, Download(), 2, tmp_path, lambda: None) as judge:
        judge._spool.close()
        judge._spool = Full()  # type: ignore[assignment]
        with pytest.raises(OSError, match="No space left"):
            judge(["a"])
    assert capsys.readouterr() == ("", ""), "nothing of img2dataset's own reporting of errors"


def test_img2dataset_fetches_as_before_afterwards(tmp_path: Path) -> None:
    module = waves.load_img2dataset()
    original = module.download_image_with_retry
    run_wave({"a": jpeg(1)}, tmp_path)
    assert module.download_image_with_retry is original


def test_another_img2dataset_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waves.load_img2dataset(), "download_image_with_retry", lambda row, timeout: None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.48.0")
    with pytest.raises(BadInput) as caught:
        waves.load_img2dataset()
    assert str(caught.value) == (
        "img2dataset 1.48.0: its Downloader takes other arguments than that of 1.47.0 on PyPI, which this is fitted "
        "to; install img2dataset==1.47.0."
    )


def test_a_senseless_source_date_epoch_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(BadInput) as caught:
        waves.now()
    assert str(caught.value) == ("SOURCE_DATE_EPOCH: 'yesterday' is not a number of seconds since 1970; correct it.")


def test_sigterm_in_a_wave_leaves_at_once(tmp_path: Path) -> None:
    """A handler that raises, as the commands install it: the wave must not wait for addresses that hang."""
    program = """
import signal, sys, threading
from pathlib import Path
from types import SimpleNamespace
from rpl.config import Download
from rpl.waves import WaveDownloader

class Stop(BaseException): pass
def stop(*_): raise Stop
signal.signal(signal.SIGTERM, stop)
def fetch(url):
    print("fetching", flush=True)
    threading.Event().wait(60)
try:
    with WaveDownloader(SimpleNamespace(fetch=fetch), Download(), 1, Path(sys.argv[1]), lambda: None) as judge:
        judge([str(number) for number in range(1000)])
except Stop:
    print("stopped", flush=True)
    import os; os._exit(75)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "fetching\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopped\n"
        assert process.wait(5) == 75


# The stage, against the hostile server


@pytest.fixture
def delays() -> Iterator[Callable[[int], dict[str, Any]]]:
    """Kinds of answers that come late, by a shuffle of their own."""

    def kinds(seed: int) -> dict[str, Any]:
        from rpl.demo.server import KINDS

        def late(kind: str) -> Callable[[Exchange], None]:
            def answer(exchange: Exchange) -> None:
                wait = random.Random(f"{seed} {exchange.request.target} {exchange.request.number}").random() * 0.04
                exchange.closing.wait(wait)
                KINDS[kind](exchange)

            return answer

        return {kind: late(kind) for kind in ("ok", "flaky", "not_found", "redirect")}

    yield kinds


def small_web(folder: Path) -> tuple[dict[str, dict[str, str]], pa.Table]:
    """Two hosts of 60 addresses, some bad; three categories of 30 candidates that partly share them."""
    rng = random.Random(5)
    routes: dict[str, dict[str, str]] = {}
    for number in range(60):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        kind = rng.choice(["ok"] * 6 + ["not_found", "flaky", "truncated", "wrong_type", "noai", "redirect_private"])
        routes[f"http://{'ab'[number % 2]}.test/{number}.jpg"] = {
            "kind": kind, "file": f"{number}.jpg", "location": "http://10.0.0.1/",
        }  # fmt: skip
    routes["http://a.test/hang.jpg"] = {"kind": "hang"}
    urls = list(routes)
    rows = [
        (category, rank, url)
        for category in range(3)
        for rank, url in enumerate([urls[-1], *rng.sample(urls[:-1], 30)] if category == 0 else rng.sample(urls, 30))
    ]
    category, rank, url = zip(*rows, strict=True)
    return routes, pa.table(
        {
            "category": pa.array(category, pa.int32()),
            "rank": pa.array(rank, pa.int32()),
            "score": pa.array([1 - r / 100 for r in rank], pa.float32()),
            "pool_row": pa.array(range(len(rows)), pa.int64()),
            "url": url,
            "caption": [f"picture {r}" for r in rank],
        }
    )


SETTINGS = Download(timeout_s=1, retries=1, max_pixels=10**6)


def run_stage(
    candidates: pa.Table, resolve: dict[str, str], folder: Path, threads: int, previous: str | None = None
) -> SimpleNamespace:
    """The stage's function with a context of plain parts: the contract around it is tested elsewhere."""
    folder.mkdir()
    pq.write_table(candidates, folder / "candidates.parquet")
    config = SimpleNamespace(
        previous=previous,
        download=SETTINGS,
        rounds=SimpleNamespace(kept=SimpleNamespace(base=8, novel=100)),
        runtime=SimpleNamespace(resolve=resolve, threads=threads),
    )
    ctx: Any = SimpleNamespace(
        config=config, node=SimpleNamespace(round=1), shard=SimpleNamespace(index=0, count=1), scratch=folder,
        input_file=lambda _edge, name: folder / name, add=lambda path: None, rows=0, facts={},
        progress=lambda total, unit: Reporter(live=False, every_s=1e9).stage("download", total, unit),
    )  # fmt: skip
    stage.run(ctx)
    return SimpleNamespace(
        facts=ctx.facts,
        rows=ctx.rows,
        table=(folder / "downloads.parquet").read_bytes(),
        tar=(folder / "images.tar").read_bytes(),
        folder=folder,
    )


def test_the_stage_writes_the_same_bytes_whatever_the_threads_and_the_order_of_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delays: Callable[[int], dict[str, Any]]
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    routes, candidates = small_web(tmp_path)
    results = []
    for seed, threads in enumerate((1, 32, 5)):
        with WebServer(tmp_path, routes, kinds=delays(seed)) as server:
            results.append(run_stage(candidates, server.resolve, tmp_path / str(seed), threads))
    first, *others = results
    for other in others:
        assert other.facts == first.facts
        assert other.table == first.table
        assert other.tar == first.tar


def test_the_stage_counts_what_the_server_was_told_to_do(tmp_path: Path) -> None:
    routes, candidates = small_web(tmp_path)
    with WebServer(tmp_path, routes) as server:
        result = run_stage(candidates, server.resolve, tmp_path / "out", 16)
        asked = {request.target for request in server.requests}
    table = pq.read_table(result.folder / "downloads.parquet")
    assert table.column_names[:6] == candidates.column_names
    assert result.rows == table.num_rows == candidates.num_rows
    met = {"not_found", "truncated", "wrong_type", "noai", "redirect_private", "hang"}
    reasons = {
        "not_found": "not_found", "truncated": "damaged_image", "wrong_type": "wrong_type", "noai": "opted_out",
        "redirect_private": "private_address", "hang": "timed_out",
    }  # fmt: skip
    rows = [row for row in table.to_pylist() if row["status"] != "not_needed"]
    told = Counter(reasons[routes[url]["kind"]] for url in {row["url"] for row in rows} if routes[url]["kind"] in met)
    assert result.facts["by_reason"] == dict(sorted(told.items()))
    assert set(told) == set(reasons.values()), "every kind was met"
    assert result.facts["urls"] == len({row["url"] for row in rows}) == result.facts["ok"] + sum(told.values())
    assert {row["url"].partition(".test")[2] for row in rows} <= asked
    for category in range(3):
        mine = [row for row in table.to_pylist() if row["category"] == category]
        assert sum(row["status"] == "ok" for row in mine) == 10, "8 kept x 1.25"
        last = max(row["rank"] for row in mine if row["status"] == "ok")
        assert all((row["status"] == "not_needed") == (row["rank"] > last) for row in mine)
    samples = dict(read_tar(result.folder / "images.tar"))
    assert list(samples) == sorted({row["key"] for row in rows if row["key"]})
    for key, files in samples.items():
        about = json.loads(files["json"])
        original = (tmp_path / routes[about["url"]]["file"]).read_bytes()
        assert hashlib.sha256(original).hexdigest() == about["sha256"] and about["sha256"].startswith(key)


def test_a_shard_without_candidates_writes_empty_files(tmp_path: Path) -> None:
    _, candidates = small_web(tmp_path)
    result = run_stage(candidates.slice(0, 0), {}, tmp_path / "out", 2)
    assert result.facts == {"urls": 0, "ok": 0, "by_reason": {}}
    assert pq.read_table(result.folder / "downloads.parquet").num_rows == 0
    assert list(read_tar(result.folder / "images.tar")) == []


# The stage after a previous run


class Previous:
    """A finished run in place of `rpl.finished.Finished`: its download nodes are folders that `run_stage` filled."""

    def __init__(self, rounds: list[Path], novel: list[Path], settings: Download = SETTINGS) -> None:
        self.run = SimpleNamespace(config=SimpleNamespace(download=settings))
        self._folders = {"round_downloads": rounds, "novel_downloads": novel}

    def inputs(self, edge: str) -> list[Path]:
        return self._folders[edge]

    def local(self, folder: Path, name: str) -> Path:
        return folder / name

    def close(self) -> None:
        """Nothing was copied."""


def risen(routes: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The same web some days later: what was not found is there, and every good page is gone."""
    kinds = {"not_found": "ok", "ok": "not_found"}
    return {url: {**route, "kind": kinds.get(route["kind"], route["kind"])} for url, route in routes.items()}


@pytest.mark.parametrize("nodes", ["a round's", "the novel pass's", "shards'"])
def test_after_a_previous_run_only_what_failed_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: str
) -> None:
    routes, candidates = small_web(tmp_path)
    first = tmp_path / "first"
    with WebServer(tmp_path, routes) as server:
        before = run_stage(candidates, server.resolve, first, 16)
        parts = [tmp_path / "0", tmp_path / "1"]
        for number, part in enumerate(parts if nodes == "shards'" else []):
            run_stage(download.shard_of(candidates, number, 2), server.resolve, part, 16)
    made = {"a round's": ([first], []), "the novel pass's": ([], [first]), "shards'": (parts, [])}[nodes]
    monkeypatch.setattr(stage, "previous_run", lambda uri: Previous(*made))
    with WebServer(tmp_path, risen(routes)) as server:
        after = run_stage(candidates, server.resolve, tmp_path / "second", 16, previous="s3://bucket/first")
        asked = {f"http://{request.host}{request.target}" for request in server.requests}
    then, now = (pq.read_table(result.folder / "downloads.parquet").to_pylist() for result in (before, after))
    status = {row["url"]: row["status"] for row in then if row["status"] != "not_needed"}
    failed = {url for url, word in status.items() if word == "failed"}
    assert asked and asked <= failed | (set(candidates["url"].to_pylist()) - status.keys())
    for was, row in zip(then, now, strict=True):
        if was["status"] in ("ok", "refused") and row["status"] != "not_needed":
            assert {name: row[name] for name in was if name != "fetched_at"} == {
                name: was[name] for name in was if name != "fetched_at"
            }
    needed = {row["url"]: row["status"] for row in now if row["status"] != "not_needed"}
    reused = [url for url in needed if status.get(url) in ("ok", "refused")]
    revived = [url for url in needed if url in failed and needed[url] == "ok"]
    assert revived and all(routes[url]["kind"] == "not_found" for url in revived)
    assert (after.facts["reused"], after.facts["revived"]) == (len(reused), len(revived))
    assert after.facts["asked_again"] == len(failed & needed.keys())
    pictures, pictures_then = (dict(read_tar(result.folder / "images.tar")) for result in (after, before))
    assert pictures.keys() == {row["key"] for row in now if row["status"] == "ok"}
    both = pictures.keys() & pictures_then.keys()
    assert both and all(pictures[key]["jpg"] == pictures_then[key]["jpg"] for key in both)


def test_other_settings_than_then_let_no_verdict_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    routes, candidates = small_web(tmp_path)
    with WebServer(tmp_path, routes) as server:
        first = run_stage(candidates, server.resolve, tmp_path / "first", 16)
        others = SETTINGS.model_copy(update={"max_side": 512})
        monkeypatch.setattr(stage, "previous_run", lambda uri: Previous([first.folder], [], others))
        again = run_stage(candidates, server.resolve, tmp_path / "second", 16, previous="s3://bucket/first")
    assert (again.table, again.tar) == (first.table, first.tar)
    assert again.facts == {**first.facts, "reused": 0, "asked_again": first.facts["urls"], "revived": 0}


def test_a_picture_that_the_previous_run_has_lost_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes, candidates = small_web(tmp_path)
    with WebServer(tmp_path, routes) as server:
        first = run_stage(candidates, server.resolve, tmp_path / "first", 16)
        (lost, _), *others = read_tar(first.folder / "images.tar")
        write_tar(first.folder / "images.tar", others)
        monkeypatch.setattr(stage, "previous_run", lambda uri: Previous([first.folder], []))
        before = len(server.requests)
        again = run_stage(candidates, server.resolve, tmp_path / "second", 16, previous="s3://bucket/first")
        asked = {f"http://{request.host}{request.target}" for request in list(server.requests)[before:]}
    rows = pq.read_table(first.folder / "downloads.parquet").to_pylist()
    assert {row["url"] for row in rows if row["key"] == lost} <= asked
    assert not {row["url"] for row in rows if row["key"] not in (None, lost)} & asked
    assert again.tar == first.tar


def test_a_previous_run_that_vanished_is_named(tmp_path: Path) -> None:
    _, candidates = small_web(tmp_path)
    with pytest.raises(BadInput) as caught:
        run_stage(candidates, {}, tmp_path / "out", 2, previous=str(tmp_path / "gone"))
    assert str(caught.value) == (
        f"{tmp_path}/gone: the run under `previous` is not there any more; bring it back, or start a new run from "
        "another one."
    )


def test_real_connections_serve_many_threads(tmp_path: Path) -> None:
    """400 addresses in one wave over the real fetcher: every one answered, and connections are shared."""
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    routes = {f"http://{'abcd'[number % 4]}.test/{number}": {"kind": "ok", "file": "a.jpg"} for number in range(400)}
    before = threading.active_count()
    with (
        WebServer(tmp_path, routes) as server,
        Fetcher(Download(), server.resolve) as fetcher,
        WaveDownloader(fetcher, Download(), 16, tmp_path, lambda: None) as judge,
    ):
        verdicts = judge(list(routes))
        assert server.accepted <= 4 * Download().connections_per_host
    assert Counter(verdict.status for verdict in verdicts.values()) == {"ok": 400}
    assert threading.active_count() <= before + 32, "the pool's threads are gone; the server's may be on their way out"
