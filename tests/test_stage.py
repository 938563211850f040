"""The stage contract, over every store: digests, skipping, atomic commit, races, what a failure leaves behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rpl.errors import BadInput, TryAgain
from rpl.local import create_run, run_all, status
from rpl.manifests import Manifest, Shard, manifest_path
from rpl.outside import fingerprint
from rpl.rounds import Node
from rpl.stage import Context, Run, collect_garbage
from tests.fake_stages import QUIET, FakeStages, do, make_config, make_run


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    return FakeStages(monkeypatch)


def visible(run: Run) -> list[str]:
    return [info.path for info in run.store.list() if info.path != "config.yaml"]


def test_a_second_call_finds_the_work_done(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    run = make_run(tmp_path, store_uri)
    assert do(run, "crop") == "done"
    assert do(run, "crop") == "already done"
    assert do(Run(store_uri), "crop") == "already done"
    assert fakes.calls == ["crop 0-of-1"]


def test_the_manifest_names_files_that_are_there(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    run = make_run(tmp_path, store_uri)
    do(run, "crop")
    manifest = Run(store_uri).manifest(Node("crop"), Shard())
    assert manifest is not None
    assert set(manifest.files) == {"seen.json", "data.bin"}
    for file in manifest.files.values():
        assert len(run.store.read(file.path)) == file.size
    assert manifest.rows == 1
    assert manifest.versions["rpl"]
    assert Manifest.from_json(manifest.to_json(), "again") == manifest


def test_only_stages_that_depend_on_a_changed_setting_run_again(
    fakes: FakeStages, tmp_path: Path, store_uri: str
) -> None:
    run = make_run(tmp_path, store_uri)
    for stage in ("crop", "encode", "index"):
        do(run, stage)
    fakes.calls.clear()
    changed = make_config(tmp_path, store_uri, clip={"model": "ViT-B-32", "pretrained": None, "views": 2})
    run.store.write("config.yaml", _yaml(changed))
    again = Run(store_uri)
    assert [do(again, stage) for stage in ("crop", "encode", "index")] == ["already done", "done", "already done"]


def test_a_changed_outside_file_is_noticed(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    do(make_run(tmp_path, store_uri), "crop")
    (tmp_path / "train.json").write_text("other boxes")
    assert do(Run(store_uri), "crop") == "done"
    os.utime(tmp_path / "train.json", (1, 1))
    assert do(Run(store_uri), "crop") == "already done", "touching a file changes nothing"


def test_runtime_settings_are_in_no_digest(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    do(make_run(tmp_path, store_uri), "crop")
    assert do(make_run(tmp_path, store_uri, runtime={"workers": 7}), "crop") == "already done"


def test_a_whole_run_then_nothing_left_to_do(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    run = make_run(tmp_path, store_uri, shards={"crop": 2, "download": 2}, rounds={"max_rounds": 5})
    run_all(run, QUIET)
    assert run.last_round() == 3, "round 3 did not beat round 2"
    rounds = [call for call in fakes.calls if "/learn" in call]
    assert rounds == [f"round-{number}/learn 0-of-1" for number in (1, 2, 3)]
    assert fakes.calls[-2:] == ["export 0-of-1", "report 0-of-1"]
    assert len(fakes.calls) == len(set(fakes.calls))
    fakes.calls.clear()
    run_all(Run(store_uri), QUIET)
    assert fakes.calls == []
    assert all(row.done == row.shards for row in status(Run(store_uri)))


def test_shards_that_are_done_stay_done(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    run = make_run(tmp_path, store_uri, shards={"crop": 3})
    do(run, "crop", shard=Shard(1, 3))
    with pytest.raises(BadInput, match="encode reads crop, which is not finished"):
        do(run, "encode", shard=Shard(0, 3))
    assert do(run, "encode", shard=Shard(1, 3)) == "done", "encode reads its own part alone"
    run_all_crops = [do(run, "crop", shard=Shard(index, 3)) for index in range(3)]
    assert run_all_crops == ["done", "already done", "done"]


def test_a_missing_input_names_the_command_that_makes_it(fakes: FakeStages, tmp_path: Path) -> None:
    uri = str(tmp_path / "run")
    run = make_run(tmp_path, uri)
    with pytest.raises(BadInput) as caught:
        do(run, "retrieve", 1)
    assert str(caught.value) == (
        f"{uri}: round-1/retrieve reads crop, which is not finished; run `python -m jobs.crop --run {uri}` first."
    )


def test_a_failure_leaves_nothing(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    run = make_run(tmp_path, store_uri)

    def fail(_context: Context) -> None:
        raise BadInput("x.json: record 3 is wrong; mend it.")

    fakes.before_return = fail
    with pytest.raises(BadInput, match="record 3"):
        do(run, "crop")
    assert visible(run) == []


def test_a_full_disk_can_be_tried_again(fakes: FakeStages, tmp_path: Path) -> None:
    run = make_run(tmp_path, str(tmp_path / "run"))

    def fail(_context: Context) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch/x")

    fakes.before_return = fail
    with pytest.raises(TryAgain) as caught:
        do(run, "crop")
    assert str(caught.value) == (
        "/scratch/x: the disk is full; free space or set TMPDIR to a larger disk, then run it again."
    )


def test_of_two_attempts_at_once_one_wins_and_the_other_leaves_quietly(
    fakes: FakeStages, tmp_path: Path, store_uri: str
) -> None:
    run = make_run(tmp_path, store_uri)
    other = Run(store_uri)

    def meanwhile(_context: Context) -> None:
        fakes.before_return = lambda _context: None
        assert do(other, "crop") == "done"

    fakes.before_return = meanwhile
    assert do(run, "crop") == "done by another"
    manifest = Run(store_uri).manifest(Node("crop"), Shard())
    assert manifest is not None
    expected = {file.path for file in manifest.files.values()}
    assert {path for path in visible(run) if "/attempts/" in path} == expected, "the loser's files are gone"


def test_garbage_of_killed_attempts_is_collected(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    run = make_run(tmp_path, store_uri)
    do(run, "crop")
    committed = visible(run)
    run.store.write("crop/attempts/dead/crops.tar", b"half")
    run.store.write("round-1/learn/attempts/dead/x", b"half")
    run.store.write("notes/mine.json", b"{}")
    assert collect_garbage(run, older_than_s=3600) == [], "it may still be under way"
    assert collect_garbage(run, older_than_s=-60) == ["crop/attempts/dead/crops.tar", "round-1/learn/attempts/dead/x"]
    assert visible(run) == sorted([*committed, "notes/mine.json"]), "what is nobody's attempt stays"


def test_inputs_that_changed_in_the_store_are_refused(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    run = make_run(tmp_path, store_uri)
    do(run, "crop")
    manifest = run.manifest(Node("crop"), Shard())
    assert manifest is not None
    run.store.write(manifest.files["data.bin"].path, b"tampered")
    reader = Run(store_uri)
    with pytest.raises((BadInput, TryAgain), match=r"is not the file that was committed|arrived with other bytes"):
        reader.local(manifest.files["data.bin"])
    reader.close()


def test_a_broken_manifest_is_named(fakes: FakeStages, tmp_path: Path) -> None:
    run = make_run(tmp_path, str(tmp_path / "run"))
    digest = run.expected(Node("crop"), Shard()).digest
    path = manifest_path(Node("crop"), Shard(), digest)
    run.store.write(path, b"{")
    with pytest.raises(BadInput) as caught:
        do(run, "crop")
    assert str(caught.value) == (
        f"{run.uri}/{path}: is not a manifest of this version; delete it to run the stage again."
    )


def test_a_run_keeps_the_settings_it_began_with(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    make_run(tmp_path, store_uri)
    with pytest.raises(BadInput) as caught:
        create_run(make_config(tmp_path, store_uri, learn={"max_iterations": 5}))
    assert str(caught.value) == (
        f"{store_uri}: this run was started with learn.max_iterations = 60, not 5; "
        "choose another name under `run`, or put the setting back."
    )


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        Run(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: holds no run (config.yaml is missing); start one with `rpl run --config FILE`."
    )


def test_an_outside_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        fingerprint(str(tmp_path / "no.json"))
    assert str(caught.value) == f"{tmp_path}/no.json: does not exist; correct the path in the configuration."


def _yaml(config: object) -> bytes:
    from rpl.config import RunConfig, dump_config

    assert isinstance(config, RunConfig)
    return dump_config(config).encode()
