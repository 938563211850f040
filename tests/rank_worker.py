"""What each rank does in test_ranks.py: learn every case, and say what came out and who took which passes.

`python -m tests.rank_worker FOLDER`, under torchrun; FOLDER holds the CLIP, and gets rank-N.json of each rank.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rpl import objective, prompts
from rpl.clip import ClipModel, load_clip, reproducible
from rpl.config import DEFAULT_LAYOUT, Clip, Learn
from rpl.learning import fast, learn
from rpl.ranks import Ranks, joined
from rpl.text_tower import TextTower
from tests.learning_tasks import MANY_NAMES, make_task

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fast": ({"max_iterations": 8}, {}),
    "fast, raced among a sample": ({"max_iterations": 8}, {"names": MANY_NAMES}),
    "reference": ({"schedule": "reference"}, {}),
    "class-specific": ({"max_iterations": 8}, {"class_specific": True}),
    "two layouts": ({"max_iterations": 8}, {"layouts": [DEFAULT_LAYOUT, "a {ctx1} photo of {name}, {ctx2}"]}),
}
"""Settings of `learn` and of the task."""


def settings(folder: Path) -> Clip:
    return Clip(model=str(folder / "model.json"), pretrained=str(folder / "weights.safetensors"))


def learn_cases(clip: ClipModel, ranks: Ranks) -> dict[str, Any]:
    """By case: the learned bytes, histories, and how many passes through the tower and blocks of views were ours."""
    return {name: _learn_case(clip, ranks, *case) for name, case in CASES.items()}


def _learn_case(clip: ClipModel, ranks: Ranks, learning: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    mine: Counter[str] = Counter()
    tower, block = TextTower.features, objective._add_block

    def counted_tower(self: TextTower, embeddings_NTW: Tensor, ends_N: Tensor) -> Tensor:
        mine["pieces"] += 1
        return tower(self, embeddings_NTW, ends_N)

    def counted_block(*arguments: Any, **named: Any) -> None:
        mine["blocks"] += 1
        block(*arguments, **named)

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, reproducible():
        # So small that there is work for several ranks.
        patch.setattr(prompts, "_TOKENS_AT_ONCE", {"cpu": 32})
        patch.setattr(objective, "_LOGITS_AT_ONCE", {"cpu": 64})
        patch.setattr(fast, "RACE_CATEGORIES", 4)
        patch.setattr(fast, "RACE_IMAGES", 0)
        patch.setattr(TextTower, "features", counted_tower)
        patch.setattr(objective, "_add_block", counted_block)
        torch.set_num_threads(1)
        try:
            problem = make_task(clip, ranks=ranks, **task)
            mine.clear()  # the features of its pictures were made by all ranks together, too
            learned = learn(problem, Learn.model_validate(learning), 0, lambda _step: None)
        finally:
            torch.set_num_threads(threads)
    histories = [learned.history, [learned.kept], *learned.race]
    return {
        "context": learned.context.numpy().tobytes().hex(),
        "histories": [[repr(step) for step in history] for history in histories],
        "mine": dict(mine),
    }


def main(folder: Path) -> None:
    with joined() as ranks:
        found = learn_cases(load_clip(settings(folder), "cpu"), ranks)
        (folder / f"rank-{ranks.index}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
