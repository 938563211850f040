"""What learning costs at LVIS size: 866 categories x 200 crops x 6 views, ViT-B/32's text tower, PromptDet's prompts.

    python -m benchmarks.lvis_shape RESULT.json

The whole learning runs for real, on the GPU if there is one. The reference's step is measured singly and its steps are
counted. Weights are random, so this tells costs only; they are drawn so that the tower tells texts apart, and the
views scatter around the features of a hidden context, so that there is something to find. A process of its own,
since peak memory is measured.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference_way import BATCH, EPOCHS, Prompts
from rpl.categories import split_name
from rpl.clip import ClipModel, load_clip
from rpl.config import Clip, Learn
from rpl.learning import Step, Task, hold_out, initial_contexts, learn
from rpl.objective import CachedViews
from rpl.prompt_tokens import tokenise_prompts
from rpl.prompts import PromptBank

PROMPTDET = Path(__file__).resolve().parents[2] / "shared" / "data" / "promptdet"
CROPS, VIEWS = 200, 6
NOISE = 0.09
REFERENCE_PARTS = 8  # one step of the reference holds 16 GB of activations; in parts it fits, and takes as long


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "fp16" if device == "cuda" else "fp32"
    clip = load_clip(Clip(model="ViT-B-32", pretrained=None, precision=precision), device)
    _spread_out(clip)
    names, descriptions = _base_categories()
    tokens = tokenise_prompts(clip, names, descriptions, 1, 1)
    bank = PromptBank(clip.text, tokens)
    views = _views(clip, bank)
    steps = len(views) // BATCH * EPOCHS
    held = torch.from_numpy(hold_out(views.labels.numpy(), Learn().holdout, 0))
    train, holdout = views.select(~held).balanced(1.0), views.select(held).balanced(1.0)
    del views
    starts = initial_contexts(Learn().starts, 2, clip.text.width, 0)
    task = Task(bank, starts, train.to(bank.tower.device), holdout.to(bank.tower.device), clip.logit_scale)

    with FlopCounterMode(display=False) as counter:
        text_CD, pullback = bank.features_and_pullback(starts[0].to(device))
        pullback(text_CD)
    pass_flops = counter.get_total_flops()
    del text_CD, pullback
    started = time.monotonic()
    learned = learn(task, Learn(), 0, _say)
    _wait()
    fast_s = time.monotonic() - started
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else _peak()
    passes = learned.history[-1].passes

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "categories": len(names), "crops": CROPS * len(names), "views": VIEWS, "precision": precision,
        "prompt_tokens": int(tokens.lengths.sum()), "tokens_with_buckets": bank.token_count,
        "fast": {
            "passes": passes, "iterations": learned.history[-1].step, "seconds": fast_s,
            "text_flops": passes * pass_flops, "peak_memory_bytes": memory,
            "loss": [learned.history[0].loss, learned.kept.loss],
        },
    }  # fmt: skip
    if device == "cuda":
        result["fast"]["pass_tflop_per_s"] = _pass_rate(bank, starts[0].to(device), pass_flops)
    result["reference"] = _reference(clip, names, descriptions, steps)
    result["text_flops_ratio"] = result["reference"]["text_flops"] / result["fast"]["text_flops"]
    result["wall_ratio"] = result["reference"]["seconds_counted"] / fast_s
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


def _base_categories() -> tuple[list[str], list[str]]:
    """Names and descriptions of LVIS' 866 base categories, from PromptDet's own files."""
    lines = (PROMPTDET / "lvis_category_and_description.txt").read_text(encoding="utf-8").splitlines()
    base = [int(row) for row in (PROMPTDET / "lvis_base_inds.txt").read_text().split(",")]
    pairs = [split_name(lines[row].split(" ")[-1].strip()) for row in base]
    return [name for name, _ in pairs], [description for _, description in pairs]


def _spread_out(clip: ClipModel) -> None:
    """open_clip starts so small that the tower gives all texts nearly the same feature; trained ones do not."""
    with torch.no_grad():
        for name, value in clip.text._transformer.named_parameters():
            if "in_proj_weight" in name or "c_fc.weight" in name:
                value.mul_(3)
        clip.text._table_VW.mul_(4)


def _views(clip: ClipModel, bank: PromptBank) -> CachedViews:
    hidden = torch.randn((2, clip.text.width), generator=torch.Generator().manual_seed(99)) * 0.1
    text_CD = functional.normalize(bank.features(hidden.to(clip.device)), dim=1).cpu()
    generator = torch.Generator().manual_seed(5)
    features = torch.empty((len(text_CD) * CROPS, VIEWS, text_CD.shape[1]), dtype=torch.float16)
    for category, text_D in enumerate(text_CD):
        scatter = torch.randn((CROPS, VIEWS, len(text_D)), generator=generator) * NOISE
        features[category * CROPS : (category + 1) * CROPS] = functional.normalize(text_D + scatter, dim=2).half()
    labels = torch.arange(len(text_CD)).repeat_interleave(CROPS)
    return CachedViews(features, labels, torch.ones(len(labels)))


def _reference(clip: ClipModel, names: list[str], descriptions: list[str], steps: int) -> dict[str, Any]:
    """One step, by parts of the categories, and the number of steps that there are."""
    model: Any = clip._model.float()
    prompts = Prompts(model, clip._tokeniser, names, descriptions)
    bounds = [round(part * len(names) / REFERENCE_PARTS) for part in range(REFERENCE_PARTS + 1)]
    context = (torch.randn((2, clip.text.width)) * 0.02).to(clip.device).requires_grad_()
    started = time.monotonic()
    with FlopCounterMode(display=False) as counter:
        for start, end in itertools.pairwise(bounds):
            prompts.features(context, slice(start, end)).sum().backward()  # type: ignore[no-untyped-call]
    _wait()
    text_s = time.monotonic() - started
    size = clip.preprocessing.size
    started = time.monotonic()
    clip.encode_images(torch.zeros((BATCH, 3, *size)))
    _wait()
    image_s = time.monotonic() - started
    return {
        "steps": steps, "text_flops": steps * counter.get_total_flops(), "text_seconds_per_step": text_s,
        "image_seconds_per_step": image_s, "seconds_counted": steps * (text_s + image_s),
    }  # fmt: skip


def _pass_rate(bank: PromptBank, context: torch.Tensor, flops: int) -> float:
    """TFLOP/s of text passes, forward and backward."""
    for repeat in range(6):
        if repeat == 1:
            _wait()
            started = time.monotonic()
        text_CD, pullback = bank.features_and_pullback(context)
        pullback(text_CD)
    _wait()
    return 5 * flops / (time.monotonic() - started) / 1e12


def _say(step: Step) -> None:
    print(
        f"  LVIS size: step {step.step}, {step.passes:.1f} passes, loss {step.loss:.4f}, held out "
        f"{step.holdout_loss:.4f}, accuracy {step.holdout_accuracy:.3f}",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
