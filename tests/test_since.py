"""What changed between two records, against a plain count, and on records with nothing in them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from rpl.report.model import CategoryChange, Move
from rpl.report.since import CATEGORIES_SHOWN, COLUMNS, MOVES_SHOWN, addresses, compare

SCHEMA = pa.schema(
    [("category_name", pa.string()), ("url", pa.string()), ("rank", pa.int32()), ("status", pa.string()),
     ("reason", pa.string())]
)  # fmt: skip


def record(*rows: tuple[str, str, int, str, str | None]) -> pa.Table:
    """Rows of category, address, rank, status and reason, with another column as the true record has."""
    table = pa.Table.from_pylist([dict(zip(COLUMNS, row, strict=True)) for row in rows], SCHEMA)
    return table.append_column("score", pa.array([0.5] * len(rows), pa.float32()))


def test_new_gone_in_both_and_moved() -> None:
    then = record(
        ("cat", "a", 0, "kept", None), ("cat", "b", 1, "kept", None), ("cat", "c", 2, "kept", None),
        ("cat", "d", 3, "spare", None), ("dog", "a", 0, "kept", None), ("dog", "e", 1, "failed", "not_found"),
    )  # fmt: skip
    now = record(
        ("cat", "b", 0, "kept", None), ("cat", "c", 2, "failed", "not_found"), ("cat", "d", 5, "kept", None),
        ("dog", "a", 0, "kept", None), ("dog", "e", 1, "kept", None),
    )  # fmt: skip
    found = compare(then, now)
    assert (found.new, found.gone, found.stayed, found.moved) == (2, 2, 2, 1)
    assert found.gone_because == {"not_a_candidate": 1, "not_found": 1}
    assert found.moves == (Move("cat", "b", 1, 0),)
    assert found.categories == (CategoryChange("cat", 1, 2, 1, 1), CategoryChange("dog", 1, 0, 1, 0))
    assert [(each.then, each.now) for each in found.categories] == [(3, 2), (1, 2)]


def test_why_a_picture_is_gone() -> None:
    fates = [("spare", None), ("not_needed", None), ("refused", "duplicate"), ("failed", "denied"), ("spare", None)]
    then = record(*(("cat", str(n), n, "kept", None) for n in range(6)))
    now = record(*(("cat", str(n), n, status, reason) for n, (status, reason) in enumerate(fates)))
    because = compare(then, now).gone_because
    assert list(because.items()) == [
        ("spare", 2), ("denied", 1), ("duplicate", 1), ("not_a_candidate", 1), ("not_needed", 1),
    ]  # fmt: skip


def test_an_address_twice_among_a_category_s_candidates_is_one_picture() -> None:
    twice = record(("cat", "a", 1, "refused", "duplicate"), ("cat", "a", 4, "kept", None))
    once = record(("cat", "a", 4, "kept", None))
    assert compare(twice, once) == compare(once, twice) == compare(once, once)
    assert compare(once, record(("cat", "a", 1, "refused", "duplicate"), ("cat", "a", 3, "not_needed", None))) == (
        compare(once, record(("cat", "a", 1, "refused", "duplicate")))
    ), "its first row says why it is gone"


def test_empty_records() -> None:
    empty, one = record(), record(("cat", "a", 0, "kept", None))
    nothing = compare(empty, empty)
    assert (nothing.new, nothing.gone, nothing.stayed, nothing.moved) == (0, 0, 0, 0)
    assert (nothing.moves, nothing.categories, nothing.gone_because) == ((), (), {})
    assert compare(empty, one).new == 1 == compare(one, empty).gone
    assert compare(one, empty).gone_because == {"not_a_candidate": 1}


def test_tables_are_bounded_and_the_largest_come_first() -> None:
    then = record(*((f"c{n:02}", "x", n, "kept", None) for n in range(40)))
    now = record(*((f"c{n:02}", "x", 2 * n, "kept", None) for n in range(40)), ("quiet", "y", 0, "kept", None))
    found = compare(then, now)
    assert [move.category for move in found.moves] == [f"c{n:02}" for n in range(39, 39 - MOVES_SHOWN, -1)]
    assert len(found.categories) == CATEGORIES_SHOWN and found.categories_changed == 40
    assert found.categories[0].name == "quiet", "a new picture is more than a move"
    assert found.moved == 39


ROWS = st.lists(
    st.tuples(
        st.sampled_from("cd"), st.sampled_from("abc"), st.integers(0, 5),
        st.sampled_from(["kept", "spare", "failed"]), st.none(),
    ),
    max_size=8, unique_by=lambda row: row[:2],
)  # fmt: skip


@given(ROWS, ROWS)
def test_the_counts_are_those_of_sets(one: list[Any], other: list[Any]) -> None:
    then, now = ({row[:2]: row[2] for row in rows if row[3] == "kept"} for rows in (one, other))
    found = compare(record(*one), record(*other))
    assert found.new == len(set(now) - set(then)) == sum(each.new for each in found.categories)
    assert found.gone == len(set(then) - set(now)) == sum(found.gone_because.values())
    assert found.stayed == len(set(then) & set(now))
    assert found.moved == sum(now[place] != then[place] for place in set(then) & set(now)) == len(found.moves)
    assert compare(record(*reversed(one)), record(*reversed(other))) == found, "whatever the order of rows"
    back = compare(record(*other), record(*one))
    assert (back.new, back.gone, back.stayed, back.moved) == (found.gone, found.new, found.stayed, found.moved)


def test_addresses_are_added_up_over_shards() -> None:
    facts = [{"urls": 3, "reused": 2, "asked_again": 1, "revived": 0}, {"reused": 1, "asked_again": 1, "revived": 1}]
    assert addresses(facts) == {"reused": 3, "asked_again": 2, "revived": 1}
    assert addresses([]) == {"reused": 0, "asked_again": 0, "revived": 0}
