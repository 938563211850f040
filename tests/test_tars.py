"""WebDataset tars: same samples, same bytes; nothing in a foreign tar is believed."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpl.errors import BadInput
from rpl.tars import read_tar, write_tar

SAMPLES = [("b1", {"json": b"{}", "jpg": b"\xff\xd8"}), ("a2", {"jpg": b""})]


def hand_made(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_reads_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    assert write_tar(path, SAMPLES) == 2
    assert list(read_tar(path)) == [("b1", {"jpg": b"\xff\xd8", "json": b"{}"}), ("a2", {"jpg": b""})]


keys = st.text("abcdef0123456789_-", min_size=1, max_size=80)
files = st.dictionaries(st.text("jpgnson", min_size=1, max_size=8), st.binary(max_size=1500), min_size=1, max_size=3)


@given(st.lists(st.tuples(keys, files), unique_by=lambda sample: sample[0], max_size=6))
def test_any_samples_round_trip(tmp_path_factory: pytest.TempPathFactory, samples: list) -> None:
    path = tmp_path_factory.mktemp("tars") / "x.tar"
    write_tar(path, samples)
    assert list(read_tar(path)) == samples


def test_same_samples_give_the_same_bytes_and_no_trace_of_the_machine(tmp_path: Path) -> None:
    one, two = tmp_path / "1.tar", tmp_path / "2.tar"
    write_tar(one, SAMPLES)
    write_tar(two, [(key, dict(reversed(list(files.items())))) for key, files in SAMPLES])
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
    assert one.read_bytes()[257:265] == b"ustar\x0000"


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "..", "a b", "ä", "x" * 81])
def test_keys_that_would_merge_or_escape_are_not_written(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="is not a plain name"):
        write_tar(tmp_path / "x.tar", [(key, {"jpg": b""})])


def test_a_key_is_written_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key 'a' is written twice"):
        write_tar(tmp_path / "x.tar", [("a", {"jpg": b""}), ("b", {"jpg": b""}), ("a", {"png": b""})])
    with pytest.raises(ValueError, match=r"extension 'J/G' of a is not a plain one"):
        write_tar(tmp_path / "x.tar", [("a", {"J/G": b""})])


@pytest.mark.parametrize("name", ["../../etc/cron.d/x.jpg", "/a.jpg", "dir/a.jpg", "a", ".jpg", "a.tar.gz"])
def test_names_that_are_no_keys_are_refused(tmp_path: Path, name: str) -> None:
    path = hand_made(tmp_path / "x.tar", (tarfile.TarInfo(name), b""))
    with pytest.raises(BadInput) as raised:
        list(read_tar(path))
    assert str(raised.value) == f"{path}: member {name!r} is not named KEY.EXT; make the tar again."


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_no_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    path = hand_made(tmp_path / "x.tar", (info, b""))
    with pytest.raises(BadInput) as raised:
        list(read_tar(path))
    assert str(raised.value) == f"{path}: member 'a.jpg' is not a plain file; make the tar again."


def test_large_members_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = hand_made(tmp_path / "x.tar", (tarfile.TarInfo("a.jpg"), bytes(2000)))
    with pytest.raises(BadInput, match=r"member 'a\.jpg' has 2000 bytes, more than 1999; make the tar again"):
        list(read_tar(path, max_member_bytes=1999))
    assert len(list(read_tar(path, max_member_bytes=2000))) == 1


def test_files_of_a_key_stand_together_and_once(tmp_path: Path) -> None:
    apart = hand_made(tmp_path / "x.tar", *((tarfile.TarInfo(n), b"") for n in ("a.jpg", "b.jpg", "a.json")))
    with pytest.raises(BadInput, match="key a comes twice"):
        list(read_tar(apart))
    twice = hand_made(tmp_path / "y.tar", *((tarfile.TarInfo(n), b"") for n in ("a.jpg", "a.jpg")))
    with pytest.raises(BadInput, match=r"member a\.jpg comes twice"):
        list(read_tar(twice))


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 1024, 1536])
def test_a_cut_tar_is_refused_wherever_it_was_cut(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, [("a", {"jpg": b"1" * 300, "json": b"{}"})])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadInput, match=r"x\.tar: is not a whole tar \(.+\); make it again\."):
        list(read_tar(path))


def test_reading_keeps_one_sample_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, ((f"{n}", {"bin": bytes(200_000)}) for n in range(100)))
    tracemalloc.start()
    assert sum(1 for _ in read_tar(path)) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
