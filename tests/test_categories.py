"""Category lists in every form, PromptDet's and LVIS's own files, and names that mean harm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpl.categories import (
    Category,
    categories_from_json,
    categories_from_records,
    categories_to_json,
    match_key,
    read_categories,
    rows_by_id,
    split_name,
)
from rpl.errors import BadInput

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} (public test data) is not here")

CAT, DOG = Category(1, "cat", "", "base"), Category(2, "dog", "a tame wolf", "base")


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def read(tmp_path: Path, content: object, base: str | None = None, annotated: object = (CAT, DOG)) -> list[Category]:
    base_file = None if base is None else write(tmp_path / "base.txt", base)
    return read_categories(write(tmp_path / "list", content), base_file, list(annotated), "train.json")


def sentence(tmp_path: Path, content: object, base: str | None = None) -> str:
    with pytest.raises(BadInput) as raised:
        read(tmp_path, content, base)
    return str(raised.value).replace(f"{tmp_path}/", "")


def test_names_split_at_which_is_and_underscores_become_spaces() -> None:
    assert split_name("alarm_clock_which_is_a_clock_that_rings") == ("alarm clock", "a clock that rings")
    assert split_name("alarm_clock") == ("alarm clock", "")
    assert split_name("a_which_is_b_which_is_c") == ("a", "b which is c")


def test_json_list(tmp_path: Path) -> None:
    content = [{"name": "cat", "id": 7}, {"name": "Dog", "description": "a_tame wolf", "split": "novel", "id": 3}]
    assert read(tmp_path, content) == [Category(7, "cat", "", "base"), Category(3, "Dog", "a tame wolf", "novel")]


def test_ids_are_counted_from_one_where_the_list_has_none(tmp_path: Path) -> None:
    assert [c.id for c in read(tmp_path, [{"name": "dog"}, {"name": "cat_which_is_small"}])] == [1, 2]


def test_text_form_with_base_indices(tmp_path: Path) -> None:
    text = "cat cat_which_is_a_pet\n\nred_fox red_fox_which_is_wild\r\ndog\n"
    assert read(tmp_path, text, "0, 2") == [
        Category(1, "cat", "a pet", "base"),
        Category(2, "red fox", "wild", "novel"),
        Category(3, "dog", "", "base"),
    ]


def test_coco_and_lvis_files_serve_as_lists(tmp_path: Path) -> None:
    content = {"images": [], "categories": [{"id": 5, "name": "dog", "def": "a tame wolf"}, {"id": 9, "name": "cat"}]}
    assert read(tmp_path, content) == [Category(5, "dog", "a tame wolf", "base"), Category(9, "cat", "", "base")]


def test_without_a_list_the_annotations_categories_are_base() -> None:
    assert read_categories(None, None, [CAT, DOG], "train.json") == [CAT, DOG]


@needs_data
def test_promptdets_own_files() -> None:
    lvis = json.loads((DATA / "detic/lvis_v1_train_cat_info.json").read_text())
    annotated = categories_from_records(lvis, "lvis")
    names, base = DATA / "promptdet/lvis_category_and_description.txt", DATA / "promptdet/lvis_base_inds.txt"
    categories = read_categories(str(names), str(base), annotated, "lvis")
    assert len(categories) == 1203
    assert sum(c.split == "base" for c in categories) == 866
    assert all(c.description for c in categories)
    assert [c.id for c in categories] == [raw["id"] for raw in lvis]
    assert rows_by_id(annotated, categories) == {raw["id"]: row for row, raw in enumerate(lvis)}
    assert [c.split == "base" for c in categories] == [raw["frequency"] in "cf" for raw in lvis]
    assert categories[0] == Category(1, "aerosol can", "a dispenser that holds a substance under pressure", "base")
    by_id = {c.id: c for c in categories}
    assert by_id[655].name == "speaker (stereo equipment)"
    assert by_id[698].name == "monitor (computer equipment) computer monitor"


def test_the_two_names_that_the_reference_corrects_by_hand_match() -> None:
    assert match_key("speaker_(stero_equipment)") == match_key("speaker_(stereo_equipment)")
    monitor = "monitor_(computer_equipment)_computer_monitor"
    assert match_key("monitor_(computer_equipment) computer_monitor") == match_key(monitor)
    assert match_key("speaker") != match_key("speaker_(stereo_equipment)")


def test_boxes_find_their_row_by_name_and_unlisted_ids_have_none() -> None:
    annotated = [Category(4, "Hot_Dog", "", "base"), Category(2, "emu", "", "base"), Category(9, "cat", "", "base")]
    listed = [CAT, DOG, Category(3, "hot dog", "", "novel")]
    assert rows_by_id(annotated, listed) == {4: 2, 9: 0}


text = st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs"], exclude_characters="_"), min_size=1, max_size=30
)


@given(st.lists(st.tuples(text, text), min_size=1, max_size=5, unique_by=lambda pair: pair[0].casefold()))
def test_any_names_round_trip_through_our_json(pairs: list[tuple[str, str]]) -> None:
    raw = [{"id": row, "name": name, "description": words} for row, (name, words) in enumerate(pairs)]
    categories = categories_from_records(raw, "x")
    assert [(c.name, c.description) for c in categories] == pairs
    assert categories_from_json(categories_to_json(categories)) == categories


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "<script>alert(1)</script>", "x" * 1000, "猫", "C:\\x"])
def test_hostile_names_are_only_names(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, [{"name": name}], annotated=[Category(1, name, "", "base")])[0].name == name


BAD = [
    ([{"name": "cat"}, {"name": ""}], "list: category 1 (from 0) has an empty name; name it or remove it."),
    ([{"name": "cat"}, {"name": " _ "}], "list: category 1 (from 0) has an empty name; name it or remove it."),
    (
        [{"name": "cat"}, {"name": "dog"}, {"name": "Cat"}],
        "list: category 0 (from 0) and category 2 (from 0) both have the name 'Cat'; remove or change one.",
    ),
    (
        [{"name": "cat", "id": 1}, {"name": "dog", "id": 1}],
        "list: category 0 (from 0) and category 1 (from 0) both have the id 1; remove or change one.",
    ),
    (
        [{"name": "cat", "id": 1}, {"name": "dog"}],
        "list: category 1 (from 0) has no id while others have one; give all an id, or none.",
    ),
    (
        [{"name": "cat", "id": "one"}],
        "list: category 0 (from 0) ('cat') has id 'one', not a whole number; correct it.",
    ),
    (
        [{"name": "cat", "split": "rare"}],
        "list: category 0 (from 0) ('cat') has split 'rare'; write base or novel.",
    ),
    ([{"name": "cat\nrm -rf"}], "list: category 0 (from 0) has the control character U+000A in its name; remove it."),
    ([{"name": "c\u2028at"}], "list: category 0 (from 0) has the control character U+2028 in its name; remove it."),
    (
        [{"name": "cat", "description": "\x1b[31m"}],
        "list: category 0 (from 0) has the control character U+001B in its description; remove it.",
    ),
    ([{"name": "x" * 1001}], "list: category 0 (from 0) has a name of 1001 characters; shorten it to 1000 at most."),
    ([{"name": None}], "list: category 0 (from 0) has no text as its name; write it in quotes."),
    (["cat"], 'list: category 0 (from 0) is not an object with a name; write {"name": …}.'),
    ([], "list: holds no categories; add some."),
    ("", "list: holds no categories; add some."),
    ({"images": []}, "list: has no 'categories'; give a category list, or a COCO or LVIS file."),
    (
        [{"name": "cat", "split": "novel"}],
        "list: no category is base, so there is nothing to learn from; mark some as base.",
    ),
    (
        [{"name": "cat"}, {"name": "emu"}],
        "list: base category 'emu' (row 1) is empty, since train.json has no category of that name; correct the name, "
        "or make it novel.",
    ),
    ("cat a cat\n", "list: line 1 has 3 words, not two; write `name name_which_is_description`."),
    ("cat dog_which_is_x\n", "list: line 1 names both 'cat' and 'dog'; write the same name twice."),
    (
        "cat\ndog\ncat\n",
        "list: line 1 and line 3 both have the name 'cat'; remove or change one.",
    ),
]


@pytest.mark.parametrize(("content", "expected"), BAD, ids=[text.split(":")[1][:40] for _, text in BAD])
def test_bad_lists_get_one_sentence(tmp_path: Path, content: object, expected: str) -> None:
    assert sentence(tmp_path, content) == expected


def test_lists_that_are_not_whole_json_or_text(tmp_path: Path) -> None:
    assert sentence(tmp_path, '[{"name": "cat"').startswith("list: is not valid JSON (Expecting ',' delimiter")
    assert sentence(tmp_path, '{"categories": [').startswith("list: is not a whole JSON object (expecting value at")
    (tmp_path / "list").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match=r"list: is not UTF-8 text \(byte 3\); save it as UTF-8\."):
        read_categories(str(tmp_path / "list"), None, [CAT], "train.json")


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("0, x", "base.txt: 'x' is not an index; write numbers from 0, separated by commas."),
        ("0, -1", "base.txt: '-1' is not an index; write numbers from 0, separated by commas."),
        ("", "base.txt: '' is not an index; write numbers from 0, separated by commas."),
        ("0, 2", "base.txt: index 2 is beyond the 2 categories (0-based); correct it."),
        ("0, 1, 0", "base.txt: index 0 comes twice; remove one."),
    ],
)
def test_bad_base_files_get_one_sentence(tmp_path: Path, base: str, expected: str) -> None:
    assert sentence(tmp_path, "cat\ndog\n", base) == expected


def test_two_sources_of_splits_are_one_too_many(tmp_path: Path) -> None:
    said = sentence(tmp_path, [{"name": "cat", "split": "novel"}], "0")
    assert said == "list: gives splits, and so does base.txt; remove one of the two."


def test_annotations_categories_need_ids() -> None:
    with pytest.raises(BadInput) as raised:
        categories_from_records([{"name": "cat"}], "train.json")
    assert str(raised.value) == "train.json: category 0 (from 0) ('cat') has no id; give it one."
