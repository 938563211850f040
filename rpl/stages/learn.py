"""Stage `learn`: the context vectors of one round, from crops and the round before's pictures. See `rpl.learning`."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rpl.categories import Category, categories_from_json
from rpl.clip import ClipModel, device_name, load_clip, reproducible
from rpl.encoder import Encoder, check_same
from rpl.errors import BadInput, TryAgain
from rpl.features import FeatureSet
from rpl.learning import FileJournal, Learned, Step, Task, hold_out, initial_contexts, learn, step_limit
from rpl.objective import CachedViews
from rpl.progress import Progress
from rpl.prompt_files import (
    Prompts,
    read_prompts,
    read_reference_checkpoint,
    write_prompts,
    write_reference_checkpoint,
)
from rpl.prompt_tokens import tokenise_prompts
from rpl.prompts import PromptBank
from rpl.ranks import Ranks, joined
from rpl.stage import Context
from rpl.store import local_copy

# Class-specific vectors by the reference's schedule would fill more than that with gradients; they go without.
_JOURNAL_BYTES = 4 * 2**30


def run(ctx: Context) -> None:
    with joined() as ranks:
        _run(ctx, ranks)


def _run(ctx: Context, ranks: Ranks) -> None:
    settings, seed = ctx.config.learn, ctx.config.seed
    clip = load_clip(ctx.config.clip, device_name(ctx.config.runtime.device))
    _check_encoders(ctx, clip.identity)
    categories_file = ctx.local(ctx.inputs["crops"][0], "categories.json")
    categories = categories_from_json(categories_file.read_bytes())
    crops = _crops(ctx, categories)
    sourced = _sourced(ctx, categories)

    pictures = _joined(crops, sourced)
    held = torch.from_numpy(hold_out(pictures.labels.numpy(), settings.holdout, seed))
    train = pictures.select(~held)
    holdout = pictures.select(held) if bool(held.any()) else None
    base = [category for category in categories if category.split == "base"]
    task = _task(ctx, clip, base, train, holdout, ranks=ranks)
    with (
        reproducible(),
        FileJournal(ctx.checkpoints(), ctx.save_checkpoint) as journal,
        ctx.progress(steps := step_limit(task, settings, seed), "steps") as progress,
    ):
        _check_agreement(ranks, journal)
        is_kept = steps * task.starts[0].nbytes <= _JOURNAL_BYTES
        learned = learn(task, settings, seed, lambda step: _show(step, progress), journal if is_kept else None)
    _write(ctx, clip, learned, [category.name for category in base])
    ctx.rows = len(train)
    ctx.facts |= {"crops": len(crops), "sourced": 0 if sourced is None else len(sourced)}


def _show(step: Step, progress: Progress) -> None:
    progress.note(loss=step.loss)
    progress.update(int(step.step > 0))  # step 0 is a start


def _check_agreement(ranks: Ranks, journal: FileJournal) -> None:
    """All ranks must go on from the same place, or they would wait for each other in different passes."""
    if ranks.agreed(len(journal)) != len(journal):
        raise TryAgain("learning: the ranks found different checkpoints, since another attempt is at work; try again.")


def _check_encoders(ctx: Context, encoder: Encoder) -> None:
    for edge, what in (("crop_features", "crops"), ("previous_web_features", "web pictures")):
        for manifest in ctx.inputs[edge]:
            found = Encoder.from_facts(manifest.facts["encoder"])
            check_same(encoder, found, f"{ctx.node.path}: the {what} were encoded", "run encode again")


def _crops(ctx: Context, categories: list[Category]) -> CachedViews:
    features = _feature_set(ctx, "crop_features")
    rows = np.flatnonzero(features.split == "train")
    if not len(rows):
        raise BadInput(f"{ctx.node.path}: there is no training crop to learn from; look at crop's manifest for why.")
    return _views(features, rows, features.category[rows], categories, 1.0)


def _sourced(ctx: Context, categories: list[Category]) -> CachedViews | None:
    """The kept pictures of the round before; None in round 1 and where they do not count."""
    weight = ctx.config.learn.sourced_weight
    if not ctx.inputs["previous_sourced"] or weight == 0:
        return None
    table = pq.read_table(ctx.input_file("previous_sourced", "sourced.parquet"), columns=["category", "status", "key"])
    kept = table.filter(pc.equal(table["status"], "kept"))
    features = _feature_set(ctx, "previous_web_features")
    place = {key: row for row, key in enumerate(features.keys)}
    missing = [key for key in kept["key"].to_pylist() if key not in place]
    if missing:
        raise BadInput(
            f"{ctx.node.path}: sourced picture {missing[0]} has no features; run encode of that round again."
        )
    rows = np.array([place[key] for key in kept["key"].to_pylist()], dtype=np.int64)
    return _views(features, rows, kept["category"].to_numpy().astype(np.int64), categories, weight)


def _feature_set(ctx: Context, edge: str) -> FeatureSet:
    return FeatureSet(*(ctx.input_files(edge, name) for name in ("features.npy", "features.parquet", "views.npy")))


def _views(
    features: FeatureSet, rows: npt.NDArray[np.int64], category: npt.NDArray[np.int64], categories: list[Category],
    weight: float,
) -> CachedViews:  # fmt: skip
    """The views at `rows`, labelled by the position of their category among the base ones."""
    position = np.cumsum([each.split == "base" for each in categories]) - 1
    return CachedViews(
        torch.from_numpy(features.views(rows)), torch.from_numpy(position[category]), torch.full((len(rows),), weight)
    )


def _joined(crops: CachedViews, sourced: CachedViews | None) -> CachedViews:
    if sourced is None:
        return crops
    return CachedViews(
        torch.cat([crops.features, sourced.features]), torch.cat([crops.labels, sourced.labels]),
        torch.cat([crops.weights, sourced.weights]),
    )  # fmt: skip


def _task(
    ctx: Context, clip: ClipModel, base: list[Category], train: CachedViews, holdout: CachedViews | None,
    *, ranks: Ranks,
) -> Task:  # fmt: skip
    settings = ctx.config.learn
    names, descriptions = [each.name for each in base], [each.description for each in base]
    tokens = tokenise_prompts(clip, names, descriptions, settings.n_ctx1, settings.n_ctx2, layouts=settings.layouts)
    train = train.balanced(settings.balance).to(clip.device)
    held = None if holdout is None else holdout.balanced(settings.balance).to(clip.device)
    bank = PromptBank(clip.text, tokens, ranks=ranks)
    return Task(bank, _starts(ctx, clip, names), train, held, clip.logit_scale / settings.temperature)


def _starts(ctx: Context, clip: ClipModel, names: list[str]) -> Tensor:
    """[S, K, W] or [S, C, K, W].

    `fast` lets what the round before learned race too, so that a round is not worse by a poor start.
    """
    settings = ctx.config.learn
    count = settings.n_ctx1 + settings.n_ctx2
    is_fast = settings.schedule == "fast"
    drawn = initial_contexts(settings.starts if is_fast else 1, count, clip.text.width, ctx.config.seed)
    if settings.class_specific:
        drawn = drawn[:, None].repeat(1, len(names), 1, 1)
    known = [*_given(ctx, clip, names), *_previous(ctx, clip, names)] if is_fast else _given(ctx, clip, names)
    return torch.cat([*(context[None] for context in known), drawn])


def _previous(ctx: Context, clip: ClipModel, names: list[str]) -> list[Tensor]:
    if not ctx.inputs["previous_prompts"]:
        return []
    before = read_prompts(ctx.input_file("previous_prompts", "prompts.safetensors"))
    check_same(clip.identity, before.encoder, f"{ctx.node.path}: the round before learned", "start a new run")
    return [before.context_for(names)]


def _given(ctx: Context, clip: ClipModel, names: list[str]) -> list[Tensor]:
    """What `learn.start_from` holds, in this run's shape.

    Raises:
        BadInput: vectors of another number or width, or learned on another CLIP as far as the file tells.
    """
    settings = ctx.config.learn
    if settings.start_from is None:
        return []
    path = local_copy(settings.start_from, ctx.scratch)
    if path.suffix == ".safetensors":
        prompts = read_prompts(path)
        check_same(clip.identity, prompts.encoder, f"{settings.start_from}: was learned", "give prompts of this CLIP")
    else:
        ctx1, ctx2, _ = read_reference_checkpoint(path)
        prompts = Prompts(ctx1, ctx2, clip.identity, {})
    found = (prompts.ctx1.shape[-2], prompts.ctx2.shape[-2], prompts.ctx1.shape[-1])
    wanted = (settings.n_ctx1, settings.n_ctx2, clip.text.width)
    if found != wanted:
        raise BadInput(
            f"{settings.start_from}: holds {found[0]} + {found[1]} context vectors of width {found[2]}, and this run "
            f"learns {wanted[0]} + {wanted[1]} of width {wanted[2]}; set learn.n_ctx1 and n_ctx2, or give others."
        )
    context = prompts.context_for(names)
    return [context[None].repeat(len(names), 1, 1) if settings.class_specific and context.ndim == 2 else context]


def _write(ctx: Context, clip: ClipModel, learned: Learned, names: list[str]) -> None:
    settings = {**ctx.config.learn.model_dump(mode="json"), "seed": ctx.config.seed}
    ctx1, ctx2 = torch.split(learned.context, [ctx.config.learn.n_ctx1, ctx.config.learn.n_ctx2], dim=-2)
    path = ctx.scratch / "prompts.safetensors"
    rows = tuple(names) if ctx.config.learn.class_specific else None
    write_prompts(path, Prompts(ctx1, ctx2, clip.identity, settings, rows))
    ctx.add(path)
    if rows is None:  # the reference knows no others
        checkpoint = ctx.scratch / "model.pth.tar"
        write_reference_checkpoint(checkpoint, ctx1, ctx2, ctx.config.clip.views, None)
        ctx.add(checkpoint)
    ctx.write_json("history.json", [step.to_json() for step in learned.history])
    ctx.write_json("race.json", [[step.to_json() for step in history] for history in learned.race])
    ctx.facts = {
        "encoder": clip.identity.to_facts(),
        "prompts_digest": hashlib.sha256(path.read_bytes()).hexdigest(),
        "schedule": ctx.config.learn.schedule,
        "steps": learned.history[-1].step,
        "text_passes": round(learned.history[-1].passes),
        "loss": round(learned.kept.loss, 6),
    }
