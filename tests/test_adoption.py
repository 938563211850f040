"""Work that a previous run did alike is copied; what is other work; and that nothing depends on the old run then."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from rpl.errors import BadInput
from rpl.local import run_all, status
from rpl.manifests import Manifest, Shard, manifest_path
from rpl.rounds import Node
from rpl.stage import Run, run_shard
from rpl.store import open_store
from tests.fake_stages import QUIET, FakeStages, do, make_run

CUT = {"shards": {"crop": 2, "download": 2}, "rounds": {"max_rounds": 1}}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    return FakeStages(monkeypatch)


@pytest.fixture(params=["same kind", "folder", "s3"])
def old_uri(request: pytest.FixtureRequest, store_uri: str, tmp_path: Path) -> str:
    """Where the previous run is: beside the new one's `store_uri`, or in a store of either kind."""
    if request.param == "folder":
        return str(tmp_path / "old")
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('s3').bucket}/{secrets.token_hex(8)}"
    return f"{store_uri}-old"


def delete(uri: str) -> None:
    store = open_store(uri)
    store.delete([info.path for info in store.list()])


def manifest(run: Run, stage: str, shard: Shard | None = None) -> Manifest:
    found = Run(run.uri).manifest(Node(stage), shard or Shard())
    assert found is not None
    return found


def test_what_was_done_alike_is_copied_and_needs_the_old_run_no_more(
    fakes: FakeStages, tmp_path: Path, store_uri: str, old_uri: str
) -> None:
    old = make_run(tmp_path, old_uri, **CUT)
    run_all(old, QUIET)
    fakes.calls.clear()
    new = make_run(tmp_path, store_uri, **CUT, previous=old_uri)
    outcomes = [do(new, "crop", shard=Shard(0, 2)), do(new, "crop", shard=Shard(1, 2)), do(new, "index")]
    assert outcomes == ["adopted"] * 3
    assert do(new, "crop", shard=Shard(1, 2)) == "already done"
    first, copy = manifest(old, "crop", Shard(1, 2)), manifest(new, "crop", Shard(1, 2))
    assert copy.contents == first.contents
    assert copy.adopted_from == old_uri and first.adopted_from is None
    assert copy.attempt != first.attempt
    run_all(new, QUIET)
    remade = {call.split()[0] for call in fakes.calls}
    assert remade == {"round-1/download", "novel/download", "report"}, "what depends on which run came before"

    delete(old_uri)
    reader = Run(store_uri)
    assert all(row.done == row.shards for row in status(reader))
    for stage in ("crop", "encode"):
        for shard in reader.shards(Node(stage)):
            for file in manifest(new, stage, shard).files.values():
                assert len(reader.store.read(file.path)) == file.size
                assert reader.local(file).stat().st_size == file.size
    reader.close()


@pytest.mark.parametrize("change", ["settings", "an outside file"])
def test_other_work_is_done_anew(fakes: FakeStages, tmp_path: Path, store_uri: str, change: str) -> None:
    old = make_run(tmp_path, f"{store_uri}-old")
    run_all(old, QUIET)
    if change == "settings":
        new = make_run(tmp_path, store_uri, previous=old.uri, seed=1)
    else:
        (tmp_path / "train.json").write_text("other boxes")
        new = make_run(tmp_path, store_uri, previous=old.uri)
    # The stand-in's crops do not depend on the file, so that their encoding is the same work again.
    encode = "done" if change == "settings" else "adopted"
    assert [do(new, stage) for stage in ("crop", "encode", "index")] == ["done", encode, "adopted"]


def test_a_run_without_a_previous_one_adopts_nothing(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    do(make_run(tmp_path, f"{store_uri}-old"), "crop")
    assert do(make_run(tmp_path, store_uri), "crop") == "done"


def test_an_old_run_that_vanished_costs_the_work_alone(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    old = make_run(tmp_path, f"{store_uri}-old")
    do(old, "crop")
    new = make_run(tmp_path, store_uri, previous=old.uri)
    delete(old.uri)
    assert do(new, "crop") == "done"


@pytest.mark.parametrize("harm", ["gone", "shorter", "no manifest"])
def test_a_spoilt_old_run_costs_the_work_alone(fakes: FakeStages, tmp_path: Path, store_uri: str, harm: str) -> None:
    old = make_run(tmp_path, f"{store_uri}-old")
    do(old, "crop")
    found = manifest(old, "crop")
    *_, last = found.files.values()
    if harm == "gone":
        old.store.delete([last.path])
    elif harm == "shorter":
        old.store.write(last.path, b"x")
    else:
        old.store.write(manifest_path(Node("crop"), Shard(), found.digest), b"{")
    new = make_run(tmp_path, store_uri, previous=old.uri)
    assert do(new, "crop") == "done"
    named = {file.path for file in manifest(new, "crop").files.values()}
    assert {info.path for info in new.store.list("crop/attempts/")} == named, "half a copy is not left behind"


def test_a_digest_that_only_begins_alike_is_other_work(fakes: FakeStages, tmp_path: Path) -> None:
    old = make_run(tmp_path, str(tmp_path / "old"))
    do(old, "crop")
    found = manifest(old, "crop")
    path = manifest_path(Node("crop"), Shard(), found.digest)
    other = found.digest[:16] + "0" * 48
    old.store.write(path, found.to_json().replace(found.digest.encode(), other.encode()))
    assert do(make_run(tmp_path, str(tmp_path / "new"), previous=old.uri), "crop") == "done"


def test_of_two_adopters_at_once_one_wins(
    fakes: FakeStages, tmp_path: Path, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_run(tmp_path, f"{store_uri}-old")
    do(old, "crop")
    new, other = make_run(tmp_path, store_uri, previous=old.uri), Run(store_uri)
    put = new.store.put_if_absent

    def late(path: str, data: bytes) -> bool:
        assert do(other, "crop") == "adopted"
        return put(path, data)

    monkeypatch.setattr(new.store, "put_if_absent", late)
    assert do(new, "crop") == "done by another"
    named = {file.path for file in manifest(new, "crop").files.values()}
    assert {info.path for info in new.store.list("crop/attempts/")} == named


def test_a_helper_writes_nothing_where_the_first_adopts(fakes: FakeStages, tmp_path: Path) -> None:
    old = make_run(tmp_path, str(tmp_path / "old"))
    do(old, "crop")
    fakes.calls.clear()
    new = make_run(tmp_path, str(tmp_path / "new"), previous=old.uri)
    assert run_shard(new, Node("crop"), Shard(), QUIET, commits=False) == "adopted"
    assert fakes.calls == [] and new.manifest(Node("crop"), Shard()) is None


def test_a_new_run_that_cannot_be_written_says_so(fakes: FakeStages, tmp_path: Path) -> None:
    old = make_run(tmp_path, str(tmp_path / "old"))
    do(old, "crop")
    new = make_run(tmp_path, str(tmp_path / "new"), previous=old.uri)
    (tmp_path / "new" / "crop").write_text("in the way")
    with pytest.raises(BadInput, match="a part of this path is a file"):
        do(new, "crop")
