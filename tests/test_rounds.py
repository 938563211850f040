"""The graph of a run: it is closed, ordered, and says where a stage can run."""

from __future__ import annotations

import pytest

from rpl.errors import BadInput
from rpl.rounds import (
    AFTER_ROUNDS,
    BEFORE_ROUNDS,
    NOVEL,
    ROUND,
    STAGES,
    Node,
    edges,
    goes_on,
    parse_round,
    shard_key,
    sources,
)


def order(rounds: int) -> list[Node]:
    nodes = [Node(stage) for stage in BEFORE_ROUNDS]
    nodes += [Node(stage, number) for number in range(1, rounds + 1) for stage in ROUND]
    nodes += [Node(stage, "novel") for stage in NOVEL]
    return nodes + [Node(stage) for stage in AFTER_ROUNDS]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_everything_read_was_written_before(rounds: int) -> None:
    done: set[Node] = set()
    for node in order(rounds):
        for edge in edges(node):
            for source in sources(node, edge, rounds):
                assert source in done, f"{node} reads {source} before it is there"
        done.add(node)


def test_every_stage_is_walked_and_every_walked_stage_exists() -> None:
    assert {node.stage for node in order(1)} == set(STAGES)


def test_the_first_round_learns_from_crops_alone() -> None:
    by_name = {edge.name: edge for edge in edges(Node("learn", 1))}
    assert sources(Node("learn", 1), by_name["previous_sourced"], 0) == []
    assert sources(Node("learn", 3), by_name["previous_sourced"], 0) == [Node("curate", 2)]


def test_only_parts_cut_alike_are_read_part_by_part() -> None:
    for node in order(2):
        for edge in edges(node):
            if edge.by_shard:
                for source in sources(node, edge, 2):
                    assert shard_key(source) == shard_key(node)


def test_paths() -> None:
    assert [Node("crop").path, Node("learn", 2).path, Node("embed", "novel").path] == [
        "crop", "round-2/learn", "novel/embed",
    ]  # fmt: skip


def test_a_stage_refuses_a_scope_that_is_not_its_own() -> None:
    with pytest.raises(BadInput, match=r"^stage learn does not run at 'learn'; give it --round N\.$"):
        edges(Node("learn"))
    with pytest.raises(BadInput, match=r"^stage crop does not run at 'round-1/crop'; give it no --round\.$"):
        edges(Node("crop", 1))
    with pytest.raises(BadInput, match=r"^there is no stage 'lern'; choose one of crop, "):
        edges(Node("lern"))


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([], True),
        ([0.5], True),
        ([0.5, 0.6], True),
        ([0.5, 0.501], False),
        ([0.5, 0.4], False),
        ([0.5, 0.6, 0.55], False),
        ([0.5, 0.6, 0.7, 0.8], False),
        ([None, None], True),
    ],
)
def test_rounds_go_on_while_accuracy_rises(accuracies: list[float | None], expected: bool) -> None:
    assert goes_on(accuracies, max_rounds=4, min_gain=0.002) is expected


def test_parse_round() -> None:
    assert [parse_round(text) for text in (None, "novel", "12")] == [None, "novel", 12]
    for text in ("0", "-1", "1.5", "last", "٣"):
        with pytest.raises(BadInput, match="is neither a number from 1 nor 'novel'"):
            parse_round(text)
