"""What reaches a Pushgateway, and when; and that one which fails costs a line and a few seconds, never a stage."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.common import Terminated
from rpl.errors import BadInput, TryAgain
from rpl.manifests import Shard
from rpl.metrics import RunOutcome, delete_groups, delete_stale_groups, observed, push_run, reporting
from rpl.metrics import gateway as gateways
from rpl.metrics.declared import EXIT, IMAGES, METRICS, ROWS
from rpl.metrics.gateway import PATIENCE_S, Gateway
from rpl.progress import Reporter
from rpl.rounds import Node
from rpl.stage import Context, Run, run_shard
from tests.fake_stages import FakeStages, make_run
from tests.pushgateways import FakeGateway, Values, grouping, held, real_gateway
from tests.small_run import do, install_light_stages, make_small_run
from tests.test_metrics import needs_promtool, promtool

CROP = Node("crop")
FIRST, SECOND = Shard(0, 2), Shard(1, 2)
FAILED = RunOutcome(succeeded=False, finished=7.0)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process' gateway remembers that it has warned, and its patience."""
    gateways._gateway.cache_clear()
    for name in ("RPL_PUSHGATEWAY", "RPL_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGateway]:
    with FakeGateway() as found:
        monkeypatch.setenv("RPL_PUSHGATEWAY", found.url)
        yield found


@pytest.fixture(params=["fake", "real"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A gateway's URL: of the small one, and of the real one where it is installed."""
    if request.param == "fake":
        yield request.getfixturevalue("fake").url
        return
    with real_gateway() as found:
        monkeypatch.setenv("RPL_PUSHGATEWAY", found)
        yield found


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    return FakeStages(monkeypatch)


def run_at(folder: Path, name: str = "small") -> Run:
    return make_run(folder, str(folder / name), shards={"crop": 2, "download": 1})


def report(run: Run, shard: Shard = FIRST) -> str:
    """Do a shard of crop as a command does."""
    with observed(run, CROP, shard) as on_progress:
        return run_shard(run, CROP, shard, Reporter(live=False, every_s=1e9, on_progress=on_progress))


def timeless(values: Values) -> Values:
    return {name: value for name, value in values.items() if "timestamp" not in name}


def eventually(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


# What arrives


def test_a_shard_reports_its_end_under_its_own_group(
    tmp_path: Path, url: str, fakes: FakeStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RPL_ATTEMPT", "2")
    run = run_at(tmp_path)
    began = time.time()
    assert report(run, SECOND) == "done"
    ended = time.time()
    found = held(url)
    assert list(found) == ["rpl/small/once/crop/1-of-2"]
    (values,) = found.values()
    manifest = run.manifest(CROP, SECOND)
    assert manifest is not None
    times = [values[f"rpl_stage_{each}_timestamp_seconds"] for each in ("start", "last_progress", "completion")]
    assert [began, *times, ended] == sorted([began, *times, ended])
    assert timeless(values) == {
        "rpl_stage_success": 1,
        "rpl_stage_exit{kind=done}": 1,
        "rpl_stage_exit{kind=bad_input}": 0,
        "rpl_stage_exit{kind=try_again}": 0,
        "rpl_stage_exit{kind=bug}": 0,
        "rpl_stage_retries": 2,
        "rpl_stage_duration_seconds": manifest.wall_s,
        "rpl_stage_rows": 1,
        "rpl_stage_input_bytes": 0,
        "rpl_stage_output_bytes": sum(file.size for file in manifest.files.values()),
        "rpl_stage_peak_memory_bytes": manifest.peak_memory_bytes,
    }


def test_a_shard_that_was_done_before_reports_the_same(tmp_path: Path, fake: FakeGateway, fakes: FakeStages) -> None:
    assert report(run_at(tmp_path)) == "done"
    first = held(fake.url)
    fake.groups.clear()
    assert report(Run(str(tmp_path / "small"))) == "already done"
    second = held(fake.url)
    assert list(first) == list(second)
    assert [timeless(values) for values in first.values()] == [timeless(values) for values in second.values()]


def test_rounds_and_the_novel_pass_are_told_apart() -> None:
    for round_, label in ((None, "once"), (3, "3"), ("novel", "novel")):
        assert reporting.shard_group("s3://b/runs/first", Node("encode", round_), Shard(0, 4)) == {  # type: ignore[arg-type]
            "run": "first", "round": label, "stage": "encode", "shard": "0-of-4",
        }  # fmt: skip


def test_a_running_shard_shows_and_has_no_end(tmp_path: Path, fake: FakeGateway, fakes: FakeStages) -> None:
    seen: list[Values] = []

    def look(_context: Context) -> None:
        eventually(lambda: fake.groups)
        seen.extend(held(fake.url).values())

    fakes.before_return = look
    report(run_at(tmp_path))
    assert [set(values) for values in seen] == [
        {"rpl_stage_start_timestamp_seconds", "rpl_stage_last_progress_timestamp_seconds", "rpl_stage_retries"}
    ]


def test_progress_is_pushed_now_and_then(
    tmp_path: Path, fake: FakeGateway, fakes: FakeStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(context: Context) -> None:
        eventually(lambda: fake.pushes)  # the start
        with context.progress(10, "steps") as progress:
            progress.note(loss=1.5)
            progress.update(4)
            eventually(lambda: len(fake.pushes) == pushes)

    fakes.before_return = work
    pushes = 1
    report(run_at(tmp_path))
    assert len(fake.pushes) == 2, "start and end: less than 15 seconds lie between"
    monkeypatch.setattr(reporting, "EVERY_S", 0.0)
    fake.pushes.clear()
    pushes = 2
    report(run_at(tmp_path), SECOND)
    values = fake.pushes[1][1]
    assert values["rpl_stage_items_done"] == 4
    assert values["rpl_stage_items_expected"] == 10
    assert values["rpl_learning_loss"] == 1.5
    assert values["rpl_stage_peak_memory_bytes"] > 1e6
    assert "rpl_stage_completion_timestamp_seconds" not in values
    assert "rpl_stage_items_done" not in fake.pushes[2][1], "the end replaces what was under way"


def test_progress_of_nothing_counted_has_no_number_expected(
    tmp_path: Path, fake: FakeGateway, fakes: FakeStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "EVERY_S", 0.0)

    def work(context: Context) -> None:
        eventually(lambda: fake.pushes)
        with context.progress(None, "pictures") as progress:
            progress.update()
            eventually(lambda: len(fake.pushes) == 2)

    fakes.before_return = work
    report(run_at(tmp_path))
    assert fake.pushes[1][1]["rpl_stage_items_done"] == 1
    assert not {"rpl_stage_items_expected", "rpl_learning_loss"} & set(fake.pushes[1][1])


@pytest.mark.parametrize(
    ("error", "kind"),
    [(BadInput("x"), "bad_input"), (TryAgain("x"), "try_again"), (Terminated(), "try_again"), (KeyError("x"), "bug")],
)
def test_a_failure_is_reported_and_raised(
    tmp_path: Path, fake: FakeGateway, fakes: FakeStages, error: BaseException, kind: str
) -> None:
    def fail(_context: Context) -> None:
        raise error

    fakes.before_return = fail
    run = run_at(tmp_path)
    with pytest.raises(type(error)):
        report(run)
    (values,) = held(fake.url).values()
    assert values["rpl_stage_success"] == 0
    exits = {name: value for name, value in values.items() if name.startswith("rpl_stage_exit")}
    assert [name for name, value in exits.items() if value] == [f"rpl_stage_exit{{kind={kind}}}"]
    assert {"rpl_stage_duration_seconds", "rpl_stage_peak_memory_bytes"} <= set(values)
    assert "rpl_stage_rows" not in values

    fakes.before_return = lambda _context: None  # another attempt takes the failure away
    report(run)
    (values,) = held(fake.url).values()
    assert values["rpl_stage_success"] == 1


@pytest.mark.parametrize("text", ["", "{{retries}}", "-1", "x"])
def test_an_attempt_that_is_no_number_is_the_first(
    tmp_path: Path, fake: FakeGateway, fakes: FakeStages, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("RPL_ATTEMPT", text)
    report(run_at(tmp_path))
    (values,) = held(fake.url).values()
    assert values["rpl_stage_retries"] == 0


def test_a_run_reports_its_outcome_and_its_shards_are_deleted(tmp_path: Path, url: str, fakes: FakeStages) -> None:
    for name in ("one", "another"):
        for shard in (FIRST, SECOND):
            report(run_at(tmp_path, name), shard)
    assert push_run(str(tmp_path / "one"), FAILED)
    assert len(held(url)) == 5
    assert delete_groups("s3://anywhere/runs/one") == 3
    assert push_run(str(tmp_path / "one"), FAILED)
    found = held(url)
    assert sorted(found) == ["rpl/another/once/crop/0-of-2", "rpl/another/once/crop/1-of-2", "rpl/one"]
    assert found["rpl/one"] == {
        "rpl_run_success": 0, "rpl_run_completion_timestamp_seconds": 7, "rpl_run_rounds": 0,
    }  # fmt: skip
    assert delete_groups("one") == 1
    assert delete_groups("one") == 0


def test_groups_with_signs_that_a_path_has_a_use_for(url: str) -> None:
    for name in ("a b", "ä%2F?", "x+y=z"):
        assert push_run(f"s3://bucket/runs/{name}", FAILED)
    assert sorted(held(url)) == sorted(["rpl/a b", "rpl/ä%2F?", "rpl/x+y=z"])
    assert [delete_groups(f"s3://bucket/runs/{name}") for name in ("a b", "ä%2F?", "x+y=z")] == [1, 1, 1]
    assert held(url) == {}


def test_what_is_of_another_job_is_left_alone(url: str) -> None:
    from prometheus_client import CollectorRegistry, push_to_gateway

    push_to_gateway(url, "other", CollectorRegistry(), {"run": "one"})
    push_run("one", FAILED)
    assert delete_groups("one") == 1
    assert delete_stale_groups(-60) == 0
    assert list(held(url)) == ["other/one"]


def test_runs_that_push_no_more_are_deleted_after_a_while(tmp_path: Path, fake: FakeGateway, fakes: FakeStages) -> None:
    for name in ("old", "taken-up-again", "new"):
        report(run_at(tmp_path, name))
        push_run(name, FAILED)
        fake.age(name, 0 if name == "new" else 7200)
    report(run_at(tmp_path, "taken-up-again"))
    assert delete_stale_groups(3600) == 2
    assert {grouping(path)["run"] for path in fake.groups} == {"taken-up-again", "new"}
    assert len(fake.groups) == 4


# A gateway that fails, or none


def test_without_the_variable_nothing_is_even_imported(tmp_path: Path) -> None:
    run_at(tmp_path)
    script = """
        import sys, types
        from jobs.crop import main
        module = types.ModuleType("rpl.stages.crop")
        module.run = lambda context: context.write("x", b"x")
        sys.modules["rpl.stages.crop"] = module
        try:
            main(["--run", sys.argv[1]])
        except SystemExit as exit:
            assert exit.code == 0
        assert "rpl.metrics" in sys.modules
        assert "prometheus_client" not in sys.modules
    """
    environment = {key: value for key, value in os.environ.items() if key != "RPL_PUSHGATEWAY"}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "small")]
    subprocess.run(command, check=True, timeout=60, env=environment)
    assert push_run("one", FAILED) is False
    assert (delete_groups("one"), delete_stale_groups(0)) == (0, 0)


def test_a_gateway_that_is_down_costs_one_line(
    tmp_path: Path, fakes: FakeStages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RPL_PUSHGATEWAY", "127.0.0.1:9")
    run = run_at(tmp_path)
    assert report(run, FIRST) == "done"
    assert report(run, SECOND) == "done"
    assert push_run("small", FAILED) is False
    assert delete_groups("small") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Metrics could not be pushed (RPL_PUSHGATEWAY; ")
    assert "refused" in line
    assert line.endswith("); the work goes on without.")


def test_a_gateway_that_refuses_costs_one_line(
    tmp_path: Path, fake: FakeGateway, fakes: FakeStages, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.status = 500
    assert report(run_at(tmp_path)) == "done"
    assert delete_groups("small") == 0
    assert capsys.readouterr().err.splitlines() == [
        "Metrics could not be pushed (RPL_PUSHGATEWAY; status 500 it is broken); the work goes on without."
    ]
    fake.status = 200  # it is asked again all the same
    assert report(run_at(tmp_path)) == "already done"
    assert len(fake.groups) == 1


def test_a_redirect_is_not_followed(fake: FakeGateway) -> None:
    fake.status = 302
    assert push_run("one", FAILED) is False
    assert len(fake.requests) == 1


@pytest.mark.slow
def test_a_slow_gateway_delays_a_process_by_seconds_whatever_it_does(
    tmp_path: Path, fake: FakeGateway, fakes: FakeStages, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fake.delay_s = 60
    run = make_run(tmp_path, str(tmp_path / "small"), shards={"crop": 8})
    began = time.monotonic()
    for shard in run.shards(CROP):
        assert report(run, shard) == "done"
    assert time.monotonic() - began < PATIENCE_S + 6, "eight shards that each waited would take 16 s and more"
    assert capsys.readouterr().err.count("Metrics could not be pushed") == 1


def test_a_failure_is_reported_in_time_by_a_slow_gateway_too(
    tmp_path: Path, fake: FakeGateway, fakes: FakeStages
) -> None:
    def stop(_context: Context) -> None:
        raise Terminated

    fake.delay_s = 60
    fakes.before_return = stop
    began = time.monotonic()
    with pytest.raises(Terminated):
        report(run_at(tmp_path))
    assert time.monotonic() - began < 7, "after SIGTERM a process is killed"


def test_a_fault_in_the_metrics_is_no_fault_of_the_stage(
    tmp_path: Path, fake: FakeGateway, fakes: FakeStages, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def broken(*_: object) -> list[Any]:
        raise KeyError("no such fact")

    monkeypatch.setattr(reporting, "stage_metrics", broken)
    assert report(run_at(tmp_path)) == "done"
    (values,) = held(fake.url).values()
    assert values["rpl_stage_success"] == 1
    assert "no such fact" in capsys.readouterr().err


def test_nonsense_for_an_answer_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    for answer in (b"[]", b"<html>", b'{"data": [{"labels": {"job": "rpl"}}]}', b'{"data": 3}'):
        gateway = Gateway("gateway")
        gateway._request = lambda *_args, answer=answer: answer  # type: ignore[method-assign, misc]
        assert gateway.groups() == []
        assert capsys.readouterr().err.startswith("Metrics could not be listed (RPL_PUSHGATEWAY; ")


def test_an_address_that_is_none_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("http://", "ftp://host", "http://host:port", "http://[::1"):
        assert Gateway(url).push({"run": "r"}, [ROWS(1)]) is False
        assert "Metrics could not be pushed" in capsys.readouterr().err


# The whole of it


@needs_promtool
def test_promtool_finds_nothing_to_mend_in_what_is_pushed(fake: FakeGateway) -> None:
    samples = [metric(1.5, **dict.fromkeys(metric.labels, "x")) for metric in METRICS]
    assert Gateway(fake.url).push({"run": "r"}, [*samples, EXIT(1, kind="done"), IMAGES(2, outcome="ok", reason="")])
    (body,) = fake.bodies
    assert len(fake.pushes[0][1]) == len(METRICS) + 2
    promtool("check", "metrics", stdin=body)


@pytest.mark.slow
def test_commands_report_what_their_stages_committed(
    tmp_path: Path, fake: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_light_stages(monkeypatch)
    run = make_small_run(tmp_path, str(tmp_path / "small"))
    monkeypatch.delenv("RPL_PUSHGATEWAY")
    do(run, "crop", "encode")
    monkeypatch.setenv("RPL_PUSHGATEWAY", fake.url)
    monkeypatch.setenv("RPL_ATTEMPT", "1")
    for stage in ("learn", "embed"):
        command = [sys.executable, "-m", f"jobs.{stage}", "--run", run.uri, "--round", "1", "--shard", "0/1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert "Metrics could not" not in done.stderr

    found = held(fake.url)
    assert sorted(found) == ["rpl/small/1/embed/0-of-1", "rpl/small/1/learn/0-of-1"]
    (learned,) = run.manifests(Node("learn", 1)) or []
    (embedded,) = run.manifests(Node("embed", 1)) or []
    values = found["rpl/small/1/learn/0-of-1"]
    assert values["rpl_learning_loss"] == learned.facts["loss"]
    assert values["rpl_learning_text_passes"] == learned.facts["text_passes"]
    assert values["rpl_stage_rows"] == learned.rows > 0
    assert values["rpl_stage_retries"] == 1
    assert values["rpl_stage_success"] == 1
    inputs = [*(run.manifests(Node("crop")) or []), *(run.manifests(Node("encode")) or [])]
    assert values["rpl_stage_input_bytes"] == sum(file.size for each in inputs for file in each.files.values()) > 0
    accuracy = embedded.facts["accuracy"]
    values = found["rpl/small/1/embed/0-of-1"]
    for prompt in ("learned", "manual", "best_manual", "ensemble"):
        for split in ("base", "novel"):
            measured = values[f"rpl_validation_accuracy_ratio{{prompt={prompt},split={split}}}"]
            assert measured == accuracy[prompt][split]


def test_a_command_that_fails_reports_that(tmp_path: Path, fake: FakeGateway) -> None:
    run_at(tmp_path)  # its annotations are no JSON
    command = [sys.executable, "-m", "jobs.crop", "--run", str(tmp_path / "small"), "--shard", "1/2"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 2
    (values,) = held(fake.url).values()
    assert values["rpl_stage_exit{kind=bad_input}"] == 1


def test_of_several_ranks_the_first_one_reports(
    tmp_path: Path, fake: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_at(tmp_path)
    monkeypatch.setenv("RANK", "1")
    command = [sys.executable, "-m", "jobs.crop", "--run", str(tmp_path / "small"), "--shard", "1/2"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 2
    assert fake.requests == []
