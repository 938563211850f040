"""Prompts as tensors: ids as the reference builds them, features and gradients as one category at a time gives them."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpl.categories import split_name
from rpl.clip import ClipModel, load_clip
from rpl.errors import BadInput
from rpl.prompt_tokens import PromptTokens, fill_template, tokenise_prompts
from rpl.prompts import PromptBank, bucket_by_length
from tests.clip_models import TOWERS, make_clip, padded_features, write_clip

PROMPTDET = Path(__file__).parents[2] / "shared" / "data" / "promptdet" / "lvis_category_and_description.txt"

NAMES = ["cat", "bow (weapon)", "don't-know hat", "crème brûlée", "犬", "cat", "fire engine", "bow-tie"]
DESCRIPTIONS = [
    "a small animal", "a weapon (that shoots arrows)", "", "a dessert, of burnt cream & sugar", "もの",
    "a small animal",
    "a large, red vehicle that carries firefighters, ladders and long hoses to wherever something burns", "x",
]  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipModel:
    return make_clip(tmp_path_factory.mktemp("clip"))


def context(clip: ClipModel, count: int, seed: int = 3) -> Tensor:
    return torch.randn((count, clip.text.width), generator=torch.Generator().manual_seed(seed)) * 0.3


def one_by_one(clip: ClipModel, ctx1: Tensor, ctx2: Tensor) -> Tensor:
    """Features by the plainest way: each prompt a list of vectors, padded to the end, through open_clip's own pass."""
    zero = torch.zeros(clip.context_length, dtype=torch.int64)
    features = []
    for name, description in zip(NAMES, DESCRIPTIONS, strict=True):
        before, after = clip.token_ids(name), clip.token_ids(f"{description}.")
        ids = [clip.start_token, *[0] * len(ctx1), *before, *[0] * len(ctx2), *after]
        ids = [*ids[: clip.context_length - 1], clip.end_token]
        row = zero.clone()
        row[: len(ids)] = torch.tensor(ids)
        vectors = list(clip.text.embed(row[None])[0])
        vectors[1 : 1 + len(ctx1)] = ctx1
        second = 1 + len(ctx1) + len(before)
        vectors[second : second + len(ctx2)] = ctx2
        features.append(padded_features(clip, row[None], torch.stack(vectors)[None])[0])
    return torch.stack(features)


def same_text_ids(clip: ClipModel, tokens: PromptTokens, texts: list[str]) -> None:
    """`tokens` are the ids of `texts`, in which X stands for each context vector."""
    expected = clip.tokenise(texts)[:, : tokens.ids.shape[1]]
    slots = torch.zeros_like(expected, dtype=torch.bool).scatter_(1, tokens.slots, True)
    assert set(expected[slots].tolist()) == set(clip.token_ids("X"))
    assert torch.equal(expected.masked_fill(slots, 0), tokens.ids)
    ends = (expected == clip.end_token).int().argmax(1)
    assert torch.equal(ends + 1, tokens.lengths)


def test_ids_are_those_of_the_references_text(clip: ClipModel) -> None:
    tokens = tokenise_prompts(clip, NAMES, DESCRIPTIONS, 2, 3)
    same_text_ids(clip, tokens, [f"X X {n} X X X {d}." for n, d in zip(NAMES, DESCRIPTIONS, strict=True)])
    assert tokens.slots[0].tolist() == [1, 2, 4, 5, 6]  # start, X, X, cat, X, X, X


@pytest.mark.skipif(not PROMPTDET.exists(), reason="PromptDet's resource files are not beside the repository")
def test_ids_of_all_categories_of_promptdet(clip: ClipModel) -> None:
    pairs = [split_name(line.split(" ")[-1].strip()) for line in PROMPTDET.read_text(encoding="utf-8").splitlines()]
    names, descriptions = zip(*pairs, strict=True)
    tokens = tokenise_prompts(clip, names, descriptions, 1, 1)
    same_text_ids(clip, tokens, [f"X {name} X {description}." for name, description in pairs])
    assert (tokens.categories, int(tokens.lengths.min()), int(tokens.lengths.max())) == (1203, 8, 40)
    padded = sum(length * len(rows) for length, rows in bucket_by_length(tokens.lengths.numpy()))
    assert padded < 1.1 * int(tokens.lengths.sum()) < 0.27 * 77 * tokens.categories


@pytest.mark.parametrize("changes", TOWERS.values(), ids=TOWERS)
@pytest.mark.parametrize("n_ctx", [1, 3])
def test_features_and_gradient_are_those_of_one_category_at_a_time(
    tmp_path: Path, changes: dict[str, Any], n_ctx: int
) -> None:
    clip = make_clip(tmp_path, changes)
    context_KW = context(clip, 2 * n_ctx).requires_grad_()
    expected = one_by_one(clip, context_KW[:n_ctx], context_KW[n_ctx:])
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) * 1e-6
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), context_KW)

    bank = PromptBank(clip.text, tokenise_prompts(clip, NAMES, DESCRIPTIONS, n_ctx, n_ctx))
    features, pullback = bank.features_and_pullback(context_KW)

    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bank.features(context_KW), expected, rtol=1e-4, atol=1e-5)
    tolerance = 1e-4 * float(expected_gradient.abs().max())
    torch.testing.assert_close(pullback(weights), expected_gradient, rtol=0, atol=tolerance)
    assert features.norm(dim=1).std() > 0.01  # they keep their lengths


def test_names_with_the_same_text_get_the_same_features(clip: ClipModel) -> None:
    bank = PromptBank(clip.text, tokenise_prompts(clip, NAMES, DESCRIPTIONS, 1, 1))
    features = bank.features(context(clip, 2))
    torch.testing.assert_close(features[0], features[5])


def test_pieces_of_a_bucket_change_nothing_but_memory(clip: ClipModel) -> None:
    tokens = tokenise_prompts(clip, NAMES * 5, DESCRIPTIONS * 5, 1, 1)
    whole, pieces = PromptBank(clip.text, tokens), PromptBank(clip.text, tokens, tokens_at_once=64)
    context_KW = context(clip, 2)
    torch.testing.assert_close(pieces.features(context_KW), whole.features(context_KW), rtol=1e-4, atol=1e-5)
    assert pieces.token_count == whole.token_count
    assert len(pieces._pieces) > len(whole._pieces)


@pytest.mark.parametrize("graph_bytes", [0, 1_500_000])
def test_a_pass_in_little_memory_has_the_same_gradient(clip: ClipModel, graph_bytes: int) -> None:
    tokens = tokenise_prompts(clip, NAMES * 5, DESCRIPTIONS * 5, 1, 1)
    large = PromptBank(clip.text, tokens, tokens_at_once=200)
    small = PromptBank(clip.text, tokens, tokens_at_once=200, graph_bytes=graph_bytes)
    saved = []
    gradients = []
    for bank in (large, small):
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            features, pullback = bank.features_and_pullback(context(clip, 2))
            saved.append(sum(sizes))
        gradients.append(pullback(torch.ones_like(features)))
    assert torch.equal(*gradients)
    assert saved[1] < 0.75 * saved[0] and (graph_bytes or saved[1] == 0)


def test_some_categories_alone_are_as_among_all(clip: ClipModel) -> None:
    tokens, rows = tokenise_prompts(clip, NAMES, DESCRIPTIONS, 1, 1), np.array([6, 0])
    context_KW = context(clip, 2)
    alone = PromptBank(clip.text, tokens.select(rows)).features(context_KW)
    among = PromptBank(clip.text, tokens).features(context_KW)
    torch.testing.assert_close(alone, among[[6, 0]], rtol=1e-4, atol=1e-5)


def test_gradients_too_small_for_half_precision_arrive(tmp_path: Path) -> None:
    clip = load_clip(write_clip(tmp_path).model_copy(update={"precision": "fp16"}), "cpu")
    bank = PromptBank(clip.text, tokenise_prompts(clip, NAMES, DESCRIPTIONS, 1, 1))
    weights = torch.randn((len(NAMES), clip.identity.dim), generator=torch.Generator().manual_seed(1))
    gradients = []
    for scale in (1.0, 1e-9):
        _, pullback = bank.features_and_pullback(context(clip, 2))
        gradients.append(pullback(weights * scale) / scale)
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


def test_a_long_description_is_cut_with_a_warning(clip: ClipModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokens = tokenise_prompts(clip, ["cat", "crème brûlée"], ["a small animal", "very " * 90 + "sweet"], 1, 1)
    assert caplog.messages == [
        "category 'crème brûlée': its description is cut, since a prompt has room for 77 tokens"
    ]  # fmt: skip
    assert tokens.lengths.tolist() == [9, 77]
    assert int(tokens.ids[1, -1]) == clip.end_token
    same_text_ids(clip, tokens, ["X cat X a small animal.", f"X crème brûlée X {'very ' * 90}sweet."])


def test_a_description_that_just_fits_is_not_cut(clip: ClipModel, caplog: pytest.LogCaptureFixture) -> None:
    # start + X + cat + X + 71 words + "." + end = 77
    tokens = tokenise_prompts(clip, ["cat"], ["very " * 71], 1, 1)
    assert tokens.lengths.tolist() == [77] and not caplog.messages
    tokenise_prompts(clip, ["cat"], ["very " * 72], 1, 1)
    assert len(caplog.messages) == 1


def test_a_name_that_fills_the_prompt_is_refused(clip: ClipModel) -> None:
    with pytest.raises(BadInput) as caught:
        tokenise_prompts(clip, ["cat " * 80], [""], 1, 1)
    shown = ("cat " * 80)[:60]
    assert str(caught.value) == (
        f"category {shown!r}: its name alone fills the 77 tokens of a prompt; shorten it."
    )  # fmt: skip


def test_templates() -> None:
    assert fill_template("a photo of a {name}, {description}.", "cat", "an animal") == "a photo of a cat, an animal."
    assert fill_template("{name}, {description}.", "cat", "") == "cat, cat."


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 4), st.integers(0, 20))
def test_buckets_hold_each_prompt_once_at_the_least_cost(lengths: list[int], most: int, cost: int) -> None:
    buckets = bucket_by_length(np.array(lengths), most, cost)
    assert sorted(row for _, rows in buckets for row in rows) == list(range(len(lengths)))
    assert all(max(lengths[row] for row in rows) == length for length, rows in buckets)

    values = sorted(set(lengths))
    ways = (
        [*borders, values[-1]]
        for n in range(min(most, len(values)))
        for borders in itertools.combinations(values[:-1], n)
    )
    least = min(sum(min(b for b in way if b >= length) for length in lengths) + cost * len(way) for way in ways)
    assert sum(length * len(rows) for length, rows in buckets) + cost * len(buckets) == least
