"""Decide whether another round follows: a step of a workflow between rounds.

For example:

    python -m jobs.decide --run s3://bucket/runs/first --round 1 --outputs /tmp/outputs
"""

from pathlib import Path

import click

from jobs.common import guarded, run_option, write_outputs


@click.command(help="Decide whether another round follows.")
@run_option
@click.option("--round", "number", type=click.IntRange(min=1), required=True, metavar="N", help="The round that ended.")
@click.option("--outputs", type=click.Path(path_type=Path), required=True, help="Folder for go-on: true or false.")
def main(run_uri: str, number: int, outputs: Path) -> None:
    guarded(lambda: _decide(run_uri, number, outputs))


def _decide(run_uri: str, number: int, outputs: Path) -> None:
    from rpl.stage import Run
    from rpl.workflow import another_round

    goes_on = another_round(Run(run_uri), number)
    write_outputs(outputs, {"go-on": "true" if goes_on else "false"})
    click.echo(f"round {number}: {'another round follows' if goes_on else 'the last round'}.", err=True)


if __name__ == "__main__":
    main()
