"""That learning and encoding put every tensor on the model's device, seen without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rpl.clip import ClipModel, load_clip
from rpl.config import DEFAULT_LAYOUT, Learn
from rpl.learning import learn
from rpl.prompts import PromptBank
from tests.clip_models import write_clip
from tests.learning_tasks import MANY_NAMES, make_task
from tests.pretend_gpu import DEVICE, Away, PretendGpu

TWO_LAYOUTS = [DEFAULT_LAYOUT, "{name} {ctx1} {ctx2} ."]


def test_the_pretended_device_minds_where_tensors_are() -> None:
    with PretendGpu():
        away = torch.ones(3).to(DEVICE)
        assert isinstance(away, Away)
        assert (away * 2).cpu().tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="same device"):
            away + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(3)[torch.zeros(2, dtype=torch.int64).to(DEVICE)]


@pytest.mark.parametrize("schedule", ["fast", "reference"])
@pytest.mark.parametrize(("class_specific", "layouts"), [(False, TWO_LAYOUTS[:1]), (True, TWO_LAYOUTS)])
def test_learning_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, class_specific: bool, layouts: list[str]
) -> None:
    monkeypatch.setattr("rpl.learning.fast.RACE_IMAGES", 100)
    monkeypatch.setattr("rpl.learning.fast.VIEWS", 3000)
    settings = Learn.model_validate({"schedule": schedule, "max_iterations": 3})
    config = write_clip(tmp_path)
    here = make_task(load_clip(config, "cpu"), names=MANY_NAMES, class_specific=class_specific, layouts=layouts)
    want = learn(here, settings, 0, lambda _: None)
    with PretendGpu():
        assert here.holdout is not None
        bank = PromptBank(load_clip(config, "meta").text, here.bank.tokens)
        there = replace(here, bank=bank, train=here.train.to(DEVICE), holdout=here.holdout.to(DEVICE))
        got = learn(there, settings, 0, lambda _: None)
    assert not isinstance(got.context, Away)
    # torch takes another path through attention there, and what that rounds otherwise grows with the steps.
    losses = [[step.loss for step in [*each.race, each.history][0][:2]] for each in (got, want)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(got.history) == len(want.history)


def test_encoding_elsewhere(tmp_path: Path) -> None:
    config = write_clip(tmp_path)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    here = load_clip(config, "cpu")
    images, texts = here.encode_images(here.normalise(pixels)), here.encode_texts(["a cat", "a very long cat"])
    with PretendGpu(), torch.no_grad():
        there = load_clip(config, "meta")
        # Bare of their decorator: tensors of inference mode cannot be wrapped.
        found: list[torch.Tensor] = [
            ClipModel.encode_images.__wrapped__(there, here.normalise(pixels)),
            ClipModel.encode_texts.__wrapped__(there, ["a cat", "a very long cat"]),
        ]
        assert all(isinstance(each, Away) for each in found)
        found = [each.cpu() for each in found]
    torch.testing.assert_close(found, [images, texts], rtol=1e-4, atol=1e-5)
