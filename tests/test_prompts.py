"""Features and gradients of prompts: as one category at a time gives them, padded to the end, by plain autograd."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from rpl.clip import ClipModel, load_clip
from rpl.config import DEFAULT_LAYOUT, Clip
from rpl.prompt_tokens import tokenise_prompts
from rpl.prompts import PromptBank, bucket_by_length
from rpl.text_tower import TextTower
from tests.clip_models import TOWERS, make_clip, open_clip_model, padded_features, write_clip
from tests.prompt_texts import DESCRIPTIONS, NAMES, OTHER_LAYOUTS, PROMPTDET, as_sentence

TWO = [DEFAULT_LAYOUT, OTHER_LAYOUTS[1]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipModel:
    return make_clip(tmp_path_factory.mktemp("clip"))


def context(clip: ClipModel, count: int, seed: int = 3) -> Tensor:
    return torch.randn((count, clip.text.width), generator=torch.Generator().manual_seed(seed)) * 0.3


def own_contexts(clip: ClipModel, count: int, seed: int = 3) -> Tensor:
    """[C, K, W]"""
    size = (len(NAMES), count, clip.text.width)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.3


def one_by_one(
    clip: ClipModel, context: Tensor, *, n_ctx1: int = 1, layouts: Sequence[str] = (DEFAULT_LAYOUT,)
) -> Tensor:
    """Features by the plainest way: each prompt a list of vectors, padded to the end, through open_clip's own pass."""
    features = []
    for number, (name, description) in enumerate(zip(NAMES, DESCRIPTIONS, strict=True)):
        own = context if context.ndim == 2 else context[number]
        prompts = [_alone(clip, own, layout, name, description, n_ctx1) for layout in layouts]
        units = [functional.normalize(each, dim=0) for each in prompts]
        features.append(prompts[0] if len(layouts) == 1 else torch.stack(units).mean(0))
    return torch.stack(features)


def _alone(clip: ClipModel, own: Tensor, layout: str, name: str, description: str, n_ctx1: int) -> Tensor:
    ids, *places = as_sentence(clip, layout, name, description, n_ctx1=n_ctx1, n_ctx2=len(own) - n_ctx1)
    row = torch.tensor(ids + [0] * (clip.context_length - len(ids)))
    vectors = list(clip.text.embed(row[None])[0])
    for place, vector in zip([*places[0], *places[1]], own, strict=True):
        vectors[place] = vector
    return padded_features(clip, row[None], torch.stack(vectors)[None])[0]


def check_as_one_by_one(
    clip: ClipModel, context: Tensor, *, n_ctx1: int = 1, layouts: Sequence[str] = (DEFAULT_LAYOUT,)
) -> None:
    """Features, and the gradient of a weighted sum of them, are those of autograd through the plainest way."""
    n_ctx2 = context.shape[-2] - n_ctx1
    free = context.clone().requires_grad_()
    expected = one_by_one(clip, free, n_ctx1=n_ctx1, layouts=layouts)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) * 1e-6
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), free)

    bank = PromptBank(clip.text, tokenise_prompts(clip, NAMES, DESCRIPTIONS, n_ctx1, n_ctx2, layouts=layouts))
    features, pullback = bank.features_and_pullback(context)
    assert len(bank) == len(NAMES)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bank.features(context), expected, rtol=1e-4, atol=1e-5)
    gradient = pullback(weights)
    assert gradient.shape == context.shape
    tolerance = 1e-4 * float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=tolerance)


@pytest.mark.parametrize("changes", TOWERS.values(), ids=TOWERS)
@pytest.mark.parametrize("n_ctx", [1, 3])
def test_features_and_gradient_are_those_of_one_category_at_a_time(
    tmp_path: Path, changes: dict[str, Any], n_ctx: int
) -> None:
    clip = make_clip(tmp_path, changes)
    check_as_one_by_one(clip, context(clip, 2 * n_ctx), n_ctx1=n_ctx)


def test_features_keep_their_lengths(clip: ClipModel) -> None:
    bank = PromptBank(clip.text, tokenise_prompts(clip, NAMES, DESCRIPTIONS, 1, 1))
    assert bank.features(context(clip, 2)).norm(dim=1).std() > 0.01


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_another_layout_alone(clip: ClipModel, layout: str) -> None:
    check_as_one_by_one(clip, context(clip, 3), n_ctx1=2, layouts=[layout])


@pytest.mark.parametrize("layouts", [TWO, [DEFAULT_LAYOUT, *OTHER_LAYOUTS]], ids=["two", "six"])
def test_of_several_layouts_the_feature_is_the_mean_at_length_1(clip: ClipModel, layouts: list[str]) -> None:
    context_KW = context(clip, 2)
    alone = [
        PromptBank(clip.text, tokenise_prompts(clip, NAMES, DESCRIPTIONS, 1, 1, layouts=[layout])).features(context_KW)
        for layout in layouts
    ]
    together = PromptBank(clip.text, tokenise_prompts(clip, NAMES, DESCRIPTIONS, 1, 1, layouts=layouts))
    expected = torch.stack([functional.normalize(each, dim=1) for each in alone]).mean(0)
    torch.testing.assert_close(together.features(context_KW), expected, rtol=1e-4, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.01, "the layouts differ"
    check_as_one_by_one(clip, context_KW, layouts=layouts)


@pytest.mark.parametrize("layouts", [[DEFAULT_LAYOUT], TWO], ids=["one layout", "two layouts"])
def test_class_specific_contexts_act_on_their_own_category(clip: ClipModel, layouts: list[str]) -> None:
    context_CKW = own_contexts(clip, 3)
    check_as_one_by_one(clip, context_CKW, n_ctx1=2, layouts=layouts)

    tokens = tokenise_prompts(clip, NAMES, DESCRIPTIONS, 2, 1, layouts=layouts)
    bank = PromptBank(clip.text, tokens, tokens_at_once=50)
    features, pullback = bank.features_and_pullback(context_CKW)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    gradient = pullback(weights)
    for number in range(len(NAMES)):
        alone = PromptBank(clip.text, tokens.select(np.array([number])))
        own, own_pullback = alone.features_and_pullback(context_CKW[number])
        torch.testing.assert_close(features[number], own[0], rtol=1e-4, atol=1e-5)
        tolerance = 1e-4 * float(gradient.abs().max())
        torch.testing.assert_close(gradient[number], own_pullback(weights[[number]]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("layouts", [[DEFAULT_LAYOUT], TWO], ids=["one layout", "two layouts"])
def test_a_shared_context_is_the_same_one_for_each_category(clip: ClipModel, layouts: list[str]) -> None:
    bank = PromptBank(clip.text, tokenise_prompts(clip, NAMES, DESCRIPTIONS, 1, 1, layouts=layouts))
    context_KW = context(clip, 2)
    shared, shared_pullback = bank.features_and_pullback(context_KW)
    own, own_pullback = bank.features_and_pullback(context_KW.expand(len(NAMES), -1, -1).contiguous())
    torch.testing.assert_close(own, shared, rtol=1e-5, atol=1e-6)
    weights = torch.randn(shared.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(own_pullback(weights).sum(0), shared_pullback(weights), rtol=1e-3, atol=1e-4)


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


# torch looks at .grad itself, and hides the warning only where warnings are no errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dynamic", [False, None], ids=["each shape its graph", "as torch sees fit"])
def test_a_compiled_tower_is_compiled_once_for_each_shape(
    clip: ClipModel, monkeypatch: pytest.MonkeyPatch, dynamic: bool | None
) -> None:
    torch._dynamo.reset()
    tokens = tokenise_prompts(clip, NAMES * 5, DESCRIPTIONS * 5, 1, 1)
    plain = PromptBank(clip.text, tokens, tokens_at_once=100)
    expected, plain_pullback = plain.features_and_pullback(context(clip, 2, seed=2))
    shapes = {tuple(piece.embeddings.shape) for piece in plain._pieces}
    assert 2 < len(shapes) < len(plain._pieces)

    counter = CompileCounter()
    compiled = torch.compile(TextTower.features, backend=counter, fullgraph=True, dynamic=dynamic)
    monkeypatch.setattr(TextTower, "features", compiled)
    bank = PromptBank(clip.text, tokens, tokens_at_once=100)
    graphs = []
    for seed in range(3):
        features, pullback = bank.features_and_pullback(context(clip, 2, seed))
        gradient = pullback(torch.ones_like(features))
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] <= len(shapes)
    assert graphs[1:] == [graphs[0], graphs[0]], "later passes compile nothing"
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(gradient, plain_pullback(torch.ones_like(features)))


@pytest.mark.slow
def test_the_whole_text_tower_of_vit_b_32_needs_no_padding() -> None:
    clip = load_clip(Clip(model="ViT-B-32", pretrained=None), "cpu")
    assert (clip.text.width, len(open_clip_model(clip).transformer.resblocks)) == (512, 12)
    assert not clip.text.whole_length
    names, descriptions = NAMES * 2, [*DESCRIPTIONS, *reversed(DESCRIPTIONS)]
    tokens = tokenise_prompts(clip, names, descriptions, 1, 1)
    bank = PromptBank(clip.text, tokens)
    assert len(bank) == 16 and bank.token_count < 0.4 * 16 * 77

    context_KW = context(clip, 2).requires_grad_()
    padded = torch.zeros((16, 77), dtype=torch.int64)
    padded[:, : tokens.ids.shape[1]] = tokens.ids
    rows = torch.arange(16)[:, None]
    embeddings = clip.text.embed(padded).index_put((rows, tokens.slots), context_KW.expand(16, -1, -1))
    expected = padded_features(clip, padded, embeddings)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), context_KW)

    features, pullback = bank.features_and_pullback(context_KW.detach())
    spread = float((features - features.mean(0)).abs().max())
    assert spread > 1, "the tower tells the texts apart"
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5 * spread)
    tolerance = 1e-4 * float(expected_gradient.abs().max())
    torch.testing.assert_close(pullback(weights), expected_gradient, rtol=0, atol=tolerance)


ONE_PASS = """
import resource, torch
from rpl.clip import load_clip
from rpl.config import Clip
from rpl.prompt_tokens import tokenise_prompts
from rpl.prompts import PromptBank
from tests.prompt_texts import promptdet_texts
clip = load_clip(Clip(model="ViT-B-32", pretrained=None), "cpu")
bank = PromptBank(clip.text, tokenise_prompts(clip, *promptdet_texts(), 1, 1))
features, pullback = bank.features_and_pullback(torch.full((2, clip.text.width), 0.01))
gradient = pullback(torch.ones_like(features))
assert features.shape == (1203, 512) and gradient.abs().max() > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PROMPTDET.exists(), reason="PromptDet's resource files are not beside the repository")
def test_a_pass_over_1203_prompts_of_vit_b_32_stays_below_8_gib() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", ONE_PASS], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True,
        text=True, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 2**30


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
