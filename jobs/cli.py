"""The command `rpl`: what a person types. Stages as containers run them are `python -m jobs.STAGE`.

For example:

    rpl init my.yaml && rpl run --config my.yaml && rpl status runs/first && rpl fetch runs/first results
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.common import guarded
from rpl import __version__

if TYPE_CHECKING:
    from rpl.stage import Run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rpl")
def main() -> None:
    """Source training images by learned prompts (PromptDet's regional prompt learning)."""


@main.command()
@click.argument("file", type=click.Path(path_type=Path), default=Path("rpl.yaml"))
def init(file: Path) -> None:
    """Write a commented configuration to FILE (rpl.yaml)."""
    guarded(lambda: _init(file))


@main.command()
@click.option("--config", "file", type=click.Path(path_type=Path), required=True, help="The run's configuration.")
def run(file: Path) -> None:
    """Run all stages that are not done yet, on this machine."""
    guarded(lambda: _run(file))


@main.command()
@click.argument("run_uri", metavar="RUN")
@click.argument("new_uri", metavar="NEW_RUN")
def again(run_uri: str, new_uri: str) -> None:
    """Source again from the finished RUN into NEW_RUN, with its prompts and what it judged."""
    guarded(lambda: _again(run_uri, new_uri))


@main.command()
@click.argument("run_uri", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(run_uri: str, as_json: bool) -> None:
    """Show what is done in RUN."""
    guarded(lambda: _status(run_uri, as_json))


@main.command()
@click.argument("run_uri", metavar="RUN")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def fetch(run_uri: str, directory: Path) -> None:
    """Copy the results of RUN into DIR: summary.json, report/ and export/ with its images."""
    guarded(lambda: _fetch(run_uri, directory))


@main.command()
@click.argument("run_uri", metavar="RUN")
@click.option("--older-than-hours", type=click.FloatRange(min=0), default=24.0, show_default=True)
def gc(run_uri: str, older_than_hours: float) -> None:
    """Delete the files of attempts that were killed before they committed."""
    guarded(lambda: _gc(run_uri, older_than_hours))


@main.command()
def schema() -> None:
    """Print the JSON schema of the configuration."""
    guarded(_schema)


@main.command()
@click.option(
    "--directory", type=click.Path(path_type=Path), default=Path(".demo"), show_default=True,
    help="Where the demo keeps its world and its S3 server's data.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("demo-output"), show_default=True,
    help="Where the results are copied to.",
)  # fmt: skip
@click.option("--fresh", is_flag=True, help="Start over instead of going on.")
def demo(directory: Path, output: Path, fresh: bool) -> None:
    """Run the whole pipeline on a small world, on an S3 server and a web server of its own."""
    guarded(lambda: _demo(directory, output, fresh))


def _init(file: Path) -> None:
    from rpl.config import template
    from rpl.errors import BadInput

    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(template())
    except FileExistsError:
        raise BadInput(f"{file}: exists already; choose another name or delete it.") from None
    except OSError as error:
        raise BadInput(f"{file}: cannot be written ({error.strerror}); choose another place.") from error
    click.echo(f"Wrote {file}. Edit the places in it, then: rpl run --config {file}")


def _run(file: Path) -> None:
    from rpl.config import load_config
    from rpl.local import create_run

    _run_all(create_run(load_config(file)))


def _again(run_uri: str, new_uri: str) -> None:
    from rpl.again import create_run_after
    from rpl.stage import Run

    _run_all(create_run_after(Run(run_uri), new_uri))


def _run_all(run: Run) -> None:
    from rpl.local import run_all
    from rpl.progress import Reporter

    try:
        run_all(run, Reporter())
    finally:
        run.close()
    click.echo(f"Done. To copy the results: rpl fetch {run.uri} DIR")


def _status(run_uri: str, as_json: bool) -> None:
    from rpl.local import status as run_status
    from rpl.stage import Run

    rows = run_status(Run(run_uri))
    if as_json:
        click.echo(
            json.dumps(
                [
                    {"node": r.node.path, "done": r.done, "shards": r.shards, "seconds": r.wall_s, "rows": r.rows}
                    for r in rows
                ]
            )
        )
        return
    click.echo(f"{'stage':<20} {'done':>9} {'rows':>9} {'seconds':>9}")
    for row in rows:
        done = f"{row.done}/{row.shards}"
        seconds = f"{row.wall_s:.1f}" if row.done else ""
        click.echo(f"{row.node.path:<20} {done:>9} {row.rows if row.done else '':>9} {seconds:>9}")


def _fetch(run_uri: str, directory: Path) -> None:
    from rpl.results import fetch_results
    from rpl.stage import Run

    found = Run(run_uri)
    try:
        fetch_results(found, directory)
    finally:
        found.close()
    click.echo(f"Copied to {directory}; open {directory / 'report' / 'index.html'}")


def _gc(run_uri: str, older_than_hours: float) -> None:
    from rpl.stage import Run, collect_garbage

    deleted = collect_garbage(Run(run_uri), older_than_hours * 3600)
    click.echo(f"Deleted {len(deleted)} files of unfinished attempts.")


def _schema() -> None:
    from rpl.config import json_schema

    click.echo(json.dumps(json_schema(), indent=1))


def _demo(directory: Path, output: Path, fresh: bool) -> None:
    from rpl.demo.run import run_demo

    run_demo(directory, output, fresh=fresh)


if __name__ == "__main__":
    main()
