"""One suite for every kind of store. The S3 server is a real one."""

from __future__ import annotations

import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpl.errors import BadInput
from rpl.store import local_copy, open_store, open_uri, read_uri, stat_uri
from rpl.store import s3 as s3_module

ODD = ["plain", "blank in it", "ü/ñ/漢字.jpg", "a+b%20c", "q?x=1&y=#z;:@,=", "é", "'\"<&>", "~!$()*", ".hidden"]


# ---- the contract


def test_writes_are_read_back_and_replaced(store_uri: str) -> None:
    store = open_store(store_uri)
    assert store.stat("a/b") is None
    store.write("a/b", b"one")
    first = store.stat("a/b")
    assert first is not None
    assert (first.path, first.size, store.read("a/b")) == ("a/b", 3, b"one")
    store.write("a/b", b"two, longer")
    second = store.stat("a/b")
    assert second is not None
    assert (second.size, store.read("a/b")) == (11, b"two, longer")
    assert second.etag != first.etag
    store.write("empty", b"")
    assert store.read("empty") == b""
    with store.open("empty") as stream:
        assert stream.read() == b""


def test_times_are_now_in_seconds(store_uri: str, tmp_path: Path) -> None:
    store = open_store(store_uri)
    (tmp_path / "clock").touch()
    store.write("a", b"x")
    info = store.stat("a")
    assert info is not None
    assert abs(info.modified - (tmp_path / "clock").stat().st_mtime) < 5
    assert list(store.list()) == [info]


def test_listing_is_recursive_and_sorted_by_whole_path(store_uri: str) -> None:
    store = open_store(store_uri)
    assert list(store.list()) == []
    paths = ["b", "a/c", "a-b", "a/b/d", "a/b.e", "ab"]
    for path in paths:
        store.write(path, path.encode())
    assert [info.path for info in store.list()] == sorted(paths)
    assert [info.size for info in store.list()] == [len(path) for path in sorted(paths)]
    assert [info.path for info in store.list("a/")] == ["a/b.e", "a/b/d", "a/c"]
    assert [info.path for info in store.list("a")] == ["a-b", "a/b.e", "a/b/d", "a/c", "ab"]
    assert [info.path for info in store.list("a/b")] == ["a/b.e", "a/b/d"]
    assert list(store.list("zz/")) == []


def test_names_of_any_language_and_sign(store_uri: str) -> None:
    store = open_store(store_uri)
    for path in ODD:
        store.write(path, path.encode())
    assert [info.path for info in store.list()] == sorted(ODD)
    for path in ODD:
        assert store.read(path) == path.encode()
        found = store.stat(path)
        assert found is not None
        assert found.path == path
    store.delete(ODD)
    assert list(store.list()) == []


def test_delete_takes_present_and_absent_objects(store_uri: str) -> None:
    store = open_store(store_uri)
    for path in ("a/b/c", "a/d", "e"):
        store.write(path, b"x")
    store.delete(["a/b/c", "never there", "e"])
    assert [info.path for info in store.list()] == ["a/d"]
    store.delete([])
    store.delete(iter(["a/d"]))
    assert list(store.list()) == []
    store.write("a", b"a folder of that name is no obstacle")


def test_ranges(store_uri: str) -> None:
    store = open_store(store_uri)
    store.write("digits", b"0123456789")
    assert store.read_range("digits", 0, 4) == b"0123"
    assert store.read_range("digits", 7, 2) == b"78"
    assert store.read_range("digits", 7, 100) == b"789"
    assert store.read_range("digits", 10, 5) == b""
    assert store.read_range("digits", 99, 5) == b""
    assert store.read_range("digits", 3, 0) == b""


def test_streams_read_in_any_pieces(store_uri: str) -> None:
    store = open_store(store_uri)
    store.write("lines", b"one\ntwo\n" + b"x" * 300_000)
    with store.open("lines") as stream:
        assert stream.readline() == b"one\n"
        assert stream.read(2) == b"tw"
        assert len(stream.read()) == 300_002
        assert stream.read(1) == b""


def test_large_files_go_up_and_down(store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "_PART_BYTES", 8 << 20)
    store = open_store(store_uri)
    data = bytes(range(256)) * (20 << 12) + b"and a rest"
    (tmp_path / "up").write_bytes(data)
    store.upload("x/large", tmp_path / "up")
    info = store.stat("x/large")
    assert info is not None
    assert info.size == len(data)
    store.download("x/large", tmp_path / "new folder" / "down")
    assert (tmp_path / "new folder" / "down").read_bytes() == data
    assert [file.name for file in (tmp_path / "new folder").iterdir()] == ["down"]
    assert store.read_range("x/large", len(data) - 4, 9) == b"rest"


@pytest.fixture(params=["same store", "folder", "s3"])
def other_uri(request: pytest.FixtureRequest, store_uri: str, tmp_path: Path) -> str:
    """URI of a store to copy from: beside the one of `store_uri`, or of either kind."""
    if request.param == "folder":
        return f"file://{tmp_path}/other"
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('s3').bucket}/{secrets.token_hex(8)}"
    return store_uri


def test_objects_are_copied_from_any_store(
    store_uri: str, other_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(s3_module, "_PART_BYTES", 5 << 20)
    monkeypatch.setattr(s3_module, "_COPY_BYTES", 5 << 20)
    store, other = open_store(f"{store_uri}/new"), open_store(f"{other_uri}/old")
    large = bytes(range(256)) * (48 << 10) + b"and a rest"  # of two whole parts and a bit
    for path, data in {**{path: path.encode() for path in ODD}, "empty": b"", "large": large}.items():
        other.write(path, data)
        store.copy_from(other, path, f"copies/{path}")
        other.delete([path])
        assert store.read(f"copies/{path}") == data
    other.write("a", b"a newer one")
    store.copy_from(other, "a", "copies/empty")
    assert store.read("copies/empty") == b"a newer one"
    assert store.discard_unfinished(-60) == []


def test_a_copy_of_nothing_is_refused_and_leaves_nothing(store_uri: str, other_uri: str) -> None:
    store, other = open_store(f"{store_uri}/new"), open_store(f"{other_uri}/old")
    with pytest.raises(BadInput) as caught:
        store.copy_from(other, "x/none", "x/y")
    assert str(caught.value) == f"{other.uri.removeprefix('file://')}/x/none: does not exist; correct the path."
    assert list(store.list()) == []


def test_of_many_putters_exactly_one_wins(store_uri: str) -> None:
    store = open_store(store_uri)
    for path in ("race-1", "deep/er/race-2"):
        start = threading.Barrier(8)

        def put(number: int, path: str = path, start: threading.Barrier = start) -> bool:
            start.wait()
            return store.put_if_absent(path, f"bytes of {number}".encode())

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(put, range(8)))
        assert won.count(True) == 1
        assert store.read(path) == f"bytes of {won.index(True)}".encode()
        assert store.put_if_absent(path, b"late") is False
    assert [info.path for info in store.list()] == ["deep/er/race-2", "race-1"], "nothing else is left lying about"


FORKED = """
import multiprocessing, sys
from rpl.store import open_store

def put(number):
    return open_store(sys.argv[1]).put_if_absent("race", b"the same bytes")

open_store(sys.argv[1]).write("before", b"x")
with multiprocessing.get_context("fork").Pool(4) as pool:
    print(pool.map(put, range(4)).count(True))
"""


def test_of_many_processes_with_equal_bytes_one_wins(store_uri: str) -> None:
    # Forked children inherit the parent's connections and must not use them. In a process of their own, since this
    # one has threads, and a fork copies their locks as they are.
    result = subprocess.run(
        [sys.executable, "-c", FORKED, store_uri], capture_output=True, text=True, timeout=100, check=True
    )
    assert result.stdout == "1\n"


def test_local_is_a_place_only_in_folders(store_uri: str) -> None:
    store = open_store(store_uri)
    store.write("a/b", b"here")
    place = store.local("a/b")
    if store_uri.startswith("file"):
        assert place is not None
        assert place.read_bytes() == b"here"
    else:
        assert place is None


@pytest.mark.parametrize("path", ["", "/etc/passwd", "a/../b", "..", "../x", "a//b", "a/", "./a", "a/.tmp-1", "a\0b"])
def test_paths_that_leave_the_store_are_refused(store_uri: str, path: str, tmp_path: Path) -> None:
    store = open_store(store_uri)
    (tmp_path / "local").write_bytes(b"x")
    sentence = f"{store.uri}: {path!r} is no object path; give names joined by single slashes, without '.' or '..'."
    actions: list[Callable[[], Any]] = [
        lambda: store.stat(path),
        lambda: store.read(path),
        lambda: store.read_range(path, 0, 1),
        lambda: store.open(path),
        lambda: store.write(path, b""),
        lambda: store.put_if_absent(path, b""),
        lambda: store.upload(path, tmp_path / "local"),
        lambda: store.download(path, tmp_path / "down"),
        lambda: store.delete([path]),
        lambda: store.local(path),
    ]
    for action in actions:
        with pytest.raises(BadInput) as caught:
            action()
        assert str(caught.value) == sentence
    assert not (tmp_path / "down").exists()


def test_prefixes_that_leave_the_store_are_refused(store_uri: str) -> None:
    store = open_store(store_uri)
    for prefix in ("/", "../", "..", "a//b", "a/../b"):
        with pytest.raises(BadInput, match="is no prefix of object paths"):
            store.list(prefix)


def test_absent_objects_are_named(store_uri: str, tmp_path: Path) -> None:
    store = open_store(store_uri)
    name = str(store.local("no/such") or f"{store_uri}/no/such")
    actions: list[Callable[[], Any]] = [
        lambda: store.read("no/such"),
        lambda: store.read_range("no/such", 0, 4),
        lambda: store.open("no/such"),
        lambda: store.download("no/such", tmp_path / "down"),
        lambda: read_uri(f"{store_uri}/no/such"),
    ]
    for action in actions:
        with pytest.raises(BadInput) as caught:
            action()
        assert str(caught.value) == f"{name}: does not exist; correct the path."
    assert not (tmp_path / "down").exists()


# ---- outside files by URI


def test_what_is_at_a_uri(store_uri: str) -> None:
    store = open_store(store_uri)
    for path in ("pool/b.npy", "pool/a/c.npy", "pool-2/d", "list.json"):
        store.write(path, path.encode())
    assert [(i.path, i.size) for i in stat_uri(f"{store_uri}/list.json")] == [("list.json", 9)]
    assert [i.path for i in stat_uri(f"{store_uri}/pool")] == ["a/c.npy", "b.npy"]
    assert stat_uri(f"{store_uri}/pool/") == stat_uri(f"{store_uri}/pool")
    assert stat_uri(f"{store_uri}/nothing") == []
    assert [i.path for i in stat_uri(store_uri)] == ["list.json", "pool-2/d", "pool/a/c.npy", "pool/b.npy"]
    before = stat_uri(f"{store_uri}/list.json")
    store.write("list.json", b"other bytes")
    assert stat_uri(f"{store_uri}/list.json") != before


def test_reading_a_uri(store_uri: str) -> None:
    open_store(store_uri).write("a/b c.txt", b"words")
    assert read_uri(f"{store_uri}/a/b c.txt") == b"words"
    with open_uri(f"{store_uri}/a/b c.txt") as stream:
        assert stream.read() == b"words"
    with pytest.raises(BadInput, match="is no object path"):
        read_uri(f"{store_uri}/a/..")


def test_local_copy_is_made_once_and_again_when_the_object_changes(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(store_uri)
    store.write("weights.bin", b"one")
    uri, folder = f"{store_uri}/weights.bin", tmp_path / "copies"
    copy = local_copy(uri, folder)
    assert copy.read_bytes() == b"one"
    assert copy.name == "weights.bin"
    stamp = copy.stat().st_mtime_ns
    assert local_copy(uri, folder) == copy
    assert copy.stat().st_mtime_ns == stamp
    if store_uri.startswith("file"):
        assert copy == store.local("weights.bin")
        assert not folder.exists()
    store.write("weights.bin", b"three")
    assert local_copy(uri, folder).read_bytes() == b"three"
    with pytest.raises(BadInput) as caught:
        local_copy(f"{store_uri}/absent.bin", folder)
    assert str(caught.value) == f"{store_uri}/absent.bin: does not exist; correct the path."


def test_plain_paths_are_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_store("runs/x").write("a", b"1")
    assert read_uri("runs/x/a") == read_uri(f"{tmp_path}/runs/x/a") == read_uri(f"file://{tmp_path}/runs/x/a") == b"1"
    Path("name").write_bytes(b"22")
    assert [(info.path, info.size) for info in stat_uri("name")] == [("name", 2)]
    assert [info.path for info in stat_uri("runs/..")] == ["name", "runs/x/a"]
    assert open_store("runs/x/").uri == "runs/x"
    store = open_store("runs/x")
    monkeypatch.chdir("/")
    assert store.read("a") == b"1", "a store stays where it was when it was opened"


@pytest.mark.parametrize("uri", ["file://relative", "gs://bucket/x", "https://host/x", "s3:bucket/x", "file:/x", ""])
def test_uris_of_other_forms_are_refused(uri: str) -> None:
    with pytest.raises(BadInput, match="write s3://BUCKET/PREFIX, file:///FOLDER"):
        open_store(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "s3://b", "s3://a bucket/x"])
def test_uris_without_a_bucket_are_refused(uri: str) -> None:
    with pytest.raises(BadInput) as caught:
        open_store(uri)
    assert str(caught.value) == (
        f"{uri!r} names no bucket; write s3://BUCKET/PREFIX, the bucket in letters, digits and hyphens."
    )


PART = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
PATHS = st.lists(PART.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3).map("/".join)


@settings(max_examples=40)
@given(path=PATHS.filter(lambda path: ".tmp-" not in path), data=st.binary(max_size=64))
def test_any_name_round_trips_in_a_folder(tmp_path_factory: pytest.TempPathFactory, path: str, data: bytes) -> None:
    store = open_store(str(tmp_path_factory.mktemp("any")))
    store.write(path, data)
    assert [(info.path, info.size) for info in store.list()] == [(path, len(data))]
    assert store.read(path) == data
