"""What a store in a folder has of its own: unfinished files, links, full disks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpl.errors import BadInput, TryAgain
from rpl.store import files as files_module
from rpl.store import open_store
from tests import test_store


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
    test_store.test_of_many_putters_exactly_one_wins(str(tmp_path))
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
