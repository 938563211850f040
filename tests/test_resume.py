"""A learning that is torn away goes on where it was: the same bytes in the end, and no text pass taken twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rpl.clip import ClipModel
from rpl.config import Learn
from rpl.errors import TryAgain
from rpl.learning import FileJournal, Learned, NoJournal, Step, Task, fast, initial_contexts, learn
from rpl.manifests import Shard
from rpl.prompts import PromptBank
from rpl.rounds import Node
from rpl.stage import Context, Run, collect_garbage, run_shard
from tests.clip_models import make_clip
from tests.fake_stages import QUIET
from tests.learning_tasks import MANY_NAMES, TornAway, make_task, torn_at
from tests.small_run import do, install_light_stages, make_small_run, tear_learning

NEVER = 1e9
LEARN = Node("learn", 1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipModel:
    return make_clip(tmp_path_factory.mktemp("clip"))


@dataclass(frozen=True)
class Case:
    settings: Learn
    task: dict[str, Any]
    is_raced: bool = True


CASES = {
    "fast, starts that race among all": Case(Learn(max_iterations=14), {"starts": 3}),
    "fast, starts that race among a sample": Case(Learn(max_iterations=14), {"starts": 3, "names": MANY_NAMES}),
    "fast, one start": Case(Learn(max_iterations=25), {"starts": 1}, is_raced=False),
    "fast, of each category": Case(Learn(max_iterations=14), {"class_specific": True}),
    "reference": Case(Learn(schedule="reference"), {}, is_raced=False),
}


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """The passes with gradients that were really taken, as a list with their number."""
    taken, real = [0], PromptBank.features_and_pullback

    def counting(self: PromptBank, context: torch.Tensor) -> Any:
        taken[0] += 1
        return real(self, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptBank, "features_and_pullback", counting)
        yield taken


def nowhere(name: str, data: bytes) -> None:
    """Where a journal saves that is not read again."""


def result(learned: Learned) -> tuple[bytes, str]:
    lines = [[step.to_json() for step in history] for history in (learned.history, [learned.kept], *learned.race)]
    return learned.context.numpy().tobytes(), json.dumps(lines)


def undisturbed(task: Task, settings: Learn) -> tuple[Learned, int, int]:
    """What is learned, in how many passes and calls of `on_step`."""
    calls: list[Step] = []
    with counted_passes() as taken:
        learned = learn(task, settings, 0, calls.append, FileJournal({}, nowhere, NEVER))
    return learned, taken[0], len(calls)


@pytest.mark.parametrize("at", [[0.0], [0.4], [1.0], [0.1, 0.1, 0.7], [0.0, 0.3, 0.6, 0.9, 0.95]], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torn_away_at_any_steps_it_ends_like_one_left_alone(
    clip: ClipModel, case: Case, at: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "RACE_CATEGORIES", 4)
    monkeypatch.setattr(fast, "RACE_IMAGES", 0)
    task = make_task(clip, **case.task)
    calm, passes, steps = undisturbed(task, case.settings)
    assert bool(calm.race) == case.is_raced
    if "names" in case.task:
        assert calm.race[0][0].passes < 1, "among some of the categories only"

    files: dict[str, bytes] = {}
    with counted_passes() as taken:
        for share in at:
            torn = torn_at(max(1, round(share * steps)))
            with pytest.raises(TornAway), FileJournal(dict(files), files.__setitem__, NEVER) as journal:
                learn(task, case.settings, 0, torn, journal)
        with FileJournal(dict(files), files.__setitem__, NEVER) as journal:
            learned = learn(task, case.settings, 0, torn_at(0), journal)

    assert result(learned) == result(calm)
    assert learned.history == calm.history and learned.race == calm.race, "to the last digit, not only as written"
    assert taken[0] == passes, "no pass was taken twice"


def test_torn_away_within_a_step_loses_the_pass_under_way_alone(clip: ClipModel) -> None:
    task, settings = make_task(clip), Learn(max_iterations=12)
    calm, passes, _ = undisturbed(task, settings)
    files: dict[str, bytes] = {}
    taken, real = 0, PromptBank.features_and_pullback

    def failing(self: PromptBank, context: torch.Tensor) -> Any:
        nonlocal taken
        taken += 1
        if taken in (3, 9, 20):
            raise KeyboardInterrupt
        return real(self, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptBank, "features_and_pullback", failing)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt), FileJournal(dict(files), files.__setitem__, NEVER) as journal:
                learn(task, settings, 0, torn_at(0), journal)
        with FileJournal(dict(files), files.__setitem__, NEVER) as journal:
            learned = learn(task, settings, 0, torn_at(0), journal)
    assert result(learned) == result(calm)
    assert taken == passes + 3


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_journal_changes_nothing(clip: ClipModel, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "RACE_CATEGORIES", 4)
    monkeypatch.setattr(fast, "RACE_IMAGES", 0)
    task = make_task(clip, **case.task)
    calm, _, _ = undisturbed(task, case.settings)
    assert result(learn(task, case.settings, 0, torn_at(0), NoJournal())) == result(calm)
    assert result(learn(task, case.settings, 0, torn_at(0))) == result(calm)


@pytest.mark.parametrize("schedule", ["fast", "reference"])
def test_a_journal_of_another_task_does_no_harm(clip: ClipModel, schedule: str) -> None:
    task = make_task(clip)
    settings = Learn.model_validate({"schedule": schedule, "max_iterations": 14})
    calm, passes, _ = undisturbed(task, settings)
    other = replace(task, starts=initial_contexts(2, 2, clip.text.width, seed=7))
    files: dict[str, bytes] = {}
    with pytest.raises(TornAway), FileJournal({}, files.__setitem__, NEVER) as journal:
        learn(other, settings, 0, torn_at(12), journal)
    (data,) = files.values()
    strange = FileJournal({"000000.safetensors": data}, nowhere, NEVER)
    assert len(strange) >= 12
    with counted_passes() as taken:
        assert result(learn(task, settings, 0, torn_at(0), strange)) == result(calm)
    assert taken[0] == passes


# The stage


def outputs(run: Run) -> dict[str, bytes]:
    manifest = run.manifest(LEARN, Shard())
    assert manifest is not None
    assert {"prompts.safetensors", "history.json", "race.json"} <= set(manifest.files)
    return {name: run.store.read(file.path) for name, file in manifest.files.items()}


def checkpoints(run: Run) -> list[str]:
    return [info.path for info in run.store.list("round-1/learn/attempts/checkpoint-")]


@pytest.mark.parametrize("schedule", ["fast", "reference"])
def test_a_stage_torn_away_commits_the_same_bytes_and_clears_up(
    tmp_path: Path, store_uri: str, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    install_light_stages(monkeypatch)
    calm, torn = (make_small_run(tmp_path, f"{store_uri}/{name}", schedule=schedule) for name in ("calm", "torn"))
    with counted_passes() as passes:
        do(calm, "crop", "encode")
        do(calm, "learn", round_=1)
    assert checkpoints(calm) == []

    do(torn, "crop", "encode")
    with counted_passes() as taken:
        for attempt, step in enumerate((1, 2)):
            tear_learning(monkeypatch, step)
            again = Run(torn.uri)
            with pytest.raises(TornAway):
                run_shard(again, LEARN, Shard(), QUIET)
            assert again.manifest(LEARN, Shard()) is None
            digest = again.expected(LEARN, Shard()).digest[:16]
            folder = f"round-1/learn/attempts/checkpoint-0-of-1.{digest}"
            saved = [info.path for info in again.store.list("round-1/learn/")]
            assert saved == [f"{folder}/{number:06d}.safetensors" for number in range(attempt + 1)]
            again.close()
        tear_learning(monkeypatch, 0)
        last = Run(torn.uri)
        assert run_shard(last, LEARN, Shard(), QUIET) == "done"
    assert outputs(last) == outputs(calm)
    assert checkpoints(last) == []
    assert taken == passes
    assert run_shard(last, LEARN, Shard(), QUIET) == "already done"
    last.close()


def test_checkpoints_of_work_that_is_never_finished_are_collected(
    tmp_path: Path, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_light_stages(monkeypatch)
    run = make_small_run(tmp_path, store_uri)
    do(run, "crop", "encode")
    before = [info.path for info in run.store.list()]
    tear_learning(monkeypatch, 2)
    with pytest.raises(TornAway):
        run_shard(run, LEARN, Shard(), QUIET)
    (left,) = checkpoints(run)
    assert collect_garbage(run, older_than_s=3600) == [], "another attempt may still want them"
    assert collect_garbage(run, older_than_s=-60) == [left]
    assert [info.path for info in run.store.list()] == before


def test_other_settings_do_not_see_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_light_stages(monkeypatch)
    run = make_small_run(tmp_path, str(tmp_path / "run"))
    do(run, "crop", "encode")
    tear_learning(monkeypatch, 3)
    with pytest.raises(TornAway):
        run_shard(run, LEARN, Shard(), QUIET)
    seen: list[dict[str, bytes]] = []
    real = Context.checkpoints

    def noted(self: Context) -> dict[str, bytes]:
        seen.append(real(self))
        return seen[-1]

    monkeypatch.setattr(Context, "checkpoints", noted)
    other = make_small_run(tmp_path, str(tmp_path / "other"), balance=0.5)
    do(other, "crop", "encode")
    tear_learning(monkeypatch, 0)
    (Path(run.uri) / "config.yaml").write_bytes((Path(other.uri) / "config.yaml").read_bytes())
    do(Run(run.uri), "learn", round_=1)
    assert seen == [{}]
    assert len(checkpoints(run)) == 1, "they belong to the other work, and stay for it"


def test_checkpoints_that_another_attempt_clears_away_meanwhile_are_not_missed(
    tmp_path: Path, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_light_stages(monkeypatch)
    run = make_small_run(tmp_path, store_uri)
    do(run, "crop", "encode")
    tear_learning(monkeypatch, 2)
    with pytest.raises(TornAway):
        run_shard(run, LEARN, Shard(), QUIET)
    (left,) = checkpoints(run)
    real = run.store.read

    def late(path: str) -> bytes:
        if path == left:
            run.store.delete([left])
        return real(path)

    monkeypatch.setattr(run.store, "read", late)
    tear_learning(monkeypatch, 0)
    assert run_shard(run, LEARN, Shard(), QUIET) == "done"


def test_a_store_that_fails_at_a_checkpoint_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_light_stages(monkeypatch)
    run = make_small_run(tmp_path, str(tmp_path / "run"))
    do(run, "crop", "encode")

    def full(path: str, data: bytes) -> None:
        raise TryAgain(f"{path}: the disk is full.")

    tear_learning(monkeypatch, 2)
    with monkeypatch.context() as patch:
        patch.setattr(run.store, "write", full)
        with pytest.raises(TryAgain, match=r"000000\.safetensors: the disk is full"):
            run_shard(run, LEARN, Shard(), QUIET)
    assert checkpoints(run) == []


TERMINATED = """
import os, signal, sys
import rpl.stages.learn as stage
from rpl.learning import learn
from jobs.learn import main
def torn(task, settings, seed, on_step, journal):
    def at_the_third(step):
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    return learn(task, settings, seed, at_the_third, journal)
stage.learn = torn
main(["--run", sys.argv[1], "--round", "1"])
"""


@pytest.mark.slow
def test_the_command_saves_a_checkpoint_at_sigterm_and_goes_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_light_stages(monkeypatch)
    calm, torn = (make_small_run(tmp_path, str(tmp_path / name), starts=1) for name in ("calm", "torn"))
    for run in (calm, torn):
        do(run, "crop", "encode")
    do(calm, "learn", round_=1)
    command = [sys.executable, "-c", TERMINATED, torn.uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 75, done.stderr
    assert "Stopped by SIGTERM: nothing was committed" in done.stderr
    assert len(checkpoints(torn)) == 1
    with counted_passes() as taken:
        do(Run(torn.uri), "learn", round_=1)
    assert outputs(Run(torn.uri)) == outputs(calm)
    assert 0 < taken[0] < json.loads(outputs(calm)["history.json"])[-1]["passes"] - 3
    assert checkpoints(torn) == []
