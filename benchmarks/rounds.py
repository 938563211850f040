"""Does learning help, and does the second round keep what the first gained? Three seeds of the demo, side by side.

For example:

    python -m benchmarks.rounds

Prints mean and spread (largest less smallest) of the validation accuracies over the seeds and writes
benchmarks/results/rounds.json. The world is the demo's; each seed draws other crops, views and start vectors.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from rpl.demo.run import demo_config
from rpl.demo.server import WebServer
from rpl.demo.world import build_world
from rpl.demo.world_files import FULL, HOSTS
from rpl.local import create_run, run_all
from rpl.progress import Reporter
from rpl.results import fetch_results

SEEDS = (0, 1, 2)
FOLDER = Path(".bench/rounds")
RESULT = Path(__file__).parent / "results" / "rounds.json"
PROMPTS = ("manual", "best_manual", "ensemble", "learned")


def main() -> None:
    world = FOLDER / "world"
    build_world(world.resolve(), seed=0, scale=FULL)
    summaries = [_run(seed, world.resolve()) for seed in SEEDS]
    rows = _rows(summaries)
    print(f"{'round':>5} {'prompt':<12} {'split':<6} {'mean':>7} {'spread':>7}   seeds {', '.join(map(str, SEEDS))}")
    for row in rows:
        values = "  ".join(f"{value:.4f}" for value in row["values"])
        print(
            f"{row['round']:>5} {row['prompt']:<12} {row['split']:<6} "
            f"{row['mean']:7.4f} {row['spread']:7.4f}   {values}"
        )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"seeds": SEEDS, "accuracy": rows, "rounds": _sourcing(summaries)}, indent=1) + "\n")


def _run(seed: int, world: Path) -> dict[str, Any]:
    folder = (FOLDER / f"seed-{seed}").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    with WebServer(world / "web") as web:
        config = demo_config(world, str(folder), dict.fromkeys(HOSTS, web.address))
        run = create_run(config.model_copy(update={"seed": seed}))
        run_all(run, Reporter(every_s=60))
        summary = fetch_results(run, folder.with_name(f"results-{seed}"))
        run.close()
    print(f"seed {seed} done", file=sys.stderr)
    return summary


def _rows(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for index in range(min(len(summary["rounds"]) for summary in summaries)):
        for prompt in PROMPTS:
            for split in ("base", "novel"):
                values = [summary["rounds"][index]["accuracy"][prompt][split] for summary in summaries]
                rows.append(
                    {
                        "round": index + 1,
                        "prompt": prompt,
                        "split": split,
                        "mean": statistics.mean(values),
                        "spread": max(values) - min(values),
                        "values": values,
                    }
                )
    return rows


def _sourcing(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "seed": seed,
            "round": entry["round"],
            "retrieval_precision": entry["retrieval_precision"],
            "yield": entry["yield"],
        }
        for seed, summary in zip(SEEDS, summaries, strict=True)
        for entry in summary["rounds"]
    ]


if __name__ == "__main__":
    main()
