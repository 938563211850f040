"""A made-up finished run as `ReportData`: plausible numbers, drawn pictures, no stage behind it.

Enough for the page, the summary and the table, which are pure functions of it; that stages commit what `collect`
reads is tested apart, with manifests.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

from rpl.images import encode_jpeg
from rpl.report.model import (
    Accuracy,
    CategoryChange,
    CategorySheet,
    Changes,
    CurvePoint,
    DataCounts,
    Move,
    Picture,
    PromptAccuracy,
    ReportData,
    RoundReport,
    Since,
    Sourcing,
    Split,
    Standing,
)

NAMES = ("apple", "alarm clock", "backpack", "bagel", "bicycle", "candle", "cello", "daisy", "drum", "eyeglasses")
TEMPLATES = ("a photo of {name}", "a photo of a {name}.", "a drawing of a {name}.", "{name}, {description}.")
REFUSALS = {"not_found": 61, "timed_out": 12, "duplicate": 44, "private_address": 3, "not_an_image": 9}


def report_data(
    *, rounds: int = 2, base: int = 6, novel: int = 4, pictures: int = 4, thumbnails: Sequence[bytes] = ()
) -> ReportData:
    """A run of that size; `thumbnails` (JPEG) stand for the pictures where given."""
    rng = random.Random(1)
    thumbnails = thumbnails or [_drawn(i) for i in range(6)]
    sheets = tuple(
        _sheet(rng, row, "novel" if row >= base else "base", pictures, thumbnails) for row in range(base + novel)
    )
    return ReportData(
        uri="s3://bucket/runs/demo",
        encoder={"model": "tiny-clip", "pretrained": "clip.safetensors", "digest": "3f2a" * 16, "dim": 256},
        prompts_digest="9c0d" * 16,
        best_round=rounds,
        data=DataCounts(base, novel, 4120, 1730, {"small": 12, "not_drawn": 830}, 1, 6400, 256, "exact"),
        rounds=tuple(_round(rng, number, base) for number in range(1, rounds + 1)),
        novel=_sourcing(rng, novel, 60),
        sheets=sheets,
        export={"images": 231, "annotations": 231, "categories": novel},
        export_files=(("categories.json", 14681), ("images.tar", 3_145_728), ("sourced_novel.json", 61_234)),
        settings_yaml="seed: 0\nrounds:\n  max_rounds: 2\n",
        attribution="Pictures: OpenMoji (https://openmoji.org), CC BY-SA 4.0.",
        seconds={"crop": 6.21, "encode": 31.5, "index": 0.42, "export": 0.91},
    )


def since(name: str = "apple", url: str = "http://pictures-1.example.org/a/1.jpg") -> Since:
    """What changed since a made-up earlier run; `name` and `url` are of the category and picture that changed most."""
    return Since(
        uri="s3://bucket/runs/demo-1",
        changes=Changes(
            new=31,
            gone=12,
            stayed=1_200,
            moved=7,
            gone_because={"not_found": 8, "not_a_candidate": 3, "moon_phase": 1},
            moves=(Move(name, url, 40, 2), Move("bagel", "http://b.test/2.jpg", 1, 2)),
            categories=(CategoryChange(name, 20, 9, 30, 2), CategoryChange("bagel", 0, 3, 57, 5)),
            categories_changed=9,
        ),
        then=Standing(Accuracy(0.61, 0.58), 0.742, None, 1_212, 1_600),
        now=Standing(Accuracy(0.61, None), 0.75, 0.8, 1_231, 1_600),
        addresses={"reused": 2_105, "asked_again": 310, "revived": 4},
    )


def _round(rng: random.Random, number: int, categories: int) -> RoundReport:
    accuracy = PromptAccuracy(
        learned=Accuracy(0.598 + 0.012 * number, 0.571 + 0.009 * number),
        manual=Accuracy(0.431, 0.412),
        best_manual=Accuracy(0.522, 0.497),
        best_template="a drawing of a {name}.",
        ensemble=Accuracy(0.509, 0.501),
        templates=tuple(
            (template, Accuracy(0.431 + 0.02 * i, 0.412 + 0.02 * i)) for i, template in enumerate(TEMPLATES)
        ),
    )
    curve = tuple(
        CurvePoint(
            passes=passes,
            loss=2.1 + 1.6 * math.exp(-passes / 12) - 0.05 * number,
            accuracy=0.66 - 0.25 * math.exp(-passes / 9),
            holdout_loss=2.22 + 1.5 * math.exp(-passes / 11),
            holdout_accuracy=0.62 - 0.23 * math.exp(-passes / 9) + rng.uniform(-0.006, 0.006),
        )
        for passes in range(1, 66, 2)
    )
    learn = {
        "schedule": "fast", "steps": 33, "text_passes": 65, "loss": 2.11, "crops": 4120,
        "sourced": 0 if number == 1 else 2210,
    }  # fmt: skip
    return RoundReport(number, accuracy, curve, learn, _sourcing(rng, categories, 40))


def _sourcing(rng: random.Random, categories: int, target: int) -> Sourcing:
    kept = int(0.83 * categories * target)
    return Sourcing(
        kept=kept,
        target=categories * target,
        categories=categories,
        categories_full=int(0.6 * categories),
        statuses={"kept": kept, "spare": 190, "refused": 402, "failed": 73, "not_needed": 845},
        refusals={word: number + rng.randrange(5) for word, number in REFUSALS.items()},
        retrieval_precision=0.742,
        purity=0.815,
        seconds={"encode": 11.25, "learn": 3.5, "embed": 2.25, "retrieve": 0.5, "download": 14.75, "curate": 1.5},
    )


def _sheet(rng: random.Random, row: int, split: Split, pictures: int, thumbnails: Sequence[bytes]) -> CategorySheet:
    name = NAMES[row % len(NAMES)] + ("" if row < len(NAMES) else f" {row // len(NAMES) + 1}")
    target = 60 if split == "novel" else 40
    kept = min(target, int(target * rng.uniform(0.1, 1.6)))
    shown = min(pictures, kept)
    return CategorySheet(
        category=row,
        name=name,
        description=f"an everyday object that one would call {name}",
        split=split,
        candidates=150,
        downloaded=kept + 11,
        kept=kept,
        target=target,
        refused={"not_found": 7, "duplicate": rng.randrange(9)},
        pictures=tuple(
            Picture(
                thumbnail=thumbnails[(row * 7 + i) % len(thumbnails)],
                width=112,
                height=84,
                rank=i * 5,
                score=0.38 - 0.006 * i,
                image_score=0.36,
                url=f"http://pictures-{(row + i) % 5}.example.org/a/{row}-{i}.jpg",
                caption=f"line drawing of {name}, nice and large",
            )
            for i in range(shown)
        ),
    )


def _drawn(i: int) -> bytes:
    image = Image.new("RGB", (112, 84), (240 - 20 * i, 200, 90 + 25 * i))
    ImageDraw.Draw(image).ellipse((20, 10, 90, 74), fill=(30 + 30 * i, 60, 120))
    return encode_jpeg(image, 70)
