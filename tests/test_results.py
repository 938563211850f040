"""Copies of results: what is in them, that they replace an older copy whole, and what they refuse to touch."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rpl.errors import BadInput, RplError, TryAgain
from rpl.results import fetch_results
from rpl.rounds import STAGES, Node
from rpl.stage import Run
from tests.fake_stages import make_run
from tests.scripted_stages import finished_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return finished_run(tmp_path / "world", monkeypatch)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_copy_holds_summary_report_and_export_with_its_images(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "results"
    summary = fetch_results(run, target)
    assert summary == json.loads((target / "summary.json").read_text())
    found = {name for name in tree(target) if not name.startswith("export/images/")}
    assert found == {
        "summary.json",
        "report/index.html",
        "export/categories.json",
        "export/category_embeddings.npy",
        "export/category_embeddings.pt",
        "export/sourced.parquet",
        "export/sourced_novel.json",
        "export/sourced_novel_reference.json",
    }
    coco = json.loads((target / "export" / "sourced_novel.json").read_text())
    images = {path.name for path in (target / "export" / "images").iterdir()}
    assert {image["file_name"] for image in coco["images"]} == images
    assert len(images) == 5


def test_a_second_copy_gives_the_same_and_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "out" / "results"
    fetch_results(run, target)
    before = tree(target)
    (target / "export" / "images" / "stale.jpg").write_bytes(b"from an older run")
    fetch_results(run, target)
    assert tree(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["results"]


def test_an_empty_folder_is_taken(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fetch_results(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "report" / "index.html").is_file()


@pytest.mark.parametrize(
    ("failure", "kind", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), TryAgain, "the disk is full; free space, then fetch again."),
        (OSError(errno.EROFS, "Read-only file system"), BadInput,
         "cannot be written (Read-only file system); name another place."),
    ],
)  # fmt: skip
def test_a_copy_that_fails_leaves_the_old_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: OSError, kind: type[RplError], sentence: str
) -> None:
    target = tmp_path / "out" / "results"
    fetch_results(run, target)
    before = tree(target)

    def fails(*_args: object) -> None:
        raise failure

    monkeypatch.setattr(shutil, "copyfile", fails)
    with pytest.raises(kind) as error:
        fetch_results(run, target)
    assert str(error.value) == f"{target}: {sentence}"
    assert tree(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["results"]


def test_a_folder_with_anything_else_in_it_is_refused(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("ten years of work")
    with pytest.raises(BadInput) as error:
        fetch_results(run, home)
    assert str(error.value) == (f"{home}: holds thesis.tex, which is no result of a run; name a new or empty folder.")
    assert (home / "thesis.tex").read_text() == "ten years of work"


def test_a_file_in_its_place_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput) as error:
        fetch_results(run, tmp_path / "file")
    assert str(error.value) == f"{tmp_path / 'file'}: is a file; name a new folder for the results."


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "data", str(tmp_path / "runs" / "early"))
    with pytest.raises(BadInput) as error:
        fetch_results(run, tmp_path / "results")
    assert str(error.value) == (
        f"{tmp_path / 'runs' / 'early'}: is not finished, so it has no report; go on with `rpl run`, then fetch again."
    )
    assert not (tmp_path / "results").exists()
    assert run.manifests(Node("export")) is None


def test_a_newer_program_still_copies_what_an_older_one_finished(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_results(run, tmp_path / "before")
    monkeypatch.setitem(STAGES, "learn", replace(STAGES["learn"], version=STAGES["learn"].version + 1))
    again = Run(run.uri)
    assert again.manifests(Node("report")) is None, "to this program the work is to be done again"
    fetch_results(again, tmp_path / "after")
    assert tree(tmp_path / "after") == tree(tmp_path / "before")
