"""Several processes learn what one learns, to the bit, share the work, and leave when one of them is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from jobs.common import stage_command
from rpl.clip import load_clip
from rpl.errors import TryAgain
from rpl.manifests import Shard
from rpl.ranks import ALONE, Ranks, joined
from rpl.rounds import Node
from rpl.stage import Run, run_shard
from rpl.stages.learn import _check_agreement
from tests import rank_worker
from tests.clip_models import write_clip
from tests.fake_stages import QUIET, FakeStages, make_run
from tests.learning_tasks import TornAway
from tests.small_run import do, install_light_stages, make_small_run, tear_learning

LEARN = Node("learn", 1)
# Nothing leaves this machine, and every process computes with one thread, as torchrun sets it.
LOOPBACK = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: str) -> list[str]:
    # Without `--` torchrun takes --run for an option of its own.
    options = ["--standalone", "--nproc-per-node", "2", "-m", "--"]
    return [sys.executable, "-m", "torch.distributed.run", *options, *arguments]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
def test_work_is_shared_evenly(costs: list[int], count: int) -> None:
    owners = Ranks(0, count).owners(costs)
    assert len(owners) == len(costs), "every part has one owner"
    assert set(owners) <= set(range(count))
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(count)]
    assert max(loads) <= sum(costs) / count + max(costs, default=0)
    assert all(Ranks(index, count).owners(list(costs)) == owners for index in range(count)), "whoever asks"


def test_one_process_owns_everything_and_speaks_to_nobody() -> None:
    assert ALONE.owners([3, 1, 2]) == [0, 0, 0]
    parts = [torch.ones(2)]
    ALONE.hand_out(parts, [0])
    assert parts[0].tolist() == [1, 1] and ALONE.agreed(7) == 7
    with joined() as ranks:
        assert ranks is ALONE


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_to_the_bit(tmp_path: Path) -> None:
    clip = write_clip(tmp_path)
    done = subprocess.run(
        torchrun("tests.rank_worker", str(tmp_path)), env=LOOPBACK, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_bytes()) for rank in range(2))
    alone = rank_worker.learn_cases(load_clip(clip, "cpu"), ALONE)
    for case, expected in alone.items():
        for found in (first[case], second[case]):
            assert found["context"] == expected["context"], case
            assert found["histories"] == expected["histories"], case
        for kind, whole in expected["mine"].items():
            shares = [found[case]["mine"][kind] for found in (first, second)]
            assert sum(shares) == whole and min(shares) > 0.3 * whole, f"{case}: {kind} {shares} of {whole}"


@pytest.mark.slow
def test_the_command_under_torchrun_goes_on_from_a_checkpoint_and_commits_once_what_one_process_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    install_light_stages(monkeypatch)
    alone, together = (make_small_run(tmp_path, str(tmp_path / name)) for name in ("alone", "together"))
    for run in (alone, together):
        do(run, "crop", "encode")
    do(alone, "learn", round_=1)
    tear_learning(monkeypatch, 4)
    with pytest.raises(TornAway):
        run_shard(together, LEARN, Shard(), QUIET)  # its checkpoint is where both ranks go on
    command = torchrun("jobs.learn", "--run", together.uri, "--round", "1")
    done = subprocess.run(command, env=LOOPBACK, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = sorted(line for line in done.stderr.splitlines() if line.startswith("round-1/learn 0-of-1: "))
    assert outcomes == ["round-1/learn 0-of-1: done", "round-1/learn 0-of-1: done by another"]
    manifests = [Run(run.uri).manifest(LEARN, Shard()) for run in (alone, together)]
    assert manifests[0] is not None and manifests[1] is not None
    assert manifests[1].contents == manifests[0].contents
    assert {name: file.sha256 for name, file in manifests[1].files.items()} == {
        name: file.sha256 for name, file in manifests[0].files.items()
    }
    paths = {info.path for info in together.store.list("round-1/learn/")}
    written = {file.path for file in manifests[1].files.values()}
    assert len(paths - written) == 1 and written < paths, "its files and the manifest, of one attempt"


@pytest.mark.slow
def test_the_command_starts_its_own_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    install_light_stages(monkeypatch)
    alone, together = (make_small_run(tmp_path, str(tmp_path / name), starts=1) for name in ("alone", "together"))
    for run in (alone, together):
        do(run, "crop", "encode")
    do(alone, "learn", round_=1)
    command = [sys.executable, "-m", "jobs.learn", "--run", together.uri, "--round", "1"]
    done = subprocess.run(
        command, env={**LOOPBACK, "RPL_RANKS": "2"}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "round-1/learn 0-of-1: done by another" in done.stderr, "there were two"
    assert [manifest.contents for manifest in Run(together.uri).manifests(LEARN) or []] == [
        manifest.contents for manifest in alone.manifests(LEARN) or []
    ]


ENDS = """
import os, signal, sys
from jobs.common import guarded
from rpl.errors import BadInput, TryAgain
def end():
    if os.environ["RANK"] == sys.argv[2]:
        {"bad": bad, "again": again, "bug": bug, "killed": killed, "well": lambda: None}[sys.argv[1]]()
def bad(): raise BadInput("x: is wrong; mend it.")
def again(): raise TryAgain("the store does not answer.")
def bug(): raise KeyError("bug")
def killed(): os.kill(os.getpid(), signal.SIGKILL)
guarded(end)
"""


@pytest.mark.parametrize(("end", "code"), [("well", 0), ("bad", 2), ("again", 75), ("killed", 75), ("bug", 1)])
def test_ranks_end_with_the_code_of_the_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, code: int
) -> None:
    (tmp_path / "ends.py").write_text(ENDS, encoding="utf-8")
    start = "import sys; from rpl.launch import run_ranks; sys.exit(run_ranks(2, 'ends', sys.argv[1:]))"
    path = f"{tmp_path}:{Path(__file__).parents[1]}"
    done = subprocess.run(
        [sys.executable, "-c", start, end, "1"], env={**LOOPBACK, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    if end == "bad":
        assert "Error: x: is wrong; mend it.\n" in done.stderr


DIES = """
import os, signal, sys
import rpl.stages.learn as stage
from rpl.learning import learn
from jobs.learn import main
def dying(task, settings, seed, on_step, journal):
    def at_the_third(step):
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return learn(task, settings, seed, at_the_third, journal)
stage.learn = dying
main(["--run", sys.argv[1], "--round", "1"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_rank_is_killed_the_other_leaves_with_75_and_the_work_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, killed: int
) -> None:
    install_light_stages(monkeypatch)
    calm, run = (make_small_run(tmp_path, str(tmp_path / name), starts=1) for name in ("calm", "killed"))
    for each in (calm, run):
        do(each, "crop", "encode")
    do(calm, "learn", round_=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**LOOPBACK, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "jobs.learn", "--run", run.uri, "--round", "1"]
    with (
        subprocess.Popen(
            command, env={**shared, "RANK": str(1 - killed)}, stderr=subprocess.PIPE, text=True
        ) as survivor,
        subprocess.Popen([sys.executable, "-c", DIES, run.uri], env={**shared, "RANK": str(killed)}) as dying,
    ):
        assert dying.wait(timeout=120) == -signal.SIGKILL
        _, said = survivor.communicate(timeout=90)
    assert survivor.returncode == 75, said
    assert said.splitlines()[-1].startswith("Error: learning: another rank is gone (")
    assert said.endswith("; start it again.\n")
    again = Run(run.uri)
    assert again.manifest(LEARN, Shard()) is None
    saved = [info.path.rpartition("/")[2] for info in again.store.list("round-1/learn/")]
    assert saved == (["000000.safetensors"] if killed else []), "rank 0 alone writes"
    do(again, "learn", round_=1)
    assert [manifest.contents for manifest in again.manifests(LEARN) or []] == [
        manifest.contents for manifest in calm.manifests(LEARN) or []
    ]


@pytest.mark.parametrize(
    ("problem", "why"),
    [("Connection closed by peer\n at tcp/pair.cc", "Connection closed by peer"), ("", "RuntimeError")],
)
def test_a_rank_that_is_gone_is_a_reason_to_try_again(monkeypatch: pytest.MonkeyPatch, problem: str, why: str) -> None:
    def broken(part: torch.Tensor, src: int) -> None:
        raise RuntimeError(problem)

    monkeypatch.setattr(dist, "broadcast", broken)
    with pytest.raises(TryAgain) as caught:
        Ranks(1, 2).hand_out([torch.zeros(1)], [0])
    assert str(caught.value) == f"learning: another rank is gone ({why}); start it again."
    assert caught.value.exit_code == 75


def test_ranks_that_do_not_appear_are_a_reason_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TryAgain) as caught, joined():
        pass
    assert str(caught.value).startswith("learning: the other ranks cannot be reached (Error initializing")


def test_each_rank_takes_its_own_gpu_and_can_still_speak_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of torch on a machine with four GPUs, which this one is not."""
    asked: dict[str, object] = {}
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: asked.update(backend=backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: asked.update(is_left=True))
    with joined() as ranks:
        assert ranks == Ranks(3, 4)
        assert asked == {"device": 3, "backend": "cpu:gloo,cuda:nccl"}
    assert asked["is_left"]


def test_ranks_that_found_different_checkpoints_do_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "broadcast", lambda part, src: part.fill_(5))  # rank 0 found five entries
    _check_agreement(Ranks(1, 2), [None] * 5)  # type: ignore[arg-type]
    with pytest.raises(TryAgain) as caught:
        _check_agreement(Ranks(1, 2), [])  # type: ignore[arg-type]
    assert str(caught.value) == (
        "learning: the ranks found different checkpoints, since another attempt is at work; try again."
    )


def test_a_helper_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_uri: str) -> None:
    fakes = FakeStages(monkeypatch)
    run = make_run(tmp_path, store_uri)
    fakes.before_return = lambda context: context.save_checkpoint("000000.safetensors", b"x")
    assert run_shard(run, Node("crop"), Shard(), QUIET, commits=False) == "done by another"
    assert [info.path for info in run.store.list()] == ["config.yaml"]
    assert fakes.calls == ["crop 0-of-1"], "but it worked"


@pytest.mark.parametrize(("rank", "outcome"), [("0", "done"), ("1", "done by another"), (None, "done")])
def test_only_the_first_rank_of_torchrun_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str | None, outcome: str
) -> None:
    FakeStages(monkeypatch)
    run = make_run(tmp_path, str(tmp_path / "run"))
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as left:
        stage_command("crop").main(["--run", run.uri], standalone_mode=False)
    assert left.value.code == 0
    assert capsys.readouterr().err == f"crop 0-of-1: {outcome}\n"
    assert (Run(run.uri).manifest(Node("crop"), Shard()) is not None) == (outcome == "done")
