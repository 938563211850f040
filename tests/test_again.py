"""The run that sources again from a finished one: its settings, its prompts, and which run is the latest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rpl.again import PROMPTS, config_after, create_run_after, latest_finished
from rpl.errors import BadInput
from rpl.finished import finished, previous_run
from rpl.local import create_run, run_all
from rpl.prompt_files import read_prompts
from rpl.rounds import Node
from rpl.stage import Context, Run
from tests import small_run
from tests.fake_stages import QUIET, FakeStages, make_run

GIVEN = b"context vectors"


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    def export_prompts(context: Context) -> None:
        if context.node.stage == "export":
            context.write("prompts.safetensors", GIVEN)

    stages = FakeStages(monkeypatch)
    stages.before_return = export_prompts
    return stages


def finished_run(folder: Path, uri: str, **changes: object) -> Run:
    run = make_run(folder, uri, **changes)
    run_all(run, QUIET)
    return Run(uri)


def test_the_settings_are_the_earlier_run_s_with_its_prompts_as_they_are(fakes: FakeStages, tmp_path: Path) -> None:
    learn = {"schedule": "reference", "n_ctx1": 4, "layouts": ["{name} {ctx1} {ctx2}"], "class_specific": True}
    old = finished_run(tmp_path, str(tmp_path / "runs/first"), learn=learn, seed=3, runtime={"workers": 7})
    config = config_after(old, str(tmp_path / "runs/first-2"))
    assert (config.run, config.previous) == (str(tmp_path / "runs/first-2"), old.uri)
    assert config.learn.start_from == f"{config.run}/{PROMPTS}"
    assert (config.learn.schedule, config.learn.starts, config.learn.max_iterations) == ("fast", 0, 0)
    assert config.rounds.max_rounds == 1
    changed = {"run", "previous", "learn", "rounds"}
    assert config.model_dump(exclude=changed) == old.config.model_dump(exclude=changed)
    of_learn = {"schedule", "start_from", "starts", "max_iterations"}
    assert config.learn.model_dump(exclude=of_learn) == old.config.learn.model_dump(exclude=of_learn)
    assert config.rounds.model_dump(exclude={"max_rounds"}) == old.config.rounds.model_dump(exclude={"max_rounds"})


def test_relative_places_count_from_here(fakes: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path, str(tmp_path / "runs/first"))
    config = config_after(Run("runs/first/"), "runs/second")
    assert (config.previous, config.run) == (str(tmp_path / "runs/first"), str(tmp_path / "runs/second"))
    assert config.learn.start_from == str(tmp_path / "runs/second" / PROMPTS)


def test_the_new_run_has_the_prompts_as_its_own(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    old = finished_run(tmp_path, f"{store_uri}/first")
    new = create_run_after(old, f"{store_uri}/second")
    assert new.store.read(PROMPTS) == GIVEN
    modified = new.store.stat(PROMPTS)
    assert create_run_after(old, f"{store_uri}/second").config == new.config, "a second call finds it made"
    assert new.store.stat(PROMPTS) == modified
    third = make_run(tmp_path, f"{store_uri}/third")
    with pytest.raises(BadInput, match=r"/third: this run was started with learn.max_iterations = 60, not 0; choose"):
        create_run_after(old, third.uri)
    assert third.store.stat(PROMPTS) is None


def test_a_run_that_is_not_finished_is_no_start(fakes: FakeStages, tmp_path: Path) -> None:
    early = make_run(tmp_path, str(tmp_path / "early"))
    with pytest.raises(BadInput) as caught:
        create_run_after(early, str(tmp_path / "new"))
    assert str(caught.value) == (
        f"{early.uri}: is not finished, so nothing can be sourced again from it; go on with `rpl run` first."
    )
    assert not (tmp_path / "new").exists()


def test_a_pool_that_has_grown_since_leaves_a_run_finished(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    old = finished_run(tmp_path, store_uri, shards={"download": 2}, rounds={"max_rounds": 2})
    wanted = {
        "export": old.manifests(Node("export")),
        "round_downloads": [m for n in (1, 2) for m in old.manifests(Node("download", n)) or []],
        "novel_downloads": old.manifests(Node("download", "novel")),
    }
    (tmp_path / "pool.npy").write_text("more vectors")
    assert Run(store_uri).manifests(Node("report")) is None, "it is not what today's pool would make"
    found = finished(Run(store_uri))
    assert found is not None
    for edge, manifests in wanted.items():
        assert found.inputs(edge) == manifests and manifests
    assert config_after(Run(store_uri), "s3://bucket/new").previous == store_uri
    old.store.delete([info.path for info in old.store.list("novel/download/1-of-2")])
    with pytest.raises(BadInput) as caught:
        found.inputs("novel_downloads")
    assert str(caught.value) == f"{store_uri}: its download is not whole any more; run it again."


def test_of_several_reports_the_newest_counts(fakes: FakeStages, tmp_path: Path) -> None:
    old = finished_run(tmp_path, str(tmp_path / "run"))
    (tmp_path / "train.json").write_text("other boxes")
    fakes.accuracies = [0.7, 0.1, 0.1]
    old.store.delete([info.path for info in old.store.list("round-1/embed/")])
    run_all(Run(old.uri), QUIET)
    newer = (Run(old.uri).manifests(Node("report")) or [])[0]
    (older,) = {path.name for path in Path(old.uri, "report").glob("*.json")} - {f"0-of-1.{newer.digest[:16]}.json"}
    found = finished(Run(old.uri))
    assert found is not None and found.report == newer
    os.utime(Path(old.uri, "report", older), (2**33, 2**33))
    assert finished(Run(old.uri)) != found


def test_a_previous_run_that_cannot_be_used_is_named(fakes: FakeStages, tmp_path: Path) -> None:
    early = make_run(tmp_path, str(tmp_path / "early"))
    for uri, problem in (
        (early.uri, "is not finished; finish it"), (str(tmp_path / "no"), "is not there any more; bring it back"),
    ):  # fmt: skip
        with pytest.raises(BadInput) as caught:
            previous_run(uri)
        assert str(caught.value) == (f"{uri}: the run under `previous` {problem}, or start a new run from another one.")


def test_the_latest_finished_run_of_a_name(fakes: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "runs"
    with pytest.raises(BadInput) as caught:
        latest_finished(str(root), "pets")
    assert str(caught.value) == (
        f"{root}: none of the runs pets and pets-… is finished; finish one with `rpl run` first."
    )
    for seconds, name in enumerate(["pets-9", "pets", "pets-2", "petshop", "other", "pets-3/deeper"], start=1_000):
        run = finished_run(tmp_path, str(root / name))
        for report in Path(run.uri, "report").glob("*.json"):
            os.utime(report, (seconds, seconds))
    make_run(tmp_path, str(root / "pets-5"))  # begun, not finished
    opened: list[str] = []
    real = Run.__init__

    def counting(self: Run, uri: str) -> None:
        opened.append(uri)
        real(self, uri)

    monkeypatch.setattr(Run, "__init__", counting)
    assert latest_finished(f"{root}/", "pets").uri == str(root / "pets-2")
    assert opened == [str(root / "pets-2")], "the others were not opened"


def test_the_latest_finished_run_is_found_in_any_store(fakes: FakeStages, tmp_path: Path, store_uri: str) -> None:
    for name in ("pets-1", "pets-2"):  # within one second, as far as S3 tells, and then the name decides
        finished_run(tmp_path, f"{store_uri}/{name}")
    assert latest_finished(store_uri, "pets").uri == f"{store_uri}/pets-2"


@pytest.mark.parametrize(
    "learn",
    [{"n_ctx1": 2}, {"class_specific": True}, {"schedule": "reference"}, {"layouts": ["{name} {ctx1} {ctx2}"]}],
    ids=str,
)
def test_prompts_are_handed_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learn: dict[str, object]
) -> None:
    """Real learning and embedding, from a run whose report stands by itself."""
    small_run.install_light_stages(monkeypatch)
    old = small_run.make_small_run(tmp_path, str(tmp_path / "old"), **learn)
    small_run.do(old, "crop", "encode")
    (learned,) = small_run.do(old, "learn", round_=1)
    (embedded,) = small_run.do(old, "embed", round_=1)
    file = small_run.path(old, learned, "prompts.safetensors")
    monkeypatch.setattr("rpl.again._require_finished", lambda run: run)
    new = create_run(config_after(old, str(tmp_path / "new")))
    new.store.upload(PROMPTS, file)
    small_run.do(new, "crop", "encode")
    (again,) = small_run.do(new, "learn", round_=1)
    (embedded_again,) = small_run.do(new, "embed", round_=1)
    before, after = read_prompts(file), read_prompts(small_run.path(new, again, "prompts.safetensors"))
    torch.testing.assert_close(after.context, before.context, rtol=0, atol=0)
    assert (after.names, after.layouts, again.facts["steps"]) == (before.names, before.layouts, 0)
    assert embedded_again.facts["accuracy"] == embedded.facts["accuracy"]
    for name in ("category_embeddings.npy", "category_embeddings.pt"):
        assert embedded_again.files[name].sha256 == embedded.files[name].sha256
