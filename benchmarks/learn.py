"""What does learning a prompt cost, and what is it worth? The research code's way, and ours, on the same crops.

    python -m benchmarks.learn [demo | lvis]

Part 1, on the demo's crops (84 base categories, about 120 each), five seeds: the reference's way (each step encodes 32
images and pads every prompt to 77 tokens), the reference's schedule on cached views, `fast`, and optimisers that
lost to it. Part 2 (`benchmarks.lvis_shape`): costs at LVIS size. Without an argument both are run. Accuracy is top-1
on 14,880 validation crops that no way saw, base among base, novel among novel, and all among all; text FLOPs are
counted by torch, forward and backward. Writes benchmarks/results/learn.json and docs/learning.png.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import reference_way
from benchmarks.optimisers import OPTIMISERS
from rpl.categories import Category, categories_from_json
from rpl.clip import ClipModel, load_clip
from rpl.config import Learn, RunConfig
from rpl.demo.run import demo_config
from rpl.demo.world import build_world
from rpl.demo.world_files import Scale, WebPlan
from rpl.evaluation import accuracy
from rpl.features import FeatureSet
from rpl.learning import Task, hold_out, initial_contexts, learn
from rpl.local import create_run
from rpl.manifests import Shard
from rpl.objective import CachedViews
from rpl.progress import Reporter
from rpl.prompt_tokens import tokenise_prompts
from rpl.prompts import PromptBank
from rpl.rounds import Node
from rpl.stage import Run, run_shard

SEEDS = (0, 1, 2, 3, 4)
VAL_CROPS = 120  # of each category: the standard error of an accuracy is 0.5 points on base crops, 0.7 on novel ones
SCALE = Scale(84, 40, 200, 120, 0, VAL_CROPS, 30, WebPlan(per_category=1, look_alikes=2, off_topic=2, copies=1))
VIEWS = reference_way.EPOCHS
LADDER = (1, 2, 4, 8, 15, 30, 60)  # iterations after which the curve of `fast` is looked at
EVERY = 100  # steps between looks at the reference
BUDGET = 60  # text passes of the optimisers that lost
FOLDER = Path(".bench/learn")
RESULT = Path(__file__).parent / "results" / "learn.json"
PICTURE = Path(__file__).parents[1] / "docs" / "learning.png"

Point = tuple[float, float, float, float]
"""Text FLOPs, accuracy on base categories, on novel ones, on all."""


@dataclass
class Bench:
    """The crops, encoded, and what they are learned with."""

    clip: ClipModel
    categories: list[Category]
    features: FeatureSet
    crop_files: list[Path]
    labels: list[int]
    views: CachedViews
    encode_s: float

    def accuracies(self, context: Tensor) -> tuple[float, float, float]:
        """Of base validation crops, of novel ones, and of all among all categories."""
        every = tokenise_prompts(self.clip, *_texts(self.categories), 1, 1)
        text_CD = PromptBank(self.clip.text, every).features(context).numpy()
        is_base_C = np.array([category.split == "base" for category in self.categories])
        val = np.flatnonzero(self.features.split == "val")
        vectors, labels = self.features.features[val], self.features.category[val]
        found = []
        for among_C in (is_base_C, ~is_base_C, np.ones_like(is_base_C)):
            counted = among_C[labels]
            value = accuracy(vectors[counted], labels[counted], text_CD, among_C)
            assert value is not None
            found.append(value)
        return found[0], found[1], found[2]

    def base_texts(self) -> tuple[list[str], list[str]]:
        return _texts([category for category in self.categories if category.split == "base"])

    def task(self, seed: int, share: float, balance: float) -> Task:
        held = torch.from_numpy(hold_out(self.views.labels.numpy(), share, seed))
        tokens = tokenise_prompts(self.clip, *self.base_texts(), 1, 1)
        return Task(
            PromptBank(self.clip.text, tokens), initial_contexts(Learn().starts, 2, self.clip.text.width, seed),
            self.views.select(~held).balanced(balance),
            self.views.select(held).balanced(balance) if share else None, self.clip.logit_scale,
        )  # fmt: skip


def main() -> None:
    parts = sys.argv[1:] or ["demo", "lvis"]
    if "lvis" in parts:
        FOLDER.mkdir(parents=True, exist_ok=True)
        file = FOLDER / "lvis.json"
        subprocess.run([sys.executable, "-m", "benchmarks.lvis_shape", str(file)], check=True)
        _merge({"lvis_shape": json.loads(file.read_text())})
    if "demo" in parts:
        _merge(_demo_part())
    result = json.loads(RESULT.read_text())
    print(_table(result))
    _draw(result)


def _merge(part: dict[str, Any]) -> None:
    """Into the result of an earlier run, whose other part stays."""
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result | part, indent=1) + "\n")


def _demo_part() -> dict[str, Any]:
    bench = _prepare()
    flops = _flops(bench)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in SEEDS:
        for name, run in (
            ("reference", _reference_way(bench, seed, flops["reference_step"])),
            ("reference_on_cache", _on_cache(bench, seed, flops["pass"])),
            ("fast", _fast(bench, seed, flops["pass"])),
            *((name, _other(bench, seed, name, flops["pass"])) for name in OPTIMISERS),
        ):
            runs.setdefault(name, []).append(run)
            print(
                f"seed {seed}  {name:<36} base {run['base']:.4f}  novel {run['novel']:.4f}  all {run['all']:.4f}  "
                f"{run['text_flops'] / 1e12:9.3f} TFLOP  {run['seconds']:7.1f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    mean = {name: _mean([run["text_flops"] for run in each]) for name, each in runs.items()}
    seconds = {name: _mean([run["seconds"] for run in each]) for name, each in runs.items()}
    return {
        "seeds": SEEDS,
        "data": {
            "base_categories": len(bench.base_texts()[0]), "crops": len(bench.views), "views": VIEWS,
            "encode_seconds": bench.encode_s, "clip": str(bench.clip.identity),
            "device": f"CPU, {torch.get_num_threads()} threads",
        },
        "text_flops_ratio": mean["reference"] / mean["fast"],
        "wall_ratio": seconds["reference"] / seconds["fast"],
        "wall_ratio_with_encoding": seconds["reference"] / (seconds["fast"] + bench.encode_s),
        "accuracy": {name: _spread(runs[name], "base") for name in runs},
        "accuracy_novel": {name: _spread(runs[name], "novel") for name in runs},
        "accuracy_all": {name: _spread(runs[name], "all") for name in runs},
        "text_flops": mean, "seconds": seconds, "runs": runs,
    }  # fmt: skip


def _prepare() -> Bench:
    """The world's scenes cropped and encoded by the stages themselves."""
    world = (FOLDER / "world").resolve()
    build_world(world, seed=0, scale=SCALE)
    config = demo_config(world, str((FOLDER / "run").resolve()), {})
    run = create_run(
        RunConfig.model_validate(
            config.model_dump()
            | {
                "data": config.data.model_dump() | {"crops_per_category": 200, "val_crops_per_category": VAL_CROPS},
                "clip": config.clip.model_dump() | {"views": VIEWS},
            }
        )
    )
    for stage in ("crop", "encode"):
        run_shard(run, Node(stage, None), Shard(), Reporter())
    clip = load_clip(run.config.clip, "cpu")
    categories, features, encode_s = _read(run)
    files = _extract(run)
    rows = np.flatnonzero(features.split == "train")
    place = np.cumsum([category.split == "base" for category in categories]) - 1
    labels = place[features.category[rows]]
    views = CachedViews(torch.from_numpy(features.views(rows)), torch.from_numpy(labels), torch.ones(len(rows)))
    paths = [files / f"{features.keys[row]}.jpg" for row in rows]
    run.close()
    return Bench(clip, categories, features, paths, labels.tolist(), views, encode_s)


def _read(run: Run) -> tuple[list[Category], FeatureSet, float]:
    (crops,) = run.manifests(Node("crop", None)) or []
    (encoded,) = run.manifests(Node("encode", None)) or []
    names = ("features.npy", "features.parquet", "views.npy")
    features = FeatureSet(*([run.local(encoded.files[name])] for name in names))
    return categories_from_json(run.local(crops.files["categories.json"]).read_bytes()), features, encoded.wall_s


def _extract(run: Run) -> Path:
    """The crops as files, as the reference keeps them."""
    (crops,) = run.manifests(Node("crop", None)) or []
    folder = FOLDER / "crops"
    with tarfile.open(run.local(crops.files["crops.tar"])) as tar:
        tar.extractall(folder, filter="data")
    return folder


def _flops(bench: Bench) -> dict[str, float]:
    task = bench.task(0, 0.1, 1.0)
    with FlopCounterMode(display=False) as counter:
        text_CD, pullback = task.bank.features_and_pullback(task.starts[0])
        pullback(text_CD)
    own = counter.get_total_flops()
    prompts = reference_way.Prompts(bench.clip._model, bench.clip._tokeniser, *bench.base_texts())
    context = task.starts[0].clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        prompts.features(context).sum().backward()  # type: ignore[no-untyped-call]
    return {"pass": float(own), "reference_step": float(counter.get_total_flops())}


def _reference_way(bench: Bench, seed: int, step_flops: float) -> dict[str, Any]:
    how = bench.clip.preprocessing
    crops = reference_way.Crops(bench.crop_files, bench.labels, how.size[0], how.mean, how.std)
    prompts = reference_way.Prompts(bench.clip._model, bench.clip._tokeniser, *bench.base_texts())
    contexts: list[tuple[int, Tensor]] = []

    def note(step: int, context: Tensor) -> None:
        if step % EVERY == 0:
            contexts.append((step, context.clone()))

    started = time.monotonic()
    context, steps = reference_way.learn(bench.clip._model, prompts, crops, seed, note, workers=1)
    seconds = time.monotonic() - started
    curve = [(step * step_flops, *bench.accuracies(at)) for step, at in contexts]
    return _run(bench, context, steps * step_flops, seconds, curve)


def _on_cache(bench: Bench, seed: int, pass_flops: float) -> dict[str, Any]:
    task = bench.task(seed, 0.0, 0.0)
    started = time.monotonic()
    learned = learn(task, Learn(schedule="reference"), seed, lambda _: None)
    return _run(bench, learned.context, learned.history[-1].passes * pass_flops, time.monotonic() - started)


def _fast(bench: Bench, seed: int, pass_flops: float) -> dict[str, Any]:
    task = bench.task(seed, Learn().holdout, Learn().balance)
    started = time.monotonic()
    learned = learn(task, Learn(), seed, lambda _: None)
    seconds = time.monotonic() - started
    curve = []
    for iterations in LADDER:
        part = learn(task, Learn(max_iterations=iterations), seed, lambda _: None)
        curve.append((part.history[-1].passes * pass_flops, *bench.accuracies(part.context)))
    return _run(bench, learned.context, learned.history[-1].passes * pass_flops, seconds, curve)


def _other(bench: Bench, seed: int, name: str, pass_flops: float) -> dict[str, Any]:
    task = bench.task(seed, 0.0, Learn().balance)
    started = time.monotonic()
    context = OPTIMISERS[name](task, BUDGET, seed)
    return _run(bench, context, BUDGET * pass_flops, time.monotonic() - started)


def _run(
    bench: Bench, context: Tensor, text_flops: float, seconds: float, curve: Sequence[Point] = ()
) -> dict[str, Any]:
    base, novel, every = bench.accuracies(context)
    return {
        "base": base, "novel": novel, "all": every,
        "text_flops": text_flops, "seconds": seconds, "curve": list(curve),
    }  # fmt: skip


def _texts(categories: Sequence[Category]) -> tuple[list[str], list[str]]:
    return [each.name for each in categories], [each.description for each in categories]


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values)


def _spread(runs: Sequence[dict[str, Any]], split: str) -> dict[str, float]:
    values = [run[split] for run in runs]
    return {"mean": statistics.mean(values), "std": statistics.stdev(values)}


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'':<36}{'base':>16}{'novel':>16}{'all':>16}{'text TFLOP':>12}{'seconds':>9}"]
    for name in result["runs"]:
        spreads = [result[f"accuracy{of}"][name] for of in ("", "_novel", "_all")]
        accuracies = "".join(f"{each['mean']:9.4f} ±{each['std']:.4f}" for each in spreads)
        flops, seconds = result["text_flops"][name] / 1e12, result["seconds"][name]
        lines.append(f"{name:<36}{accuracies}{flops:12.3f}{seconds:9.1f}")
    lines.append(
        f"reference / fast: {result['text_flops_ratio']:.0f} times the text FLOPs, {result['wall_ratio']:.0f} times "
        f"the seconds ({result['wall_ratio_with_encoding']:.1f} with the encoding of the views)"
    )
    lvis = result["lvis_shape"]
    fast, reference = lvis["fast"], lvis["reference"]
    lines.append(
        f"LVIS size, {lvis['device']}: {fast['passes']:.1f} text passes, {fast['seconds']:,.0f} s, peak memory "
        f"{fast['peak_memory_bytes'] / 2**30:.1f} GiB; reference {reference['steps']:,} steps, counted "
        f"{reference['seconds_counted'] / 86400:,.1f} days; text FLOPs / {lvis['text_flops_ratio']:,.0f}, "
        f"seconds / {lvis['wall_ratio']:,.0f}"
    )
    return "\n".join(lines)


def _draw(result: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    colours = {"reference": "#5b6470", "fast": "#1f5aa6"}
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, split, place in ((axes[0], "base", 1), (axes[1], "novel", 2)):
        for name, colour in colours.items():
            for run in result["runs"][name]:
                flops = [point[0] for point in run["curve"]]
                axis.plot(flops, [point[place] for point in run["curve"]], color=colour, lw=1.6, marker=".", ms=4)
        axis.text(0.22, 0.3, "fast", color=colours["fast"], transform=axis.transAxes)
        axis.text(0.66, 0.3, "research code", color=colours["reference"], transform=axis.transAxes)
        axis.set_xscale("log")
        axis.set_title(f"{split} categories, {len(SEEDS)} seeds", loc="left", fontsize=11)
        axis.set_xlabel("text FLOPs")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("top-1 accuracy on validation crops")
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
