"""Stage `embed`: embeddings of all categories by the learned prompt and by hand-written ones, and their accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rpl.categories import Category, categories_from_json
from rpl.clip import ClipModel, device_name, load_clip
from rpl.encoder import Encoder, check_same
from rpl.evaluation import accuracy
from rpl.features import FeatureSet
from rpl.manifests import Manifest, base_accuracy
from rpl.prompt_files import Prompts, read_prompts
from rpl.prompt_tokens import fill_template, tokenise_prompts
from rpl.prompts import PromptBank
from rpl.stage import Context

Floats = npt.NDArray[np.float32]
PROTOCOL = "base among base, novel among novel"


def run(ctx: Context) -> None:
    clip = load_clip(ctx.config.clip, device_name(ctx.config.runtime.device))
    learned_in = _best_round(ctx)
    prompts = read_prompts(ctx.local(learned_in, "prompts.safetensors"))
    _check_encoders(ctx, clip.identity, prompts)
    categories = categories_from_json(ctx.local(ctx.inputs["crops"][0], "categories.json").read_bytes())
    templates = ctx.config.evaluate.templates

    with ctx.progress(len(templates) + 1, "prompts") as progress:
        learned_CD = _learned(clip, prompts, categories)
        progress.update()
        manual_TCD = np.empty((len(templates), *learned_CD.shape), np.float32)
        for row, template in enumerate(templates):
            texts = [fill_template(template, each.name, each.description) for each in categories]
            manual_TCD[row] = clip.encode_texts(texts).cpu().numpy()
            progress.update()

    measured = _accuracy(ctx, categories, learned_CD, manual_TCD)
    ctx.write_json("accuracy.json", measured)
    _write(ctx, learned_CD, manual_TCD)
    ctx.rows = len(categories)
    ctx.facts = {
        "encoder": clip.identity.to_facts(),
        "prompts_digest": learned_in.facts["prompts_digest"],
        "accuracy": measured,
    }
    if ctx.node.round == "novel":
        ctx.facts["best_round"] = learned_in.round
        for name in ("prompts.safetensors", "model.pth.tar"):  # to be handed over with what they embedded
            if name in learned_in.files:
                ctx.add(ctx.local(learned_in, name), name)


def _best_round(ctx: Context) -> Manifest:
    """The learn manifest to embed with: this round's, or in the novel pass that of the round with the best prompts.

    Best is by the accuracy that rounds go on by; the earliest of equals, and the last where nothing was measured.
    """
    learned = ctx.inputs["prompts"]
    if ctx.node.round != "novel":
        return learned[0]
    accuracies = [base_accuracy(manifest) for manifest in ctx.inputs["round_embeddings"]]
    measured = [value for value in accuracies if value is not None]
    return learned[accuracies.index(max(measured))] if measured else learned[-1]


def _check_encoders(ctx: Context, encoder: Encoder, prompts: Prompts) -> None:
    for manifest in ctx.inputs["crop_features"]:
        found = Encoder.from_facts(manifest.facts["encoder"])
        check_same(encoder, found, f"{ctx.node.path}: the crops were encoded", "run encode again")
    check_same(encoder, prompts.encoder, f"{ctx.node.path}: the prompts were learned", "run learn again")


def _learned(clip: ClipModel, prompts: Prompts, categories: list[Category]) -> Floats:
    names, descriptions = [each.name for each in categories], [each.description for each in categories]
    counts = prompts.ctx1.shape[-2], prompts.ctx2.shape[-2]
    tokens = tokenise_prompts(clip, names, descriptions, *counts, layouts=prompts.layouts)
    context = prompts.context_for(names).to(clip.device)
    features_CD: Floats = PromptBank(clip.text, tokens).features(context).cpu().numpy()
    return features_CD


def _accuracy(ctx: Context, categories: list[Category], learned_CD: Floats, manual_TCD: Floats) -> dict[str, Any]:
    """Accuracies on the validation crops, as fractions of six digits; None where there is no crop."""
    names = ("features.npy", "features.parquet", "views.npy")
    crops = FeatureSet(*(ctx.input_files("crop_features", name) for name in names))
    val = np.flatnonzero(crops.split == "val")
    features_ND, labels_N = crops.features[val], crops.category[val]
    base_C = np.array([category.split == "base" for category in categories])

    def among(text_CD: Floats, competing_C: npt.NDArray[np.bool_], counted_C: npt.NDArray[np.bool_]) -> float | None:
        counted = counted_C[labels_N]
        fraction = accuracy(features_ND[counted], labels_N[counted], text_CD, competing_C)
        return None if fraction is None else round(fraction, 6)

    def own(text_CD: Floats) -> dict[str, float | None]:
        return {"base": among(text_CD, base_C, base_C), "novel": among(text_CD, ~base_C, ~base_C)}

    def all_(text_CD: Floats) -> dict[str, float | None]:
        every_C = np.ones_like(base_C)
        return {"base": among(text_CD, every_C, base_C), "novel": among(text_CD, every_C, ~base_C)}

    unit_TCD = manual_TCD / np.linalg.norm(manual_TCD, axis=2, keepdims=True)
    by_template: list[dict[str, Any]] = [
        {"template": template, **own(text_CD)}
        for template, text_CD in zip(ctx.config.evaluate.templates, manual_TCD, strict=True)
    ]
    return {
        "protocol": PROTOCOL,
        "manual": own(manual_TCD[0]),
        "learned": own(learned_CD),
        "best_manual": max(by_template, key=lambda each: each["base"] or 0.0),
        "ensemble": own(unit_TCD.mean(0)),
        "templates": by_template,
        "learned_among_all": all_(learned_CD),
        "manual_among_all": all_(manual_TCD[0]),
    }


def _write(ctx: Context, learned_CD: Floats, manual_TCD: Floats) -> None:
    for name, array in (("category_embeddings", learned_CD), ("manual_embeddings", manual_TCD)):
        np.save(ctx.scratch / f"{name}.npy", array)
        ctx.add(ctx.scratch / f"{name}.npy")
    # As the reference writes it: one tensor, not normalised.
    torch.save(torch.from_numpy(learned_CD), ctx.scratch / "category_embeddings.pt")
    ctx.add(ctx.scratch / "category_embeddings.pt")
