"""The demo from end to end: its world, its S3 server, its web server, one run of two rounds, the results copied out.

Everything it starts listens on loopback and ends with it. What it made before, it finds again.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from rpl.config import RunConfig
from rpl.demo.s3 import S3Server
from rpl.demo.server import WebServer
from rpl.demo.templates import TEMPLATES
from rpl.demo.world_files import CLIP_FOLDER, CLIP_MODEL, CLIP_WEIGHTS, FULL, HOSTS, Scale, find_world, identity
from rpl.errors import BadInput
from rpl.local import create_run, run_all
from rpl.progress import Reporter
from rpl.results import fetch_results, summary_table

MARKER = "made-by-rpl-demo"
BUCKET = "rpl-demo"
SEED = 0


def run_demo(directory: Path, output: Path, *, fresh: bool, scale: Scale = FULL) -> None:
    """Build what is missing in `directory`, run, copy the results to `output`, print the table of results.

    Raises:
        BadInput: `directory` holds something that the demo did not make.
    """
    directory, output = directory.resolve(), output.resolve()
    reporter = Reporter()
    _prepare(directory, fresh=fresh)
    world = directory / "world"
    _ensure_world(world, scale, reporter)
    with ExitStack() as servers:
        s3 = servers.enter_context(S3Server(directory / "s3", bucket=BUCKET))
        os.environ.update(s3.environment())
        web = servers.enter_context(WebServer(world / "web"))
        config = demo_config(world, f"s3://{BUCKET}/runs/demo", dict.fromkeys(HOSTS, web.address))
        run = create_run(config)
        try:
            run_all(run, reporter)
            summary = fetch_results(run, output)
        finally:
            run.close()
    sys.stdout.write(summary_table(summary) + f"\nReport: {output / 'report' / 'index.html'}\n")


def demo_config(world: Path | str, run: str, resolve: dict[str, str], clip: Path | str = CLIP_FOLDER) -> RunConfig:
    """The demo's settings: smaller numbers of pictures than the defaults, two rounds, the small CLIP of this package.

    Args:
        world: folder that `build_world` filled, or the URI of a copy of it.
        run: URI of the run.
        resolve: the demo's host names and the address of the server that answers for them.
        clip: folder of the small CLIP, or the URI of a copy of it.
    """
    settings = {
        "run": run,
        "data": {
            "train": {"annotations": f"{world}/train/annotations.json", "images": f"{world}/train/images"},
            "val": {"annotations": f"{world}/val/annotations.json", "images": f"{world}/val/images"},
            # The small CLIP sees 64 pixels: with the default of 1.0 an object would be 21 of them wide.
            "scaling_factor": 0.3,
            "crops_per_category": 40,
        },
        "categories": {"file": f"{world}/categories.json"},
        "pool": {"vectors": f"{world}/pool", "truth": f"{world}/pool/truth.parquet"},
        "clip": {
            "model": f"{clip}/{CLIP_MODEL.name}",
            "pretrained": f"{clip}/{CLIP_WEIGHTS.name}",
            "views": 4,
        },
        "rounds": {
            "max_rounds": 2,
            "candidates": {"base": 60, "novel": 90},
            "kept": {"base": 30, "novel": 40},
        },
        "download": {"timeout_s": 3, "retries": 1},
        # Drawings of different things are nearer to each other than photographs are: at 4 bits eight pairs of them
        # pass for copies, at 2 bits one does.
        "curate": {"phash_distance": 2},
        "evaluate": {"templates": list(TEMPLATES)},
        "runtime": {"resolve": resolve},
    }
    return RunConfig.model_validate(settings)


def _ensure_world(directory: Path, scale: Scale, reporter: Reporter) -> None:
    if find_world(directory, identity(SEED, scale, (CLIP_MODEL, CLIP_WEIGHTS))) is not None:
        reporter.say(f"{'world':<24} already drawn")
        return
    from rpl.demo.world import build_world  # draws with torch, which a demo that is done does not need

    with reporter.stage("world", None, "pictures") as progress:
        build_world(directory, seed=SEED, scale=scale, progress=progress)
    reporter.say(f"{'world':<24} drawn: scenes, web pictures and their embeddings")


def _prepare(directory: Path, *, fresh: bool) -> None:
    marker = directory / MARKER
    if directory.exists() and any(directory.iterdir()) and not marker.exists():
        raise BadInput(f"{directory}: holds files that the demo did not make; choose another --directory.")
    if fresh and directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    marker.touch()
