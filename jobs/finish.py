"""Publish how a run ended, whatever happened: the last step of a workflow.

For example:

    python -m jobs.finish --run s3://bucket/runs/first --status Succeeded

Failures come as JSON in the variable RPL_FAILURES, as Argo's `workflow.failures` has them.
"""

import json
import os
from typing import Any

import click

from jobs.common import guarded, run_option


@click.command(help="Publish how a run ended, whatever happened.")
@run_option
@click.option("--status", required=True, help="The workflow's word: Succeeded, Failed or Error.")
def main(run_uri: str, status: str) -> None:
    guarded(lambda: _finish(run_uri, status))


def _finish(run_uri: str, status: str) -> None:
    from rpl.report.summary import summary_table
    from rpl.stage import Run
    from rpl.workflow import close, exists

    failures = _failures(os.environ.get("RPL_FAILURES", ""))
    for failure in failures:
        click.echo(f"{failure['step']}: {failure['message']}", err=True)
    if not exists(run_uri):
        click.echo(f"{run_uri}: was never begun; {status}.", err=True)
        return
    run = Run(run_uri)
    try:
        published = close(run, status, failures)
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
