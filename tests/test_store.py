"""One suite for every kind of store, then what each kind has of its own. The S3 server is a real one."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpl.demo import s3 as s3_server
from rpl.demo.s3 import S3Server
from rpl.errors import BadInput, TryAgain
from rpl.store import Store, local_copy, open_store, open_uri, read_uri, s3_client, stat_uri
from rpl.store import files as files_module
from rpl.store import s3 as s3_module
from tests.flaky_s3 import Fault, FlakyProxy, flaky_proxy

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


# ---- folders alone


def test_unfinished_files_are_not_objects_and_are_collected_when_old(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a/b", b"x")
    (tmp_path / "a" / ".tmp-dead").write_bytes(b"half")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".tmp-old").write_bytes(b"half")
    os.utime(tmp_path / "c" / ".tmp-old", (1, 1))
    assert [info.path for info in store.list()] == ["a/b"]
    assert store.discard_unfinished(3600) == ["c/.tmp-old"]
    assert not (tmp_path / "c").exists()
    assert store.discard_unfinished(-60) == ["a/.tmp-dead"]
    assert store.read("a/b") == b"x"


def test_folders_emptied_by_delete_are_removed_up_to_the_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "s"))
    store.write("a/b/c", b"x")
    store.write("a/d", b"x")
    store.delete(["a/b/c"])
    assert not (tmp_path / "s/a/b").exists()
    store.delete(["a/d"])
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_file_systems_without_hard_links_still_have_one_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(files_module.os, "link", refuse)
    test_of_many_putters_exactly_one_wins(str(tmp_path))
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_link_that_met_its_own_success_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_and_complain(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "as over NFS when an answer was lost", str(target))

    monkeypatch.setattr(files_module.os, "link", link_and_complain)
    store = open_store(str(tmp_path))
    assert store.put_if_absent("a", b"mine") is True
    assert store.read("a") == b"mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_leaves_the_old_object_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = open_store(str(tmp_path / "s"))
    store.write("a", b"old")
    (tmp_path / "file").write_bytes(b"new")

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files_module.os, "fsync", full)
    actions: list[Callable[[], Any]] = [
        lambda: store.write("a", b"new"),
        lambda: store.upload("a", tmp_path / "file"),
        lambda: store.put_if_absent("b", b"new"),
    ]
    for action, name in zip(actions, "aab", strict=True):
        with pytest.raises(TryAgain) as caught:
            action()
        assert str(caught.value) == f"{tmp_path}/s/{name}: the disk is full; free space, then run it again."
    assert [file.name for file in (tmp_path / "s").iterdir()] == ["a"]
    assert store.read("a") == b"old"


def test_a_device_that_is_full_says_so(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(TryAgain, match="the disk is full"), files_module.explained_file(tmp_path / "x"):
        Path("/dev/full").write_bytes(b"x")


def test_a_local_file_that_is_absent_is_named_itself(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        open_store(f"{tmp_path}/s").upload("a", tmp_path / "none")
    assert str(caught.value) == f"{tmp_path}/none: does not exist; correct the path."


def test_sentences_about_folders_files_and_permissions(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("folder/file", b"x")
    actions: list[tuple[Callable[[], Any], str]] = [
        (lambda: store.read("folder"), f"{tmp_path}/folder: is a folder, not a file; correct the path."),
        (lambda: store.write("folder", b""), f"{tmp_path}/folder: is a folder, not a file; correct the path."),
        (
            lambda: store.write("folder/file/x", b""),
            f"{tmp_path}/folder/file/x: a part of this path is a file, not a folder; correct the path.",
        ),
        (
            lambda: store.write("n" * 300, b""),
            f"{tmp_path}/{'n' * 300}: file name too long; correct the path or its permissions.",
        ),
    ]
    for action, sentence in actions:
        with pytest.raises(BadInput) as caught:
            action()
        assert str(caught.value) == sentence
    assert store.stat("folder") is None
    assert store.stat("folder/file/x") is None
    with pytest.raises(BadInput) as caught, files_module.explained_file(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))
    assert str(caught.value) == f"{tmp_path}/x: permission denied; correct the path or its permissions."
    with pytest.raises(TryAgain) as again, files_module.explained_file(tmp_path / "x"):
        raise OSError(errno.ESTALE, "Stale file handle", str(tmp_path / "x"))
    assert str(again.value) == f"{tmp_path}/x: the file system answered 'Stale file handle'; try again."


# ---- S3 alone: refusals of a real server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.bucket


def _sentences(uri: str, tmp_path: Path) -> set[str]:
    """What every kind of call says when none can succeed."""
    store = open_store(uri)
    (tmp_path / "local").write_bytes(b"x")
    actions: list[Callable[[], Any]] = [
        lambda: store.stat("a"),
        lambda: store.read("a"),
        lambda: store.write("a", b"x"),
        lambda: store.put_if_absent("a", b"x"),
        lambda: store.upload("a", tmp_path / "local"),
        lambda: store.list("a"),
        lambda: stat_uri(f"{uri}/a"),
    ]
    said = set()
    for action in actions:
        with pytest.raises(BadInput) as caught:
            action()
        said.add(str(caught.value))
    return said


def test_unknown_key_id(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOSUCHKEYID")
    assert _sentences(f"s3://{bucket}/p", tmp_path) == {
        f"s3://{bucket}/p/a: the server does not know this key id; "
        "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile."
    }


def test_wrong_secret(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert _sentences(f"s3://{bucket}/p", tmp_path) == {
        f"s3://{bucket}/p/a: the secret key does not fit the key id; "
        "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile."
    }


def test_bucket_that_is_not_there(s3: S3Server, tmp_path: Path) -> None:
    assert _sentences("s3://no-such-bucket/p", tmp_path) == {
        f"s3://no-such-bucket/p/a: there is no bucket 'no-such-bucket' at {s3.endpoint}; create it or correct the URI."
    }


def test_no_keys_at_all(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    assert _sentences(f"s3://{bucket}/p", tmp_path) == {
        f"s3://{bucket}/p/a: no S3 keys were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
    }


def test_keys_that_may_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = s3_server.identities

    def and_a_reader(access_key: str, secret_key: str) -> dict[str, Any]:
        identities = everything(access_key, secret_key)
        keys = [{"accessKey": "READER", "secretKey": "reader's secret"}]
        identities["identities"].append({"name": "reader", "credentials": keys, "actions": ["Read", "List"]})
        return identities

    monkeypatch.setattr(s3_server, "identities", and_a_reader)
    with S3Server(tmp_path / "server", bucket="shared") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        open_store("s3://shared").write("a", b"x")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "READER")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "reader's secret")
        store = open_store("s3://shared")
        assert store.read("a") == b"x"
        refused = "these keys are not allowed to do that; give them read, write, list and delete on the bucket."
        actions: list[tuple[Callable[[], Any], str]] = [
            (lambda: store.write("a", b"y"), f"s3://shared/a: {refused}"),
            (lambda: store.put_if_absent("b", b"y"), f"s3://shared/b: {refused}"),
            (lambda: store.delete(["a"]), f"s3://shared/a: {refused}"),
        ]
        for action, sentence in actions:
            with pytest.raises(BadInput) as caught:
                action()
            assert str(caught.value) == sentence
        assert store.read("a") == b"x"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_ENDPOINT_URL_S3", "no address", "Invalid endpoint: no address"),
        ("AWS_PROFILE", "nobody", "The config profile (nobody) could not be found"),
    ],
)
def test_settings_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadInput) as caught:
        open_store("s3://bucket/p").read("a")
    assert str(caught.value) == f"s3://bucket/p/a: the S3 settings cannot be used ({words}); correct them."


# ---- S3 alone: clients


def test_clients_are_made_once_per_process_and_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    first = s3_client.clients("s3://x")
    assert s3_client.clients("s3://y") is first
    assert (first.endpoint, first.is_aws) == (s3.endpoint, False)
    assert first.usual.meta.config.s3 == {"addressing_style": "path"}
    assert first.usual.meta.config.request_checksum_calculation == "when_required"
    assert first.once.meta.config.retries["total_max_attempts"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        assert s3_client.clients("s3://x") is not first
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OTHER")
    assert s3_client.clients("s3://x") is not first


def test_without_an_endpoint_it_is_amazon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    made = s3_client.clients("s3://x")
    assert made.is_aws
    assert made.usual.meta.region_name == "eu-central-1"
    assert made.usual.meta.config.request_checksum_calculation == "when_supported"


def test_an_endpoint_from_a_profile_is_another_vendors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text("[profile there]\nendpoint_url = http://127.0.0.1:9\nregion = there-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "there")
    made = s3_client.clients("s3://x")
    assert (made.endpoint, made.is_aws, made.usual.meta.region_name) == ("http://127.0.0.1:9", False, "there-1")
    assert made.once.meta.config.request_checksum_calculation == "when_required"
    assert made.usual.meta.config.s3 == {"addressing_style": "path"}


# ---- S3 alone: failures on the way


@pytest.fixture(scope="module")
def shared_proxy(s3_server: S3Server) -> Iterator[FlakyProxy]:
    """One for all tests, since each new endpoint costs new clients and a probe of conditional puts."""
    with flaky_proxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(s3: S3Server, shared_proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> FlakyProxy:
    shared_proxy.faults = []
    shared_proxy.seen.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", shared_proxy.endpoint)
    return shared_proxy


class Direct:
    """The same prefix without the proxy: what is really there."""

    def __init__(self, server: S3Server, prefix: str) -> None:
        self._client, self._bucket, self._prefix = server.client(), server.bucket, prefix

    def read(self, path: str) -> bytes:
        return self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{path}")["Body"].read()

    def write(self, path: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=f"{self._prefix}/{path}", Body=data)


@pytest.fixture
def direct(s3: S3Server, tmp_path: Path) -> Direct:
    return Direct(s3, tmp_path.name)


@pytest.fixture
def flaky(s3: S3Server, proxy: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store behind the proxy, past the probe of conditional puts, that waits little between its tries."""
    monkeypatch.setattr(s3_module, "_FIRST_WAIT_S", 0.02)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    store = open_store(f"s3://{s3.bucket}/{tmp_path.name}")
    assert store.put_if_absent("first", b"") is True
    proxy.seen.clear()
    return store


@pytest.mark.parametrize("kind", ["lose", "lie", "conflict", "refuse"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_put_whose_answer_is_lost_finds_its_own_success(
    flaky: Store, direct: Direct, proxy: FlakyProxy, kind: str, times: int
) -> None:
    proxy.faults = [Fault("PUT", kind, times, conditional=True)]
    assert flaky.put_if_absent("k", b"mine") is True
    assert proxy.faults[0].times < times
    assert direct.read("k") == b"mine"
    proxy.faults = []
    assert flaky.put_if_absent("k", b"mine") is False, "equal bytes of a later call are not this call's"


@pytest.mark.parametrize("kind", ["lose", "lie", "conflict"])
def test_a_put_whose_answer_is_lost_finds_that_another_won(
    flaky: Store, direct: Direct, proxy: FlakyProxy, kind: str
) -> None:
    proxy.faults = [Fault("PUT", kind, conditional=True, before=lambda: direct.write("k", b"another's"))]
    assert flaky.put_if_absent("k", b"mine") is False
    assert direct.read("k") == b"another's"


def test_while_the_outcome_is_unknown_nothing_is_deleted(
    flaky: Store, direct: Direct, proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "_PUT_BUDGET_S", 0.5)

    def nobody_answers_any_more() -> None:
        proxy.faults.append(Fault("HEAD", "refuse", 99))

    proxy.faults = [Fault("PUT", "lose", 99, conditional=True, before=nobody_answers_any_more)]
    with pytest.raises(TryAgain) as caught:
        flaky.put_if_absent("k", b"mine")
    assert str(caught.value) == (
        f"{flaky.uri}/k: {proxy.endpoint} did not say whether the object was written (ConnectionClosedError); "
        "try again."
    )
    assert direct.read("k") == b"mine"
    assert "DELETE" not in [method for method, _ in proxy.seen]


DATA = bytes(range(256)) * 4096


def test_a_body_that_breaks_off_is_taken_up_again(flaky: Store, direct: Direct, proxy: FlakyProxy) -> None:
    direct.write("k", DATA)
    proxy.faults = [Fault("GET", "cut", 2, bytes=300_000)]
    assert flaky.read("k") == DATA
    first, *resumed = [where for method, where in proxy.seen if method == "GET"]
    assert first is None
    assert len(resumed) == 2
    assert all(where is not None and where.startswith("bytes=") for where in resumed)
    proxy.faults = [Fault("GET", "cut", bytes=100_000)]
    assert flaky.read_range("k", 1000, 500_000) == DATA[1000:501_000]


def test_a_download_that_breaks_off_is_complete_or_not_there(
    flaky: Store, direct: Direct, proxy: FlakyProxy, tmp_path: Path
) -> None:
    direct.write("k", DATA)
    proxy.faults = [Fault("GET", "cut", bytes=777_777)]
    flaky.download("k", tmp_path / "down/k")
    assert (tmp_path / "down/k").read_bytes() == DATA
    proxy.faults = [Fault("GET", "cut", 99)]
    with pytest.raises(TryAgain) as caught:
        flaky.download("k", tmp_path / "down/again")
    assert str(caught.value) == f"{flaky.uri}/k: {proxy.endpoint} broke off 3 times at byte 0; try again."
    assert [file.name for file in (tmp_path / "down").iterdir()] == ["k"]


def test_an_object_replaced_while_it_is_read_is_never_mixed(flaky: Store, direct: Direct, proxy: FlakyProxy) -> None:
    direct.write("k", DATA)
    proxy.faults = [Fault("GET", "cut", bytes=300_000, before=lambda: direct.write("other", b"still the same"))]
    with flaky.open("k") as stream:
        assert stream.read(100_000) == DATA[:100_000]
        direct.write("k", DATA[::-1])
        with pytest.raises(TryAgain) as caught:
            stream.read()
    assert str(caught.value) == f"{flaky.uri}/k: was replaced while it was read; try again."


def test_busy_servers_are_asked_again_and_then_named(flaky: Store, direct: Direct, proxy: FlakyProxy) -> None:
    direct.write("k", b"x")
    proxy.faults = [Fault("GET", "refuse", 2)]
    assert flaky.read("k") == b"x"
    proxy.faults = [Fault("GET", "refuse", 99), Fault("PUT", "refuse", 99)]
    for action in (lambda: flaky.read("k"), lambda: flaky.write("k", b"y")):
        with pytest.raises(TryAgain) as caught:
            action()
        assert str(caught.value) == f"{flaky.uri}/k: {proxy.endpoint} answered SlowDown (HTTP 503); try again."


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        for action in (lambda store: store.read("a"), lambda store: store.put_if_absent("a", b"")):
            with pytest.raises(TryAgain) as caught:
                action(open_store("s3://bucket/p"))
            assert str(caught.value) == (
                f"s3://bucket/p/a: {endpoint} does not answer (EndpointConnectionError); "
                "check AWS_ENDPOINT_URL and that the server runs, then try again."
            )


def test_a_server_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    monkeypatch.setattr(s3_client, "READ_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        with pytest.raises(TryAgain) as caught:
            open_store("s3://bucket/p").read("a")
    assert str(caught.value) == (
        f"s3://bucket/p/a: {endpoint} does not answer (ReadTimeoutError); "
        "check AWS_ENDPOINT_URL and that the server runs, then try again."
    )


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked: list[tuple[str, str]] = self.server.asked  # type: ignore[attr-defined]
        asked.append((self.command, self.path))
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # one thread serves two clients in turn
        self.end_headers()
        self.wfile.write(body)


class Overwriting(Answering):
    """A store that takes every put, as some do: enough of S3 to be probed."""

    def do_HEAD(self) -> None:
        self._answer(404)

    def do_GET(self) -> None:
        self._answer(200, b"<ListBucketResult/>")

    def do_PUT(self) -> None:
        self._answer(200)

    def do_DELETE(self) -> None:
        self._answer(204)


class WebSite(Answering):
    """No S3 at all, as behind a wrong port."""

    def _page(self) -> None:
        self._answer(200, b"" if self.command == "HEAD" else b"<!doctype html><p>It works!")

    do_HEAD = do_GET = _page


class WholeOnly(Answering):
    """Passes over Range, and breaks its answers off after four bytes."""

    def do_GET(self) -> None:
        self.send_response_only(200)
        self.send_header("Content-Length", "10")
        self.send_header("ETag", '"same"')
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"0123")


@contextmanager
def served(handler: type[Answering]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Endpoint of a server that answers so, and the list of what it was asked."""
    asked: list[tuple[str, str]] = []
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = asked  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_is_no_s3_is_told(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    with served(WebSite) as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = open_store("s3://bucket/p")
        for action in (lambda: store.stat("a"), lambda: store.read("a")):
            with pytest.raises(BadInput) as caught:
                action()
            assert str(caught.value) == (
                f"s3://bucket/p/a: {endpoint} does not answer as an S3 server does; correct AWS_ENDPOINT_URL."
            )


def test_a_server_that_passes_over_ranges_cannot_garble_a_body(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    with served(WholeOnly) as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = open_store("s3://bucket/p")
        assert store.read_range("a", 0, 3) == b"012"
        with store.open("a") as stream, pytest.raises(BadInput) as caught:
            stream.read(4)
            stream.read()
    assert str(caught.value) == f"s3://bucket/p/a: {endpoint} does not answer requests for a range; use another server."


def test_a_store_that_overwrites_is_refused(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    with served(Overwriting) as (endpoint, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        with pytest.raises(BadInput) as caught:
            open_store("s3://bucket/p").put_if_absent("a", b"precious")
    assert str(caught.value) == (
        f"s3://bucket: {endpoint} overwrites objects although it is asked not to (If-None-Match: *); "
        "use a server that honours conditional puts, or a file:// folder."
    )
    put = [path for method, path in asked if method == "PUT"]
    deleted = [path for method, path in asked if method == "DELETE"]
    assert put == [deleted[0]] * 2, "the probe is put twice and taken away; the object itself is never put"
    assert put[0].startswith("/bucket/p/.probe/")


def test_the_probe_is_made_once_and_leaves_nothing(
    s3: S3Server, proxy: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "_known_conditional", set())
    store = open_store(f"s3://{s3.bucket}/{tmp_path.name}")
    assert store.put_if_absent("a", b"") is True
    assert [method for method, _ in proxy.seen].count("PUT") == 3
    proxy.seen.clear()
    assert open_store(f"s3://{s3.bucket}/{tmp_path.name}-2").put_if_absent("b", b"") is True
    assert [method for method, _ in proxy.seen].count("PUT") == 1
    assert [info.path for info in store.list()] == ["a"]


# ---- S3 alone: uploads in parts


@pytest.fixture
def in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of two and a bit parts of the least size that S3 allows."""
    monkeypatch.setattr(s3_module, "_PART_BYTES", 5 << 20)
    file = tmp_path / "large"
    file.write_bytes(DATA * 11)
    return file


def test_a_completion_whose_answer_is_lost_is_found(
    flaky: Store, direct: Direct, proxy: FlakyProxy, in_parts: Path
) -> None:
    proxy.faults = [Fault("POST", "lose", 2, within="uploadId=")]
    flaky.upload("k", in_parts)
    assert direct.read("k") == in_parts.read_bytes()


def test_an_upload_that_fails_leaves_no_parts(s3: S3Server, flaky: Store, proxy: FlakyProxy, in_parts: Path) -> None:
    proxy.faults = [Fault("PUT", "refuse", 99, within="partNumber=2")]
    with pytest.raises(TryAgain) as caught:
        flaky.upload("k", in_parts)
    assert str(caught.value) == f"{flaky.uri}/k: {proxy.endpoint} answered SlowDown (HTTP 503); try again."
    assert "DELETE" in [method for method, _ in proxy.seen]
    assert flaky.stat("k") is None
    assert flaky.discard_unfinished(-60) == []


def test_a_copy_within_s3_does_not_pass_through_here(
    flaky: Store, direct: Direct, proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "_COPY_BYTES", 5 << 20)
    data = DATA * 11
    direct.write("k", data)
    proxy.seen.clear()
    flaky.copy_from(flaky, "k", "copy")
    assert direct.read("copy") == data
    assert "GET" not in [method for method, _ in proxy.seen], "no body was fetched"
    proxy.faults = [Fault("PUT", "refuse", 99, within="partNumber=2")]
    with pytest.raises(TryAgain, match=r"/torn: .* answered SlowDown \(HTTP 503\); try again"):
        flaky.copy_from(flaky, "k", "torn")
    assert flaky.stat("torn") is None
    assert flaky.discard_unfinished(-60) == []


def test_parts_of_killed_uploads_are_collected_when_old(s3: S3Server, tmp_path: Path) -> None:
    store = open_store(f"s3://{s3.bucket}/{tmp_path.name}")
    client = s3.client()
    upload = client.create_multipart_upload(Bucket=s3.bucket, Key=f"{tmp_path.name}/x/killed")["UploadId"]
    key = {"Bucket": s3.bucket, "Key": f"{tmp_path.name}/x/killed", "UploadId": upload}
    client.upload_part(**key, PartNumber=1, Body=b"half of it")
    assert list(store.list()) == []
    assert store.discard_unfinished(3600) == []
    assert store.discard_unfinished(-60) == ["x/killed"]
    assert "Uploads" not in client.list_multipart_uploads(Bucket=s3.bucket, Prefix=tmp_path.name)
