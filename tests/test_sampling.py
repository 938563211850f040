"""Which boxes become crops: the reference's rectangles, its area test, and a draw that nothing but the seed moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpl.annotations import Annotations
from rpl.categories import Category
from rpl.config import BoxData, Data
from rpl.errors import BadInput
from rpl.sampling import Fate, Selection, crop_rectangles, select_boxes, shard_of, skipped

CATEGORIES = [Category(1, "cat", "", "base"), Category(2, "dog", "", "base"), Category(3, "emu", "", "novel")]
BOX = [10.0, 10.0, 20.0, 20.0]


def annotations(boxes: list[tuple[int, int, list[float]]], images: int = 50) -> Annotations:
    """Boxes as (annotation id, category id, bbox), spread over `images` images of 100 x 100 pixels."""
    boxes = sorted(boxes)
    return Annotations(
        source="boxes.json",
        categories=[*CATEGORIES, Category(9, "unlisted", "", "base")],
        image_ids=np.arange(1, images + 1),
        file_names=[(f"{n}.jpg",) for n in range(1, images + 1)],
        sizes=np.full((images, 2), 100, np.int64),
        ids=np.array([number for number, _, _ in boxes], np.int64),
        images=np.array([number % images for number, _, _ in boxes], np.int64),
        category_ids=np.array([category for _, category, _ in boxes], np.int64),
        boxes=np.array([box for _, _, box in boxes], np.float64).reshape(-1, 4),
        crowds=0,
    )


def settings(**changes: Any) -> Data:
    return Data.model_validate({"train": BoxData(annotations="a", images="b"), **changes})


def many(category: int, count: int, start: int = 0) -> list[tuple[int, int, list[float]]]:
    return [(start + n, category, BOX) for n in range(count)]


def ids(selection: Selection, fate: Fate) -> set[int]:
    return set(selection.annotations.ids[selection.fates == fate].tolist())


def reference_rectangle(box: list[float], size: tuple[int, int], factor: float) -> list[int]:
    """The reference's four lines, for one box at a time."""
    x, y, w, h = box
    return [
        max(0, int(x - factor * w)),
        max(0, int(y - factor * h)),
        min(size[0], int(x + (1 + factor) * w)),
        min(size[1], int(y + (1 + factor) * h)),
    ]


sides = st.floats(0.01, 700, allow_nan=False)


@given(st.tuples(st.floats(-1, 700), st.floats(-1, 700), sides, sides), st.sampled_from([0, 0.25, 1.0, 2.5]))
def test_rectangles_are_the_references(box: tuple[float, ...], factor: float) -> None:
    ours = crop_rectangles(np.array([box]), np.array([[640, 480]]), factor)
    assert ours.tolist() == [reference_rectangle(list(box), (640, 480), factor)]


def test_a_box_is_widened_to_three_times_its_sides_and_clipped() -> None:
    ours = crop_rectangles(np.array([[40.0, 50, 10, 20], [0, 0, 60, 60]]), np.full((2, 2), 100), 1.0)
    assert ours.tolist() == [[30, 30, 60, 90], [0, 0, 100, 100]]


def test_the_area_test_is_on_the_box_before_widening() -> None:
    boxes = annotations([(1, 1, [10, 10, 4, 4.9]), (2, 1, [10, 10, 4, 5]), (3, 1, [10, 10, 0.5, 40])])
    (selection,) = select_boxes(boxes, None, CATEGORIES, settings(), 0)
    assert ids(selection, Fate.SMALL) == {1}
    (selection,) = select_boxes(boxes, None, CATEGORIES, settings(scaling_factor=0), 0)
    assert (ids(selection, Fate.SMALL), ids(selection, Fate.SUB_PIXEL)) == ({1}, {3})


def test_a_bad_box_is_never_a_crop_and_is_counted() -> None:
    outside, flat = [90.0, 10.0, 20.0, 20.0], [10.0, 10.0, 20.0, 0.0]
    boxes = annotations([(1, 1, BOX), (2, 1, outside), (3, 1, BOX), (4, 9, flat)])
    (selection,) = select_boxes(boxes, None, CATEGORIES, settings(), 0)
    assert (ids(selection, Fate.BAD), ids(selection, Fate.UNLISTED)) == ({2}, {4})
    assert skipped(selection, np.full(4, True)) == {"unlisted": 1, "bad": 1}


def test_at_most_so_many_per_category() -> None:
    train = annotations(many(1, 500) + many(2, 50, 1000))
    val = annotations(many(1, 90) + many(3, 30, 1000))
    chosen, measured = select_boxes(train, val, CATEGORIES, settings(), 0)
    assert np.bincount(chosen.categories[chosen.fates == Fate.TRAIN]).tolist() == [200, 50]
    assert len(ids(chosen, Fate.NOT_DRAWN)) == 300
    assert np.bincount(measured.categories[measured.fates == Fate.VAL]).tolist() == [50, 0, 30]


def test_learning_sees_base_categories_alone() -> None:
    train = annotations(many(1, 5) + many(3, 5, 100) + many(9, 5, 200))
    chosen, _ = select_boxes(train, annotations(many(1, 3)), CATEGORIES, settings(), 0)
    assert ids(chosen, Fate.TRAIN) == {0, 1, 2, 3, 4}
    assert ids(chosen, Fate.NOVEL) == set(range(100, 105))
    assert ids(chosen, Fate.UNLISTED) == set(range(200, 205))


def test_without_validation_boxes_a_tenth_is_held_out_and_novel_boxes_only_measure() -> None:
    train = annotations(many(1, 400) + many(2, 3, 1000) + many(3, 70, 2000))
    (chosen,) = select_boxes(train, None, CATEGORIES, settings(), 0)
    by_category = [np.bincount(chosen.fates[chosen.categories == row], minlength=7).tolist() for row in range(3)]
    assert by_category[0] == [180, 20, 0, 0, 0, 0, 200]
    assert by_category[1] == [2, 1, 0, 0, 0, 0, 0]
    assert by_category[2] == [0, 50, 0, 0, 0, 0, 20]


def test_a_single_box_is_learned_from_rather_than_held_out() -> None:
    (chosen,) = select_boxes(annotations(many(1, 1)), None, CATEGORIES, settings(), 0)
    assert ids(chosen, Fate.TRAIN) == {0}


def test_the_draw_depends_on_the_seed_and_on_nothing_else() -> None:
    data = settings(crops_per_category=20)
    (one,) = select_boxes(annotations(many(1, 300)), None, CATEGORIES, data, 0)
    (same,) = select_boxes(annotations(many(2, 77, 5000) + many(1, 300), images=7), None, CATEGORIES, data, 0)
    (other,) = select_boxes(annotations(many(1, 300)), None, CATEGORIES, data, 1)
    drawn = ids(one, Fate.TRAIN)
    assert len(drawn) == 18
    assert drawn == {number for number in ids(same, Fate.TRAIN) if number < 5000}
    assert len(drawn & ids(other, Fate.TRAIN)) < 9


def test_a_larger_draw_contains_the_smaller_one() -> None:
    boxes, val = annotations(many(1, 300)), annotations(many(1, 3))
    small = select_boxes(boxes, val, CATEGORIES, settings(crops_per_category=20), 0)[0]
    large = select_boxes(boxes, val, CATEGORIES, settings(crops_per_category=60), 0)[0]
    assert ids(small, Fate.TRAIN) < ids(large, Fate.TRAIN)


def test_the_draw_favours_no_part_of_the_file() -> None:
    boxes, val = annotations(many(1, 4000)), annotations(many(1, 3))
    thirds = np.zeros(3)
    for seed in range(20):
        drawn = select_boxes(boxes, val, CATEGORIES, settings(crops_per_category=300), seed)[0]
        thirds += np.histogram(sorted(ids(drawn, Fate.TRAIN)), bins=3, range=(0, 4000))[0]
    assert np.abs(thirds - 2000).max() < 5 * np.sqrt(2000 * 2 / 3)  # five standard deviations


def test_every_image_is_in_one_shard_and_shards_are_even() -> None:
    shards = shard_of(np.arange(10_000), 8)
    assert np.array_equal(shards, shard_of(np.arange(10_000), 8))
    assert np.abs(np.bincount(shards, minlength=8) - 1250).max() < 200
    assert set(shard_of(np.arange(10_000), 1).tolist()) == {0}


def test_skipped_counts_by_reason() -> None:
    boxes = annotations([*many(1, 3), (50, 1, [1, 1, 2, 2]), (60, 9, BOX)])
    (selection,) = select_boxes(boxes, None, CATEGORIES, settings(crops_per_category=2), 0)
    everything = np.ones(5, bool)
    assert skipped(selection, everything) == {"small": 1, "unlisted": 1, "not_drawn": 1}
    assert skipped(selection, ~everything) == {}


def test_no_base_box_at_all_is_bad_input() -> None:
    boxes = annotations([(1, 1, [1, 1, 2, 2]), *many(3, 5, 10)])
    with pytest.raises(BadInput) as raised:
        select_boxes(boxes, None, CATEGORIES, settings(), 0)
    assert str(raised.value) == (
        "boxes.json: all base categories are empty, since none has a box of at least 20 square pixels; correct the "
        "category list or lower data.min_area."
    )
