"""Commands as a shell or a container sees them: exit codes, exact sentences, signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.cli import main as cli
from jobs.common import parse_shard
from rpl.config import dump_config
from rpl.errors import BadInput
from rpl.rounds import STAGES
from rpl.stage import Run
from tests.fake_stages import make_config, make_run


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_a_command_that_explains_itself(stage: str) -> None:
    __import__(f"jobs.{stage}")
    command = sys.modules[f"jobs.{stage}"].main
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0
    assert STAGES[stage].title in result.output
    flags = {name for parameter in command.params for name in parameter.opts}
    assert flags == {"--run", "--round", "--shard"}, "flags say which run; how is config.yaml"
    assert f"python -m jobs.{stage} --run" in (sys.modules[f"jobs.{stage}"].__doc__ or "")


def test_help_needs_no_heavy_library() -> None:
    code = "import sys, jobs.cli, jobs.crop; assert not {'torch', 'faiss', 'img2dataset', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    result = call("jobs.crop", "--run", str(tmp_path / "no"))
    assert result.returncode == 2
    assert result.stderr == (
        f"Error: {tmp_path}/no: holds no run (config.yaml is missing); start one with `rpl run --config FILE`.\n"
    )
    assert not (tmp_path / "no").exists(), "nothing half-written"


def test_a_store_that_does_not_answer_is_exit_code_75(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    result = call("jobs.crop", "--run", "s3://bucket/runs/x")
    assert result.returncode == 75
    assert result.stderr.startswith("Error: ")
    assert "http://127.0.0.1:9" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_scope_that_the_stage_has_not(tmp_path: Path) -> None:
    result = call("jobs.learn", "--run", str(tmp_path))
    assert (result.returncode, result.stderr) == (
        2, "Error: stage learn does not run at 'learn'; give it --round N.\n",
    )  # fmt: skip


def test_shards() -> None:
    assert parse_shard("2/4", 4) == 2
    for text in ("4/4", "1", "-1/4", "a/b", "1/4/2"):
        with pytest.raises(BadInput, match="is not of the form i/n with i from 0 to n-1; correct it"):
            parse_shard(text, 4)
    with pytest.raises(BadInput) as caught:
        parse_shard("1/4", 2)
    assert str(caught.value) == ("--shard '1/4': this run cuts the stage into 2; give i/2, or leave --shard out.")


SLOW_STAGE = """
import sys, time, types
from jobs.crop import main
def run(context):
    context.write("half.bin", b"half")
    print("started", flush=True)
    {body}
module = types.ModuleType("rpl.stages.crop")
module.run = run
sys.modules["rpl.stages.crop"] = module
main(["--run", sys.argv[1]])
"""


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(60)",
        # Code that catches everything must not be able to hold the process.
        "\n    while True:\n        try:\n            time.sleep(60)\n        except BaseException:\n            pass",
    ],
    ids=["sleeping", "deaf"],
)
def test_sigterm_ends_a_stage_within_ten_seconds_and_commits_nothing(tmp_path: Path, body: str) -> None:
    make_run(tmp_path, str(tmp_path / "run"))
    script = textwrap.dedent(SLOW_STAGE).replace("{body}", body)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(timeout=30) == 75
        assert time.monotonic() - began < 10
    assert not list((tmp_path / "run").glob("crop/*.json"))


def test_init_run_status_gc(tmp_path: Path) -> None:
    runner = CliRunner()
    file = tmp_path / "my.yaml"
    done = call("jobs.cli", "init", str(file))
    assert done.returncode == 0
    assert file.read_text().startswith("# A run of RPL.")
    again = call("jobs.cli", "init", str(file))
    assert again.returncode == 2
    assert again.stderr == f"Error: {file}: exists already; choose another name or delete it.\n"
    assert runner.invoke(cli, ["--help"]).exit_code == 0

    file.write_text(dump_config(make_config(tmp_path / "data", str(tmp_path / "run"))))
    failed = call("jobs.cli", "run", "--config", str(file))
    assert failed.returncode == 2, failed.stderr
    assert "train.json" in failed.stderr, "the stand-in is not an annotation file, and the sentence names it"
    shown = call("jobs.cli", "status", str(tmp_path / "run"))
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[1].split() == ["crop", "0/1"]
    collected = call("jobs.cli", "gc", str(tmp_path / "run"))
    assert collected.stdout == "Deleted 0 files of unfinished attempts.\n"
    Run(str(tmp_path / "run")).close()
