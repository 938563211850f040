"""The graph of a run, once, as data: stages, what each reads, how it fans out, what it runs on.

Knows nothing of how stages are run. The local runner walks it, `rpl.stage` takes digests along it, and a test
compares Argo's YAML with it.

A node is a stage at a scope: once per run (`crop`), in a round (`round-1/learn`) or in the final pass over novel
categories (`novel/retrieve`). Its path is its folder in the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rpl.errors import BadInput

Round = int | Literal["novel"] | None
"""A round from 1, the novel pass, or None for a stage that runs once."""

At = Literal["once", "same", "previous", "rounds", "novel"]
"""Where an input lives: once per run, the reader's own round, the round before, all rounds, the novel pass."""


@dataclass(frozen=True)
class Node:
    """A stage at a scope."""

    stage: str
    round: Round = None

    @property
    def path(self) -> str:
        if self.round is None:
            return self.stage
        return f"{self.round}/{self.stage}" if self.round == "novel" else f"round-{self.round}/{self.stage}"

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class Edge:
    """One input of a stage, under the name by which the stage's code asks for it."""

    name: str
    stage: str
    at: At
    by_shard: bool = False
    """True: shard i reads the producer's shard i alone; False: it reads all shards."""


@dataclass(frozen=True)
class Stage:
    """What there is to know of a stage without running it."""

    name: str
    title: str
    image: Literal["light", "clip"]
    gpu: bool
    sections: tuple[str, ...]
    """Config sections its outputs depend on; part of its digest."""
    once: tuple[Edge, ...] | None = None
    """Inputs where it runs once per run; None: it does not."""
    in_round: tuple[Edge, ...] | None = None
    in_novel: tuple[Edge, ...] | None = None
    shards: Literal["crop", "download"] | None = None
    """The key under `shards` that says into how many parts it is cut; None: one part."""
    version: int = 1
    """Raise it when the same inputs give other outputs: part of the digest, so finished runs stay valid until then."""


CROPS = Edge("crops", "crop", "once")
CROP_FEATURES = Edge("crop_features", "encode", "once")
INDEX = Edge("index", "index", "once")
EMBEDDINGS = Edge("embeddings", "embed", "same")
CANDIDATES = Edge("candidates", "retrieve", "same")
DOWNLOADS = Edge("downloads", "download", "same")
WEB_FEATURES = Edge("web_features", "encode", "same")
CURATE_INPUTS = (CROPS, CROP_FEATURES, EMBEDDINGS, DOWNLOADS, WEB_FEATURES)

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "crop", "Crop objects out of the annotated images", "light", False,
            ("seed", "data", "categories"), once=(), shards="crop",
        ),
        Stage(
            "encode", "Encode pictures with CLIP", "clip", True, ("seed", "clip"),
            once=(Edge("crops", "crop", "once", by_shard=True),),
            in_round=(Edge("downloads", "download", "same", by_shard=True),),
            in_novel=(Edge("downloads", "download", "same", by_shard=True),),
            shards="crop",
        ),
        Stage("index", "Check the pool and index it", "light", False, ("pool",), once=()),
        Stage(
            "learn", "Learn the prompt's context vectors", "clip", True, ("seed", "clip", "learn"),
            version=3, in_round=(
                CROPS, CROP_FEATURES,
                Edge("previous_prompts", "learn", "previous"),
                Edge("previous_sourced", "curate", "previous"),
                Edge("previous_web_features", "encode", "previous"),
            ),
        ),
        Stage(
            "embed", "Embed the categories and measure accuracy", "clip", True, ("seed", "clip", "evaluate"),
            in_round=(CROPS, CROP_FEATURES, Edge("prompts", "learn", "same")),
            in_novel=(
                CROPS, CROP_FEATURES, Edge("prompts", "learn", "rounds"), Edge("round_embeddings", "embed", "rounds"),
            ),
        ),
        Stage(
            "retrieve", "Find the nearest pool images", "light", False, ("pool", "rounds"),
            in_round=(CROPS, INDEX, EMBEDDINGS), in_novel=(CROPS, INDEX, EMBEDDINGS),
        ),
        Stage(
            "download", "Download the candidates safely", "light", False, ("download", "rounds", "previous"),
            in_round=(CROPS, CANDIDATES), in_novel=(CROPS, CANDIDATES), shards="download",
        ),
        Stage(
            "curate", "Keep the first good images of each category", "light", False, ("curate", "rounds", "pool"),
            in_round=CURATE_INPUTS, in_novel=CURATE_INPUTS,
        ),
        Stage(
            "export", "Write the hand-over files", "light", False, (),
            once=(
                CROPS,
                Edge("embeddings", "embed", "novel"),
                Edge("downloads", "download", "novel"),
                Edge("sourced", "curate", "novel"),
            ),
        ),
        Stage(
            "report", "Write the report", "light", False,
            (
                "seed", "data", "categories", "pool", "clip", "learn", "rounds", "download", "curate", "evaluate",
                "previous",
            ),
            once=(
                CROPS, CROP_FEATURES, INDEX,
                Edge("round_prompts", "learn", "rounds"),
                Edge("round_embeddings", "embed", "rounds"),
                Edge("round_downloads", "download", "rounds"),
                Edge("round_sourced", "curate", "rounds"),
                Edge("round_candidates", "retrieve", "rounds"),
                Edge("round_web_features", "encode", "rounds"),
                Edge("novel_embeddings", "embed", "novel"),
                Edge("novel_candidates", "retrieve", "novel"),
                Edge("novel_downloads", "download", "novel"),
                Edge("novel_web_features", "encode", "novel"),
                Edge("novel_sourced", "curate", "novel"),
                Edge("export", "export", "once"),
            ),
        ),
    )
}  # fmt: skip

BEFORE_ROUNDS = ("crop", "encode", "index")
ROUND = ("learn", "embed", "retrieve", "download", "encode", "curate")
NOVEL = ("embed", "retrieve", "download", "encode", "curate")
AFTER_ROUNDS = ("export", "report")


def edges(node: Node) -> tuple[Edge, ...]:
    """The inputs of `node`.

    Raises:
        BadInput: the stage does not exist at that scope.
    """
    stage = STAGES.get(node.stage)
    if stage is None:
        raise BadInput(f"there is no stage {node.stage!r}; choose one of {', '.join(STAGES)}.")
    found = stage.once if node.round is None else stage.in_novel if node.round == "novel" else stage.in_round
    if found is None:
        wanted = "--round N" if stage.in_round is not None else "no --round"
        raise BadInput(f"stage {node.stage} does not run at {node.path!r}; give it {wanted}.")
    return found


def sources(node: Node, edge: Edge, last_round: int) -> list[Node]:
    """The nodes that `edge` of `node` reads, in order; `last_round` is the number of rounds that were run."""
    if edge.at == "once":
        return [Node(edge.stage)]
    if edge.at == "same":
        return [Node(edge.stage, node.round)]
    if edge.at == "previous":
        assert isinstance(node.round, int)
        return [Node(edge.stage, node.round - 1)] if node.round > 1 else []
    if edge.at == "rounds":
        return [Node(edge.stage, n) for n in range(1, last_round + 1)]
    return [Node(edge.stage, "novel")]


def round_nodes(number: int) -> Iterator[Node]:
    return (Node(stage, number) for stage in ROUND)


def shard_key(node: Node) -> Literal["crop", "download"] | None:
    """The key under `shards` for `node`; encode is cut as whatever it encodes is cut."""
    if node.stage == "encode" and node.round is not None:
        return "download"
    return STAGES[node.stage].shards


def goes_on(accuracies: list[float | None], max_rounds: int, min_gain: float) -> bool:
    """Whether another round follows the ones with these base validation accuracies (fractions, in order).

    Round 2 always follows round 1 if allowed, since it is the first to see sourced images; after that a round must
    have beaten all before it by more than `min_gain`. Where accuracy could not be measured (None: no validation
    crops), there is nothing to stop by and all rounds are run.
    """
    done = len(accuracies)
    if done >= max_rounds:
        return False
    measured = [accuracy for accuracy in accuracies if accuracy is not None]
    return done < 2 or len(measured) < done or measured[-1] > max(measured[:-1]) + min_gain


def parse_round(text: str | None) -> Round:
    """`None`, `"novel"` or a round from 1, from the command line's text; "once" is None too."""
    if text is None or text == "once":
        return None
    if text == "novel":
        return "novel"
    if re.fullmatch(r"[1-9]\d{0,3}", text):
        return int(text)
    raise BadInput(f"--round {text!r} is neither a number from 1 nor 'novel'; correct it.")
