"""Trains the demo's small CLIP: `python -m rpl.demo.clip.train --out FOLDER` (about 9 minutes on 2 idle cores).

Writes FOLDER/weights.safetensors (fp16), which open_clip loads into the model of model.json. Pictures and
captions come from pictures.py; the objective is CLIP's (Radford et al. 2021, section 2.3): symmetric
cross-entropy over the B x B similarities of a batch, with a learned temperature.

B pictures or captions, T tokens, D dimension of the shared space.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from rpl.clip import import_open_clip
from rpl.demo.clip.muon import Muon
from rpl.demo.clip.pictures import PictureSource
from rpl.demo.sprites import demo_categories, vocabulary

HERE = Path(__file__).parent
MAX_TOKENS = 32
WARM_UP_STEPS = 40


@dataclass(frozen=True)
class Rates:
    """Peak learning rates: Muon on either tower's matrices, AdamW on the rest."""

    image: float = 0.06
    text: float = 0.03
    other: float = 3e-3


def build_model(seed: int) -> Any:
    """The model of model.json, freshly initialised. An open_clip CLIP, whose attributes torch's types do not know."""
    open_clip = import_open_clip()
    torch.manual_seed(seed)
    model = open_clip.CLIP(**json.loads((HERE / "model.json").read_text(encoding="utf-8")))
    with torch.no_grad():
        # Most of the 49,408 tokens never occur: random signs keep them apart, and compress well in git.
        table = model.token_embedding.weight
        table.copy_(torch.where(torch.rand(table.shape) < 0.5, -0.02, 0.02))
        model.positional_embedding[MAX_TOKENS:] = 0
    return model.to(memory_format=torch.channels_last)


def encode_text(model: Any, tokens_BT: Tensor) -> Tensor:
    """[B, D] normalised; the model's own text tower, cut to the T tokens that are there."""
    length = tokens_BT.shape[1]
    x = model.token_embedding(tokens_BT) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(x)), tokens_BT.argmax(-1)]
    return functional.normalize(x @ model.text_projection, dim=-1)


def contrastive_loss(image_BD: Tensor, text_BD: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image_BD @ text_BD.T
    target = torch.arange(len(logits))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def make_optimisers(model: nn.Module, classifier: nn.Linear, rates: Rates) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the towers, AdamW for all else.

    The temperature learns faster than the rest: at its own pace it never grows in so short a training.
    """
    named = [(name, p) for name, p in model.named_parameters() if name != "logit_scale"]
    inner = {name for name, p in named if p.ndim >= 2 and "embedding" not in name and name != "text_projection"}
    image = [p for name, p in named if name in inner and name.startswith("visual.")]
    text = [p for name, p in named if name in inner and not name.startswith("visual.")]
    other = [p for name, p in named if name not in inner]
    return [
        Muon([{"params": image, "peak": rates.image}, {"params": text, "peak": rates.text}], lr=0.0),
        torch.optim.AdamW(
            [
                {"params": [*other, *classifier.parameters()], "peak": rates.other},
                {"params": [model.logit_scale], "peak": 3 * rates.other},
            ],
            lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=0.0,
        ),
    ]


def classifier_share(step: int, steps: int) -> float:
    return max(0.0, 1.0 - step / (0.6 * steps))


def pace(step: int, steps: int) -> float:
    """The part of the peak learning rate: a short warm-up, then straight down."""
    return min((step + 1) / WARM_UP_STEPS, (steps - step) / (steps - WARM_UP_STEPS))


def save(model: nn.Module, path: Path) -> None:
    """Atomic, so that a reader never meets half a file."""
    tensors = {name: (t.half() if t.is_floating_point() else t).contiguous() for name, t in model.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def train(
    out: Path,
    *,
    steps: int,
    batch: int,
    rates: Rates,
    seed: int,
    report: Callable[[str], None],
    save_every: int = 250,
) -> None:
    """Runs the whole training; `report` receives a line of progress every 25 steps."""
    out.mkdir(parents=True, exist_ok=True)
    model = build_model(seed)
    tokenise = import_open_clip().SimpleTokenizer(context_length=MAX_TOKENS)
    familiar = {category.emoji for category in demo_categories()}
    source = PictureSource(vocabulary(), familiar, size=model.visual.image_size, seed=seed)
    # Helps only at first, when captions are still noise to the text tower, and is thrown away.
    classifier = nn.Linear(model.text_projection.shape[1], len(source.things))
    optimisers = make_optimisers(model, classifier, rates)
    started, mean_loss = time.monotonic(), math.nan
    for step in range(steps):
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = group["peak"] * pace(step, steps)
        data = source.batch(step, batch, difficulty=min(1.0, step / (0.35 * steps)))
        tokens = tokenise(data.captions)
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        features = model.visual(data.pictures.to(memory_format=torch.channels_last))
        contrast = contrastive_loss(
            functional.normalize(features, dim=-1), encode_text(model, tokens), model.logit_scale.exp()
        )
        loss = contrast + classifier_share(step, steps) * functional.cross_entropy(classifier(features), data.things)
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimiser in optimisers:
            optimiser.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        mean_loss = contrast.item() if step == 0 else 0.95 * mean_loss + 0.05 * contrast.item()
        if (step + 1) % 25 == 0:
            report(
                f"step {step + 1}/{steps}  loss {mean_loss:.3f}  scale {model.logit_scale.exp().item():.1f}"
                f"  {(step + 1) * batch / (time.monotonic() - started):.0f} pictures/s"
            )
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save(model, out / "weights.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights.safetensors")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(
        args.out,
        steps=args.steps,
        batch=args.batch,
        rates=Rates(),
        seed=args.seed,
        report=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
