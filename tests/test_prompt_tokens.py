"""Prompts as token ids: those of the sentence, in any layout; descriptions are cut, names never."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from rpl.clip import ClipModel
from rpl.config import DEFAULT_LAYOUT
from rpl.errors import BadInput
from rpl.prompt_tokens import PromptTokens, fill_template, tokenise_prompts
from rpl.prompts import bucket_by_length
from tests.clip_models import make_clip
from tests.prompt_texts import DESCRIPTIONS, NAMES, OTHER_LAYOUTS, PROMPTDET, as_sentence, promptdet_texts


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipModel:
    return make_clip(tmp_path_factory.mktemp("clip"))


def check_row(clip: ClipModel, tokens: PromptTokens, row: int, layout: str, name: str, description: str) -> None:
    """A row of `tokens` is the prompt of one context vector at each place."""
    ids, *places = as_sentence(clip, layout, name, description, n_ctx1=1, n_ctx2=1)
    slots = [place for each in places for place in each]
    assert tokens.lengths[row] == len(ids)
    assert tokens.slots[row].tolist() == slots
    expected = [0 if place in slots else token for place, token in enumerate(ids)]
    assert tokens.ids[row].tolist() == expected + [0] * (tokens.ids.shape[1] - len(ids))


@pytest.mark.parametrize("layout", [DEFAULT_LAYOUT, *OTHER_LAYOUTS])
def test_ids_are_those_of_the_sentence(clip: ClipModel, layout: str) -> None:
    tokens = tokenise_prompts(clip, NAMES, DESCRIPTIONS, 1, 1, layouts=[layout])
    for row, (name, description) in enumerate(zip(NAMES, DESCRIPTIONS, strict=True)):
        check_row(clip, tokens, row, layout, name, description)
    assert torch.equal(tokens.ids[0], tokens.ids[5]), "names with the same text"
    assert tokens.ids.shape[1] == int(tokens.lengths.max())


def test_the_default_layout_is_the_references(clip: ClipModel) -> None:
    tokens = tokenise_prompts(clip, ["cat"], ["a small animal"], 2, 3)
    expected = clip.tokenise(["X X cat X X X a small animal."])[0, :12]
    assert tokens.slots.tolist() == [[1, 2, 4, 5, 6]]  # start, X, X, cat, X, X, X
    assert expected[tokens.slots[0]].tolist() == clip.token_ids("X") * 5
    assert tokens.ids[0].tolist() == expected.index_fill(0, tokens.slots[0], 0).tolist()


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_several_vectors_stand_together_ctx1s_first(clip: ClipModel, layout: str) -> None:
    tokens = tokenise_prompts(clip, ["cat"], ["a small animal"], 2, 3, layouts=[layout])
    _, first, second = as_sentence(clip, layout, "cat", "a small animal", n_ctx1=2, n_ctx2=3)
    assert tokens.slots.tolist() == [[*first, *second]]


def test_rows_are_category_by_category_layout_by_layout(clip: ClipModel) -> None:
    layouts = [DEFAULT_LAYOUT, *OTHER_LAYOUTS]
    tokens = tokenise_prompts(clip, NAMES, DESCRIPTIONS, 1, 1, layouts=layouts)
    assert (tokens.layouts, tokens.categories, len(tokens.ids)) == (6, 8, 48)
    for row in range(48):
        category, layout = divmod(row, 6)
        check_row(clip, tokens, row, layouts[layout], NAMES[category], DESCRIPTIONS[category])


def test_selected_categories_bring_all_their_prompts_in_the_order_asked(clip: ClipModel) -> None:
    layouts = OTHER_LAYOUTS[:3]
    chosen = np.array([6, 0, 3])
    found = tokenise_prompts(clip, NAMES, DESCRIPTIONS, 1, 1, layouts=layouts).select(chosen)
    alone = tokenise_prompts(
        clip, [NAMES[n] for n in chosen], [DESCRIPTIONS[n] for n in chosen], 1, 1, layouts=layouts
    )  # fmt: skip
    assert (found.layouts, found.categories) == (3, 3)
    assert torch.equal(found.lengths, alone.lengths) and torch.equal(found.slots, alone.slots)
    longest = alone.ids.shape[1]
    assert torch.equal(found.ids[:, :longest], alone.ids) and not found.ids[:, longest:].any()


def test_no_category_is_no_prompt(clip: ClipModel) -> None:
    tokens = tokenise_prompts(clip, [], [], 1, 2)
    assert (tokens.categories, tuple(tokens.ids.shape), tuple(tokens.slots.shape)) == (0, (0, 0), (0, 3))


@pytest.mark.skipif(not PROMPTDET.exists(), reason="PromptDet's resource files are not beside the repository")
@pytest.mark.parametrize("layout", [DEFAULT_LAYOUT, OTHER_LAYOUTS[1]])
def test_ids_of_all_categories_of_promptdet(clip: ClipModel, layout: str) -> None:
    names, descriptions = promptdet_texts()
    tokens = tokenise_prompts(clip, names, descriptions, 1, 1, layouts=[layout])
    for row, (name, description) in enumerate(zip(names, descriptions, strict=True)):
        check_row(clip, tokens, row, layout, name, description)
    assert tokens.categories == 1203
    if layout == DEFAULT_LAYOUT:
        assert (int(tokens.lengths.min()), int(tokens.lengths.max())) == (8, 40)
        padded = sum(length * len(rows) for length, rows in bucket_by_length(tokens.lengths.numpy()))
        assert padded < 1.1 * int(tokens.lengths.sum()) < 0.27 * 77 * tokens.categories


def test_a_long_description_is_cut_with_a_warning(clip: ClipModel, caplog: pytest.LogCaptureFixture) -> None:
    long = "very " * 90 + "sweet"
    with caplog.at_level(logging.WARNING):
        tokens = tokenise_prompts(clip, ["cat", "crème brûlée"], ["a small animal", long], 1, 1)
    assert caplog.messages == [
        "category 'crème brûlée': its description is cut, since a prompt has room for 77 tokens"
    ]  # fmt: skip
    assert tokens.lengths.tolist() == [9, 77]
    assert int(tokens.ids[1, -1]) == clip.end_token
    check_row(clip, tokens, 1, DEFAULT_LAYOUT, "crème brûlée", long)


@pytest.mark.parametrize("layout", [each for each in OTHER_LAYOUTS if "{description}" in each])
def test_a_long_description_is_cut_in_other_layouts_too(
    clip: ClipModel, caplog: pytest.LogCaptureFixture, layout: str
) -> None:
    long = "very " * 90 + "sweet"
    tokens = tokenise_prompts(clip, ["crème brûlée"], [long], 1, 1, layouts=[OTHER_LAYOUTS[0], layout])
    assert len(caplog.messages) == 1, "only of the layout that has it"
    assert tokens.lengths.tolist() == [len(clip.token_ids("crème brûlée")) + 5, 77]
    check_row(clip, tokens, 1, layout, "crème brûlée", long)


def test_a_description_that_just_fits_is_not_cut(clip: ClipModel, caplog: pytest.LogCaptureFixture) -> None:
    # start + X + cat + X + 71 words + "." + end = 77
    tokens = tokenise_prompts(clip, ["cat"], ["very " * 71], 1, 1)
    assert tokens.lengths.tolist() == [77] and not caplog.messages
    tokenise_prompts(clip, ["cat"], ["very " * 72], 1, 1)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("layout", "room"),
    [
        (DEFAULT_LAYOUT, 73),  # start, X, the name, X and end
        ("{ctx1} {name} {ctx2}.", 72),
        ("a photo of {ctx1} {name}, {ctx2} {description}", 69),
        ("{ctx1} {ctx2} {name}", 73),
        ("{ctx1} {ctx2} {name} in the wild", 70),
        ("{ctx1} {ctx2} {name} in the wild: {description}", 69),
    ],
)
def test_a_name_is_never_cut(clip: ClipModel, layout: str, room: int) -> None:
    fits = "cat " * room
    tokens = tokenise_prompts(clip, [fits], ["a small animal"], 1, 1, layouts=[layout])
    assert tokens.lengths.tolist() == [77]
    assert tokens.ids[0].tolist().count(clip.token_ids("cat")[0]) == room
    with pytest.raises(BadInput) as caught:
        tokenise_prompts(clip, ["cat " * (room + 1)], [""], 1, 1, layouts=[layout])
    shown = ("cat " * 80)[:60]
    assert str(caught.value) == (
        f"category {shown!r}: its name alone fills the 77 tokens of a prompt; shorten it."
    )  # fmt: skip


def test_braces_in_names_and_descriptions_are_text(clip: ClipModel) -> None:
    name, description = "{ctx1} {hat}", "a {description} in {name}"
    tokens = tokenise_prompts(clip, [name], [description], 1, 1)
    check_row(clip, tokens, 0, DEFAULT_LAYOUT, name, description)


def test_templates() -> None:
    assert fill_template("a photo of a {name}, {description}.", "cat", "an animal") == "a photo of a cat, an animal."
    assert fill_template("{name}, {description}.", "cat", "") == "cat, cat."
