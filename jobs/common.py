"""What all commands share: signals, errors as exit codes, and the options --run --round --shard.

This is the one place where an exception becomes an exit code: 0 done, 2 bad input, 75 try again, 130 interrupted,
1 a bug (with its traceback). Knows no stage.
"""

from __future__ import annotations

import signal
import threading


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that nothing on the way swallows it."""


def _on_sigterm(_number: int, _frame: object) -> None:
    # Kubernetes kills after its grace period; a wait inside a library must not eat it.
    timer = threading.Timer(LEAVE_WITHIN_S, _leave_now)
    timer.daemon = True
    timer.start()
    raise Terminated


def _leave_now() -> None:
    kill_workers()
    os._exit(TryAgain.exit_code)


LEAVE_WITHIN_S = 7.0
TERMINATION_LOG = "/dev/termination-log"
TERMINATION_LOG_LENGTH = 1000
WORKFLOW_PROGRESS_EVERY_S = 3.0  # as often as Argo looks
# As process 1 of a container Python ignores SIGTERM until a handler is there: before the slow imports below.
signal.signal(signal.SIGTERM, _on_sigterm)

import contextlib  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, NoReturn  # noqa: E402

import click  # noqa: E402

from rpl.errors import BadInput, RplError, TryAgain  # noqa: E402
from rpl.workers import kill_workers  # noqa: E402

if TYPE_CHECKING:
    from rpl.progress import OnProgress


def guarded(action: Callable[[], None]) -> NoReturn:
    """Run `action` and leave the process with the exit code that its outcome has."""
    try:
        action()
        code = 0
    except RplError as error:
        _tell(f"Error: {error}")
        code = error.exit_code
    except Terminated:
        _tell("Stopped by SIGTERM: nothing was committed; the same command goes on from what was.")
        code = TryAgain.exit_code
    except KeyboardInterrupt:
        click.echo("Interrupted: the same command goes on from what was committed.", err=True)
        code = 130
    if code:
        kill_workers()
        sys.stderr.flush()
        os._exit(code)  # not sys.exit: a pool's exit hook would wait for work that nobody wants any more
    sys.exit(0)


def _tell(sentence: str) -> None:
    """To the person at the terminal; in a pod also to Kubernetes, which shows it beside the exit code."""
    click.echo(sentence, err=True)
    # Not opened if absent: outside a pod this would make a file.
    with contextlib.suppress(OSError), open(os.open(TERMINATION_LOG, os.O_WRONLY | os.O_TRUNC), "w") as log:  # noqa: PTH123
        log.write(sentence[:TERMINATION_LOG_LENGTH])


def parse_shard(text: str, count: int) -> int:
    """Index of the shard that `i/n` names; n must be the run's own number.

    Raises:
        BadInput: another form, or another n than the configuration's.
    """
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise BadInput(f"--shard {text!r} is not of the form i/n with i from 0 to n-1; correct it.")
    if int(match[2]) != count:
        raise BadInput(f"--shard {text!r}: this run cuts the stage into {count}; give i/{count}, or leave --shard out.")
    return int(match[1])


run_option = click.option(
    "--run", "run_uri", required=True, metavar="URI", help="The run: s3://BUCKET/PREFIX/runs/NAME or a folder."
)


def number_or_none(option: str, text: str) -> int | None:
    """The number from 1 in `text`; None where it is empty, as a workflow gives what was left out.

    Raises:
        BadInput: something else.
    """
    if not text:
        return None
    if not re.fullmatch(r"[1-9]\d{0,2}", text):
        raise BadInput(f"{option} {text!r} is no number from 1 to 999; correct it.")
    return int(text)


def write_outputs(folder: Path, values: dict[str, str]) -> None:
    """One small file per value, where a workflow engine picks it up."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name).write_text(value, encoding="utf-8")


def stage_command(stage: str) -> click.Command:
    """The command of one stage; without --shard it does all shards in turn."""

    @click.command(help=f"{_title(stage)}.")
    @run_option
    @click.option(
        "--round",
        "round_text",
        metavar="N",
        help="A round from 1, or 'novel'. Absent or 'once': the stage that runs once.",
    )
    @click.option(
        "--shard",
        "shard_text",
        metavar="i/n",
        help="One part, i from 0. Absent or 'all': all parts, one after the other.",
    )
    def command(run_uri: str, round_text: str | None, shard_text: str | None) -> None:
        guarded(lambda: _run_stage(stage, run_uri, round_text, shard_text))

    return command


def _title(stage: str) -> str:
    from rpl.rounds import STAGES

    return STAGES[stage].title


def _run_stage(stage: str, run_uri: str, round_text: str | None, shard_text: str | None) -> None:
    from rpl.metrics import observed
    from rpl.progress import Reporter
    from rpl.rounds import Node, edges, parse_round
    from rpl.stage import Run, run_shard

    node = Node(stage, parse_round(round_text))
    edges(node)  # refuses a scope at which the stage does not run
    run = Run(run_uri)
    shards = run.shards(node)
    if shard_text is not None and shard_text != "all":
        shards = [shards[parse_shard(shard_text, len(shards))]]
    commits = os.environ.get("RANK", "0") == "0"  # under torchrun all ranks work, and the first one writes and reports
    try:
        for shard in shards:
            with observed(run, node, shard) if commits else contextlib.nullcontext() as on_progress:
                reporter = Reporter(on_progress=_told_to(on_progress, _workflow_progress()))
                outcome = run_shard(run, node, shard, reporter, commits=commits)
            reporter.say(f"{node.path} {shard}: {outcome}")
    finally:
        run.close()


def _told_to(*listeners: OnProgress | None) -> OnProgress:
    def tell(done: int, total: int | None, values: Mapping[str, float]) -> None:
        for listener in listeners:
            if listener is not None:
                listener(done, total, values)

    return tell


def _workflow_progress() -> OnProgress | None:
    """Writes `done/total` where Argo reads it; None outside a workflow."""
    file = os.environ.get("ARGO_PROGRESS_FILE")
    if not file:
        return None
    written = 0.0

    def write(done: int, total: int | None, values: Mapping[str, float]) -> None:  # noqa: ARG001
        nonlocal written
        if total and time.monotonic() - written >= WORKFLOW_PROGRESS_EVERY_S:
            written = time.monotonic()
            with contextlib.suppress(OSError):  # a progress that nobody sees is no reason to stop
                Path(file).write_text(f"{min(done, total)}/{total}\n", encoding="ascii")

    return write
