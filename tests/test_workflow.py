"""The steps around the stages, as a workflow calls them: start, decide, finish."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.common import _told_to, _workflow_progress
from rpl.again import PROMPTS
from rpl.config import RunConfig, absolute, dump_config, load_config
from rpl.errors import BadInput
from rpl.local import run_all
from rpl.report.summary import summarise
from rpl.rounds import Node
from rpl.stage import Context, Run, run_exists
from rpl.store import open_store
from rpl.workflow import another_round, begin, begin_after, close
from tests.fake_report import report_data
from tests.fake_stages import QUIET, FakeStages, do, make_config
from tests.pushgateways import FakeGateway


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(dump_config(make_config(tmp_path, "ignored")), encoding="utf-8")
    return path


def test_start_freezes_the_configuration_under_the_runs_own_name(tmp_path: Path, config: Path) -> None:
    uri = f"{tmp_path}/runs/first"
    result = call(
        "jobs.start", f"--run={uri}", f"--config={config}", "--max-rounds=", "--shards=", f"--outputs={tmp_path}/out"
    )
    assert result.returncode == 0, result.stderr
    assert Run(uri).config.run == uri
    assert (tmp_path / "out/crop-shards").read_text() == "1"
    assert (tmp_path / "out/download-shards").read_text() == "1"


def test_start_again_finds_the_run_and_other_settings_are_refused(tmp_path: Path, config: Path) -> None:
    uri = f"{tmp_path}/runs/first"
    begin(uri, str(config), max_rounds=2, shards=3)
    begin(uri, str(config), max_rounds=2, shards=3)
    settings = Run(uri).config
    assert (settings.rounds.max_rounds, settings.shards.crop, settings.shards.download) == (2, 3, 3)
    with pytest.raises(BadInput, match=r"this run was started with rounds\.max_rounds = 2, not 4"):
        begin(uri, str(config), max_rounds=4, shards=3)


def test_a_broken_configuration_is_told_at_once_and_nothing_is_begun(tmp_path: Path, config: Path) -> None:
    config.write_text(config.read_text().replace("seed: 0", "sede: 0"), encoding="utf-8")
    uri = f"{tmp_path}/runs/first"
    result = call("jobs.start", f"--run={uri}", f"--config={config}", f"--outputs={tmp_path}/out")
    assert (result.returncode, result.stderr) == (
        2, f"Error: {config}: unknown key 'sede'; remove it or correct its spelling.\n",
    )  # fmt: skip
    assert not run_exists(uri)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["train.json", "pool.npy"])
def test_a_file_that_is_not_there_is_told_at_once(tmp_path: Path, config: Path, place: str) -> None:
    (tmp_path / place).unlink()
    with pytest.raises(BadInput) as caught:
        begin(f"{tmp_path}/runs/first", str(config))
    assert str(caught.value) == f"{tmp_path}/{place}: does not exist; correct the place in {config}."
    assert not run_exists(f"{tmp_path}/runs/first")


@pytest.mark.parametrize("name", ["a b", "-x", "ä", "x" * 101, "{{workflow.name}}", "a;b"])
def test_names_that_no_object_should_have(tmp_path: Path, config: Path, name: str) -> None:
    with pytest.raises(BadInput, match="a run's name holds letters, digits"):
        begin(f"{tmp_path}/runs/{name}", str(config))


@pytest.mark.parametrize("number", ["0", "-1", "1000", "two", "1.5"])
def test_numbers_of_a_workflow(tmp_path: Path, config: Path, number: str) -> None:
    result = call(
        "jobs.start", f"--run={tmp_path}/r", f"--config={config}", f"--shards={number}", f"--outputs={tmp_path}/o"
    )
    assert (result.returncode, result.stderr) == (
        2,
        f"Error: --shards {number!r} is no number from 1 to 999; correct it.\n",
    )


def test_places_in_a_configuration_on_s3_count_from_it(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "run": "s3://b/runs/x",
            "data": {"train": {"annotations": "a/train.json", "images": "../images"}},
            "pool": {"vectors": "s3://other/pool"},
        }
    )
    found = absolute(config, "s3://b/configs/deep")
    assert found.data.train.annotations == "s3://b/configs/deep/a/train.json"
    assert found.data.train.images == "s3://b/configs/images"
    assert found.pool.vectors == "s3://other/pool"
    assert found.run == "s3://b/runs/x"
    assert found.clip.pretrained == "openai", "a tag is no place"


def test_a_configuration_on_a_store_is_read_like_a_local_one(tmp_path: Path, config: Path, store_uri: str) -> None:
    open_store(store_uri).write("configs/my.yaml", config.read_bytes())
    begun = begin(f"{store_uri}/runs/first", f"{store_uri}/configs/my.yaml")
    local = load_config(config)
    assert begun.config.model_dump(exclude={"run"}) == local.model_dump(exclude={"run"})


def test_rounds_go_on_while_accuracy_rises(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = FakeStages(monkeypatch)
    fakes.accuracies = [0.5, 0.6, 0.6]
    run = begin(f"{tmp_path}/runs/first", str(config), max_rounds=5)
    for stage in ("crop", "encode", "index"):
        do(run, stage)
    with pytest.raises(BadInput, match="round 1 is not finished"):
        another_round(run, 1)
    for number, follows in ((1, True), (2, True), (3, False)):
        for stage in ("learn", "embed", "retrieve", "download", "encode", "curate"):
            do(run, stage, number)
        assert another_round(run, number) is follows
        assert another_round(Run(run.uri), number) is follows, "another process decides the same"


def test_decide_tells_the_workflow(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeStages(monkeypatch)
    run = begin(f"{tmp_path}/runs/first", str(config), max_rounds=1)
    for stage in ("crop", "encode", "index"):
        do(run, stage)
    do(run, "learn", 1)
    do(run, "embed", 1)
    result = call("jobs.decide", f"--run={run.uri}", "--round=1", f"--outputs={tmp_path}/out")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/go-on").read_text() == "false"


def test_finish_publishes_whatever_happened(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeStages(monkeypatch)
    run = begin(f"{tmp_path}/runs/first", str(config))
    do(run, "crop")
    text = json.dumps(
        json.dumps([{"displayName": "learn", "message": "Error (exit code 2): <b>bad</b>", "phase": "Failed"}])
    )
    result = call("jobs.finish", f"--run={run.uri}", "--status=Failed", RPL_FAILURES=text)
    assert result.returncode == 0, result.stderr
    found = json.loads((Path(run.uri) / "outcome.json").read_text())
    assert found["outcome"] == "Failed"
    assert found["failures"] == [{"step": "learn", "message": "Error (exit code 2): <b>bad</b>"}]
    assert found["report"] is None
    assert {k: found["stages"][0][k] for k in ("stage", "done", "shards")} == {"stage": "crop", "done": 1, "shards": 1}
    assert "learn: Error (exit code 2): <b>bad</b>" in result.stderr


@pytest.mark.parametrize("text", ["", "null", "not json", "{}", '"[]"', "[1]"])
def test_finish_is_stopped_by_no_text(tmp_path: Path, config: Path, text: str) -> None:
    run = begin(f"{tmp_path}/runs/first", str(config))
    result = call("jobs.finish", f"--run={run.uri}", "--status=Error", RPL_FAILURES=text)
    assert result.returncode == 0, result.stderr
    assert json.loads((Path(run.uri) / "outcome.json").read_text())["outcome"] == "Error"


def test_finish_of_a_run_that_never_began_writes_nothing(tmp_path: Path) -> None:
    result = call("jobs.finish", f"--run={tmp_path}/runs/none", "--status=Failed")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "runs").exists()


def write_report(context: Context) -> None:
    if context.node.stage == "report":
        context.write("index.html", b"<p>page")
        context.write("summary.json", json.dumps(summarise(report_data())).encode())


@pytest.fixture
def reporting(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that has only begun, and whose stages run in this process."""
    FakeStages(monkeypatch).before_return = write_report
    return begin(f"{tmp_path}/runs/first", str(config))


def finish(run: Run, gateway: FakeGateway, status: str) -> dict[str, str]:
    """outcome.json after jobs.finish."""
    result = call("jobs.finish", f"--run={run.uri}", f"--status={status}", RPL_PUSHGATEWAY=gateway.url)
    assert result.returncode == 0, result.stderr
    found: dict[str, str] = json.loads((Path(run.uri) / "outcome.json").read_text())
    return found


def told(gateway: FakeGateway) -> float:
    """What was said last of the run's success."""
    return next(values["rpl_run_success"] for _, values in reversed(gateway.pushes) if "rpl_run_success" in values)


def test_a_finished_runs_report_lies_where_a_person_looks(reporting: Run) -> None:
    run_all(reporting, QUIET)
    published = close(reporting, "Succeeded", "Succeeded", [])
    assert published["report"] == "index.html"
    assert (Path(reporting.uri) / "index.html").read_bytes() == b"<p>page"
    assert Run(reporting.uri).manifests(Node("report")), "the copies disturb nothing"
    assert [row["done"] for row in published["stages"]] == [1] * len(published["stages"])


def test_a_workflow_stopped_over_a_finished_run_takes_nothing_away(reporting: Run) -> None:
    with FakeGateway() as gateway:
        published = finish(reporting, gateway, "Failed")
        assert (published["outcome"], published["workflow"]) == ("Failed", "Failed")
        assert told(gateway) == 0
        run_all(reporting, QUIET)
        published = finish(reporting, gateway, "Failed")
        assert (published["outcome"], published["workflow"]) == ("Succeeded", "Failed")
        assert told(gateway) == 1


def test_a_run_broken_by_a_missing_file_is_reported_as_failed(reporting: Run) -> None:
    Path(reporting.config.data.train.annotations).unlink()
    with FakeGateway() as gateway:
        call("jobs.finish", f"--run={reporting.uri}", "--status=Failed", RPL_PUSHGATEWAY=gateway.url)
        assert told(gateway) == 0


def test_a_run_after_another_takes_the_newest_and_stays_with_it(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = FakeStages(monkeypatch)

    def prompts(context: object) -> None:
        if context.node.stage == "export":  # type: ignore[attr-defined]
            context.write("prompts.safetensors", str(context.run.uri).encode())  # type: ignore[attr-defined]

    fakes.before_return = prompts
    with pytest.raises(BadInput, match="none of the runs base and base-… is finished"):
        begin_after(f"{tmp_path}/runs/base-1", "base")
    run_all(begin(f"{tmp_path}/runs/base", str(config)), QUIET)
    first = begin_after(f"{tmp_path}/runs/base-1", "base")
    assert first.config.previous == f"{tmp_path}/runs/base"
    run_all(first, QUIET)
    (Path(first.uri) / PROMPTS).unlink()  # as if killed before the prompts were copied
    assert begin_after(first.uri, "base").config.previous == f"{tmp_path}/runs/base", "not itself, though the newest"
    assert (Path(first.uri) / PROMPTS).read_bytes() == f"{tmp_path}/runs/base".encode()
    assert begin_after(f"{tmp_path}/runs/base-2", "base").config.previous == first.uri
    result = call("jobs.start", f"--run={tmp_path}/runs/base-3", "--after=base", f"--outputs={tmp_path}/out")
    assert result.returncode == 0, result.stderr
    assert Run(f"{tmp_path}/runs/base-3").config.previous == first.uri


def test_start_wants_something_to_start_from(tmp_path: Path) -> None:
    result = call("jobs.start", f"--run={tmp_path}/runs/x", "--config=", f"--outputs={tmp_path}/out")
    assert (result.returncode, result.stderr) == (
        2, "Error: --config is empty; give the URI of a configuration, as `rpl init` writes one.\n",
    )  # fmt: skip


def test_a_stage_tells_a_workflow_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARGO_PROGRESS_FILE", str(tmp_path / "progress"))
    tell = _told_to(None, _workflow_progress())
    tell(3, 10, {})
    assert (tmp_path / "progress").read_text() == "3/10\n"
    tell(4, 10, {})
    assert (tmp_path / "progress").read_text() == "3/10\n", "not at every item"
    monkeypatch.setenv("ARGO_PROGRESS_FILE", str(tmp_path / "no" / "progress"))
    _told_to(_workflow_progress())(1, 2, {})  # a folder that is not there stops nothing
    monkeypatch.delenv("ARGO_PROGRESS_FILE")
    assert _workflow_progress() is None


def test_kubernetes_is_told_the_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "termination-log"
    code = (
        "import jobs.common; from rpl.errors import BadInput; from rpl.rounds import parse_round; "
        f"jobs.common.TERMINATION_LOG = {str(log)!r}; jobs.common.guarded(lambda: parse_round('x'))"
    )
    subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert not log.exists(), "outside a pod no file is made"
    log.write_text("")
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 2
    assert log.read_text() == "Error: --round 'x' is neither a number from 1 nor 'novel'; correct it."
