"""A run's manifests and files → `ReportData`.

Knows the names of the facts, columns and files that stages commit, and nothing of how they are drawn. Opens small
files whole; reads each image tar once at most, for the pictures that go on a contact sheet.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ruamel.yaml import YAML

from rpl.categories import Category, categories_from_json
from rpl.config import RunConfig, attribution_file
from rpl.finished import Finished
from rpl.manifests import Manifest
from rpl.report import since
from rpl.report.model import (
    STATUSES,
    Accuracy,
    CategorySheet,
    CurvePoint,
    DataCounts,
    PromptAccuracy,
    ReportData,
    RoundReport,
    Since,
    Sourcing,
    Standing,
)
from rpl.report.sheets import build_sheets
from rpl.rounds import STAGES, Round
from rpl.store import read_uri, stat_uri

Inputs = Mapping[str, Sequence[Manifest]]
"""Manifests by the edge names of stage `report` in `rpl.rounds`."""

Local = Callable[[Manifest, str], Path]
"""Local copy of a manifest's file, by the file's name."""

ROUND_EDGES = (
    "round_prompts", "round_embeddings", "round_candidates", "round_downloads", "round_web_features",
    "round_sourced",
)  # fmt: skip
NOVEL_EDGES = (
    "novel_embeddings", "novel_candidates", "novel_downloads", "novel_web_features", "novel_sourced",
)  # fmt: skip
ONCE_EDGES = ("crops", "crop_features", "index", "export")

_SHOWN_COLUMNS = ["category", "rank", "score", "image_score", "url", "caption", "key"]


def collect(
    inputs: Inputs, local: Local, config: RunConfig, attribution: str, previous: Finished | None = None
) -> ReportData:
    """Everything the report shows of one finished run, beside the `previous` one if it has one."""
    embedded, exported = inputs["novel_embeddings"][0], inputs["export"][0]
    categories_file = local(inputs["crops"][0], "categories.json")
    categories = categories_from_json(categories_file.read_bytes())
    numbers = sorted(int(manifest.round or 0) for manifest in inputs["round_embeddings"])
    return ReportData(
        uri=config.run,
        encoder=embedded.facts["encoder"],
        prompts_digest=embedded.facts["prompts_digest"],
        best_round=embedded.facts["best_round"],
        data=_data_counts(inputs, categories),
        rounds=tuple(_round(inputs, local, number) for number in numbers),
        novel=_sourcing(inputs, local, NOVEL_EDGES, "novel"),
        sheets=_sheets(inputs, local, categories, numbers[-1], config.download.max_pixels),
        export=exported.facts,
        export_files=tuple((name, exported.files[name].size) for name in sorted(exported.files)),
        settings_yaml=settings_yaml(config),
        attribution=attribution,
        seconds=_seconds(inputs, ONCE_EDGES, None),
        since=None if previous is None else _since(inputs, local, previous),
    )


def read_attribution(config: RunConfig) -> str:
    """The text of `ATTRIBUTION.md` beside the category list: whom the data set's pictures belong to. Empty: none."""
    uri = attribution_file(config)
    return read_uri(uri).decode("utf-8", errors="replace") if uri and stat_uri(uri) else ""


def settings_yaml(config: RunConfig) -> str:
    """The settings that decide what a run makes, as YAML. Where it lives and how fast it runs stay out."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    out = io.StringIO()
    yaml.dump(config.settings(STAGES["report"].sections), out)
    return out.getvalue()


def _data_counts(inputs: Inputs, categories: Sequence[Category]) -> DataCounts:
    crops: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for manifest in inputs["crops"]:
        crops.update(manifest.facts["crops"])
        skipped.update(manifest.facts["skipped"])
    pool = inputs["index"][0].facts
    base = sum(category.split == "base" for category in categories)
    return DataCounts(
        base=base,
        novel=len(categories) - base,
        train_crops=crops["train"],
        val_crops=crops["val"],
        skipped_boxes=dict(sorted(skipped.items())),
        base_without_crops=inputs["crops"][0].facts["base_without_crops"],  # every shard knows it of the whole
        pool_rows=pool["rows"],
        pool_dim=pool["dim"],
        pool_index=pool["index"] or "exact",
    )


def _round(inputs: Inputs, local: Local, number: int) -> RoundReport:
    (learned,) = _of(inputs, "round_prompts", number)
    (embedded,) = _of(inputs, "round_embeddings", number)
    history = json.loads(local(learned, "history.json").read_bytes())
    points = [{name: point.get(name) for name in CurvePoint.__dataclass_fields__} for point in history]
    return RoundReport(
        number=number,
        accuracy=_prompt_accuracy(embedded.facts["accuracy"]),
        curve=tuple(CurvePoint(**point) for point in points),
        learn=learned.facts,
        sourcing=_sourcing(inputs, local, ROUND_EDGES, number),
    )


def _prompt_accuracy(facts: Mapping[str, Any]) -> PromptAccuracy:
    return PromptAccuracy(
        learned=_accuracy(facts["learned"]),
        manual=_accuracy(facts["manual"]),
        best_manual=_accuracy(facts["best_manual"]),
        best_template=facts["best_manual"]["template"],
        ensemble=_accuracy(facts["ensemble"]),
        templates=tuple((entry["template"], _accuracy(entry)) for entry in facts["templates"]),
    )


def _accuracy(facts: Mapping[str, Any]) -> Accuracy:
    return Accuracy(base=facts["base"], novel=facts["novel"])


def _sourcing(inputs: Inputs, local: Local, edges: Iterable[str], number: Round) -> Sourcing:
    (curated,) = _of(inputs, "novel_sourced" if number == "novel" else "round_sourced", number)
    record = pq.read_table(local(curated, "sourced.parquet"), columns=["status", "reason", "url"])
    statuses = Counter(record["status"].to_pylist())
    # A URL that was a candidate of two categories was fetched once, so it counts once.
    refused = {(row["reason"], row["url"]) for row in record.to_pylist() if row["status"] in ("refused", "failed")}
    reasons = Counter(reason for reason, _ in refused)
    return Sourcing(
        kept=curated.facts["kept"],
        target=curated.facts["target"],
        categories=len(json.loads(local(curated, "yield.json").read_bytes())),
        categories_full=curated.facts["categories_full"],
        statuses={status: statuses[status] for status in STATUSES},
        refusals=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        retrieval_precision=curated.facts["retrieval_precision"],
        purity=curated.facts["purity"],
        seconds=_seconds(inputs, edges, number),
    )


def _since(inputs: Inputs, local: Local, previous: Finished) -> Since:
    before = {edge: previous.inputs(edge) for edge in ("novel_embeddings", "novel_sourced")}
    records = [
        pq.read_table(path, columns=since.COLUMNS)
        for path in (
            previous.local(before["novel_sourced"][0], "sourced.parquet"),
            local(inputs["novel_sourced"][0], "sourced.parquet"),
        )
    ]
    downloads = [*inputs["round_downloads"], *inputs["novel_downloads"]]
    return Since(
        uri=previous.run.uri,
        changes=since.compare(*records),
        then=_standing(before),
        now=_standing(inputs),
        addresses=since.addresses(manifest.facts for manifest in downloads),
    )


def _standing(inputs: Inputs) -> Standing:
    curated = inputs["novel_sourced"][0].facts
    return Standing(
        accuracy=_accuracy(inputs["novel_embeddings"][0].facts["accuracy"]["learned"]),
        retrieval_precision=curated["retrieval_precision"],
        purity=curated["purity"],
        kept=curated["kept"],
        target=curated["target"],
    )


def _sheets(
    inputs: Inputs, local: Local, categories: Sequence[Category], last_round: int, max_pixels: int
) -> tuple[CategorySheet, ...]:
    """Sheets of all categories in row order: novel ones as exported, base ones as the last round kept them."""
    curated = _of(inputs, "novel_sourced", "novel") + _of(inputs, "round_sourced", last_round)
    downloaded = _of(inputs, "novel_downloads", "novel") + _of(inputs, "round_downloads", last_round)
    yields: list[dict[str, Any]] = []
    kept: dict[int, list[dict[str, Any]]] = {}
    for manifest in curated:
        yields += json.loads(local(manifest, "yield.json").read_bytes())
        rows = pq.read_table(
            local(manifest, "sourced.parquet"), columns=_SHOWN_COLUMNS, filters=[("status", "=", "kept")]
        ).to_pylist()
        for row in sorted(rows, key=lambda row: (row["category"], row["rank"])):
            kept.setdefault(row["category"], []).append(row)
    return build_sheets(
        sorted(yields, key=lambda entry: entry["category"]),
        {row: category.description for row, category in enumerate(categories)},
        kept,
        (local(manifest, "images.tar") for manifest in downloaded),
        max_pixels,
    )


def _seconds(inputs: Inputs, edges: Iterable[str], number: Round) -> dict[str, float]:
    """Wall seconds by stage, summed over shards, in the order of the graph."""
    spent: Counter[str] = Counter()
    for edge in edges:
        for manifest in _of(inputs, edge, number):
            spent[manifest.stage] += manifest.wall_s  # type: ignore[assignment]
    return {stage: round(spent[stage], 3) for stage in STAGES if stage in spent}


def _of(inputs: Inputs, edge: str, number: Round) -> list[Manifest]:
    return [manifest for manifest in inputs[edge] if manifest.round == number]
