"""Stages before `export` with made-up results in the true formats, so that the real `export`, `report` and copying of
results run on a real run. Three base and two novel categories, two rounds, two download shards.

What the real stages write in those formats is tested where they are; test_real_data.py joins the two.
"""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rpl.categories import Category, categories_to_json
from rpl.images import encode_jpeg
from rpl.local import run_all
from rpl.stage import Context, Run
from rpl.tars import write_tar
from tests.fake_stages import QUIET, make_run

CATEGORIES = [
    Category(3, "alarm clock", "a clock that rings", "base"),
    Category(7, "bagel", "a roll with a hole", "novel"),
    Category(8, "cello", "a large string instrument", "base"),
    Category(12, "<script>alert(1)</script>", 'a hostile name & "quotes"', "novel"),
    Category(40, "drum", "an instrument to beat", "base"),
]
ENCODER = {"model": "tiny", "pretrained": "tiny.safetensors", "digest": "ab" * 32, "dim": 8}
ATTRIBUTION = "Pictures by Example, CC BY-SA 4.0 (https://example.org/licence).\n"
REASONS = ("not_found", "duplicate")
KEPT = 3
SHARED_URL = "http://web.test/shared.jpg"


def finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, measured: bool = True) -> Run:
    """A whole run; `measured`: there were validation crops and a truth."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "categories.json").write_bytes(categories_to_json(CATEGORIES))
    (tmp_path / "lists" / "ATTRIBUTION.md").write_text(ATTRIBUTION)
    for name, function in _SCRIPTS.items():
        module = types.ModuleType(f"rpl.stages.{name}")
        module.run = lambda ctx, function=function: function(ctx, measured)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"rpl.stages.{name}", module)
    run = make_run(
        tmp_path / "data",
        str(tmp_path / "runs" / "first"),
        categories={"file": str(tmp_path / "lists" / "categories.json")},
        rounds={"max_rounds": 2},
        shards={"download": 2},
    )
    run_all(run, QUIET)
    return run


def picture(category: int, rank: int, round_: int | str) -> bytes:
    """JPEG of its own colour and size; rank 0 of every category is the same picture in the novel pass."""
    if round_ == "novel" and rank == 0:
        category = 1
    shade = hashlib.sha256(f"{category} {rank}".encode()).digest()
    return encode_jpeg(Image.new("RGB", (80 + 10 * rank, 60 + category), tuple(shade[:3])))


def key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def record(round_: int | str) -> list[dict[str, Any]]:
    """Rows of sourced.parquet: per category `KEPT` kept pictures and one of every other status."""
    split = "novel" if round_ == "novel" else "base"
    rows = []
    for category, about in enumerate(CATEGORIES):
        if about.split != split:
            continue
        statuses = [*["kept"] * KEPT, "refused", "failed", "spare", "not_needed"]
        for rank, status in enumerate(statuses):
            url = SHARED_URL if status == "failed" else f"http://web.test/{about.id}/{rank}.jpg?a=1&b=<2>"
            rows.append(
                {
                    "category": category,
                    "category_id": about.id,
                    "category_name": about.name,
                    "rank": rank,
                    "score": 0.4 - 0.01 * rank,
                    "pool_row": 100 * category + rank,
                    "url": url,
                    "caption": f"a <b>{about.name}</b>\u202e no. {rank}",
                    "status": status,
                    "reason": {"refused": "duplicate", "failed": "not_found"}.get(status),
                    "key": key(picture(category, rank, round_)) if status in ("kept", "spare") else None,
                    "image_score": 0.39 - 0.01 * rank if status in ("kept", "spare") else None,
                }
            )
    return rows


def _crop(ctx: Context, measured: bool) -> None:
    ctx.write("categories.json", categories_to_json(CATEGORIES))
    ctx.facts = {
        "categories": 5, "base": 3, "novel": 2, "crops": {"train": 30, "val": 12 if measured else 0},
        "skipped": {"small": 2}, "base_without_crops": 1,
    }  # fmt: skip


def _encode(ctx: Context, measured: bool) -> None:
    ctx.facts = {"encoder": ENCODER, "images": 30}


def _index(ctx: Context, measured: bool) -> None:
    ctx.facts = {"rows": 6000, "dim": 8, "index": None}


def _learn(ctx: Context, measured: bool) -> None:
    history = [
        {"step": n, "passes": 2 * n, "loss": 3 / n, "accuracy": 0.5 + n / 50, "holdout_loss": None,
         "holdout_accuracy": None}
        for n in range(1, 11)
    ]  # fmt: skip
    ctx.write_json("history.json", history)
    ctx.facts = {
        "encoder": ENCODER, "prompts_digest": "cd" * 32, "schedule": "fast", "steps": 10, "text_passes": 20,
        "loss": 0.3, "crops": 30, "sourced": 0 if ctx.node.round == 1 else 9,
    }  # fmt: skip


def _embed(ctx: Context, measured: bool) -> None:
    number = 2 if ctx.node.round == "novel" else int(ctx.node.round or 0)

    def pair(base: float, novel: float) -> dict[str, float | None]:
        return {"base": base if measured else None, "novel": novel if measured else None}

    path = ctx.scratch / "category_embeddings.npy"
    np.save(path, np.arange(40, dtype=np.float32).reshape(5, 8))
    ctx.add(path)
    ctx.write("category_embeddings.pt", b"copied byte for byte, whatever it holds")
    templates = [("a photo of {name}", 0.4, 0.35), ("a drawing of a {name}.", 0.5, 0.45)]
    ctx.facts = {
        "encoder": ENCODER,
        "prompts_digest": "cd" * 32,
        "accuracy": {
            "manual": pair(0.4, 0.35),
            "learned": pair(round(0.55 + number / 100, 6), round(0.5 + number / 100, 6)),
            "best_manual": {"template": templates[1][0], **pair(0.5, 0.45)},
            "ensemble": pair(0.48, 0.46),
            "templates": [{"template": template, **pair(b, n)} for template, b, n in templates],
        },
    }
    if ctx.node.round == "novel":
        ctx.facts["best_round"] = 2


def _retrieve(ctx: Context, measured: bool) -> None:
    ctx.facts = {"candidates": 7, "unique_urls": 6}


def _download(ctx: Context, measured: bool) -> None:
    samples: dict[str, dict[str, bytes]] = {}
    for row in record(ctx.node.round or 0):
        if row["category"] % ctx.shard.count == ctx.shard.index and row["key"] is not None:
            data = picture(row["category"], row["rank"], ctx.node.round or 0)
            samples[row["key"]] = {"jpg": data, "json": json.dumps({"url": row["url"]}).encode()}
    path = ctx.scratch / "images.tar"
    write_tar(path, sorted(samples.items()))
    ctx.add(path)
    ctx.facts = {"urls": 7, "ok": 4, "by_reason": {}}


def _curate(ctx: Context, measured: bool) -> None:
    rows = record(ctx.node.round or 0)
    path = ctx.scratch / "sourced.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    ctx.add(path)
    categories = sorted({row["category"] for row in rows})
    ctx.write_json(
        "yield.json",
        [
            {
                "category": category, "name": CATEGORIES[category].name, "split": CATEGORIES[category].split,
                "target": 4, "candidates": 7, "downloaded": 5, "kept": KEPT,
                "refused": dict.fromkeys(REASONS, 1),
            }
            for category in categories
        ],
    )  # fmt: skip
    ctx.facts = {
        "kept": KEPT * len(categories), "target": 4 * len(categories), "categories_full": 0, "by_reason": {},
        "retrieval_precision": 0.75 if measured else None, "purity": 0.875 if measured else None,
    }  # fmt: skip


_SCRIPTS = {
    "crop": _crop, "encode": _encode, "index": _index, "learn": _learn, "embed": _embed, "retrieve": _retrieve,
    "download": _download, "curate": _curate,
}  # fmt: skip
