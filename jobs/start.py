"""Check a configuration and freeze it into a run: the first step of a workflow.

For example:

    python -m jobs.start --run s3://bucket/runs/first --config s3://bucket/configs/first.yaml --outputs /tmp/outputs
"""

from pathlib import Path

import click

from jobs.common import guarded, number_or_none, run_option, write_outputs


@click.command(help="Check a configuration and freeze it into a run.")
@run_option
@click.option("--config", default="", metavar="URI", help="The configuration: s3://BUCKET/PATH.yaml or a file.")
@click.option("--max-rounds", default="", metavar="N", help="Rounds at most. Empty: as configured.")
@click.option("--shards", default="", metavar="N", help="Parts of crops and of downloads. Empty: as configured.")
@click.option(
    "--after", default="", metavar="NAME",
    help="Source again from the newest finished run of NAME and NAME-*, with its configuration and prompts.",
)  # fmt: skip
@click.option(
    "--outputs", type=click.Path(path_type=Path), required=True, help="Folder for crop-shards, download-shards."
)
def main(outputs: Path, **options: str) -> None:
    guarded(lambda: _start(outputs, **options))


def _start(outputs: Path, *, run_uri: str, config: str, max_rounds: str, shards: str, after: str) -> None:
    from rpl.errors import BadInput
    from rpl.workflow import begin, begin_after

    rounds, parts = number_or_none("--max-rounds", max_rounds), number_or_none("--shards", shards)
    if after:
        run = begin_after(run_uri, after)
    elif config:
        run = begin(run_uri, config, max_rounds=rounds, shards=parts)
    else:
        raise BadInput("--config is empty; give the URI of a configuration, as `rpl init` writes one.")
    write_outputs(
        outputs,
        {"crop-shards": str(run.config.shards.crop), "download-shards": str(run.config.shards.download)},
    )
    click.echo(f"{run.uri}: ready.", err=True)


if __name__ == "__main__":
    main()
