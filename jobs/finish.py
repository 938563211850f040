"""Publish how a run ended, whatever happened: the last step of a workflow.

For example:

    python -m jobs.finish --run s3://bucket/runs/first --status Succeeded

Failures come as JSON in the variable RPL_FAILURES, as Argo's `workflow.failures` has them.
"""

import json
import os
import time
from typing import Any

import click

from jobs.common import guarded, run_option

STALE_AFTER_S = 30 * 86400.0


@click.command(help="Publish how a run ended, whatever happened.")
@run_option
@click.option("--status", required=True, help="The workflow's word: Succeeded, Failed or Error.")
@click.option("--seconds", type=float, help="How long it took.")
def main(run_uri: str, status: str, seconds: float | None) -> None:
    guarded(lambda: _finish(run_uri, status, seconds))


def _finish(run_uri: str, status: str, seconds: float | None) -> None:
    from rpl.metrics import RunOutcome, delete_groups, delete_stale_groups, push_run, run_outcome
    from rpl.report.summary import summary_table
    from rpl.stage import Run, run_exists
    from rpl.workflow import close, outcome_of

    failures = _failures(os.environ.get("RPL_FAILURES", ""))
    for failure in failures:
        click.echo(f"{failure['step']}: {failure['message']}", err=True)
    now = time.time()
    delete_groups(run_uri)  # of its stages; what they say from now on is not news
    delete_stale_groups(STALE_AFTER_S)
    if not run_exists(run_uri):
        push_run(run_uri, RunOutcome(succeeded=status == "Succeeded", finished=now, seconds=seconds))
        click.echo(f"{run_uri}: was never begun; {status}.", err=True)
        return
    run = Run(run_uri)
    try:
        outcome = outcome_of(run, status)
        push_run(run_uri, run_outcome(run, succeeded=outcome == "Succeeded", finished=now, seconds=seconds))
        published = close(run, outcome, status, failures)
        if published["report"]:
            click.echo(summary_table(json.loads(run.store.read("summary.json"))))
            click.echo(f"Report: {run.uri}/{published['report']}")
        click.echo(f"{run.uri}: {status}.")
    finally:
        run.close()


def _failures(text: str) -> list[dict[str, str]]:
    """Step and message of what failed. A text that is not such JSON is one message: nothing may stop this step."""
    try:
        found: Any = json.loads(text or "[]")
        # Argo gives the JSON as a string within JSON.
        found = json.loads(found) if isinstance(found, str) else found
        return [
            {"step": str(each.get("displayName", "?")), "message": str(each.get("message", ""))} for each in found or []
        ]
    except (ValueError, AttributeError, TypeError):
        return [{"step": "workflow", "message": text}]


if __name__ == "__main__":
    main()
