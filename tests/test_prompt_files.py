"""Context vectors in files: ours and the reference's, round trips, and nothing believed that a file says."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rpl.config import DEFAULT_LAYOUT
from rpl.encoder import Encoder
from rpl.errors import BadInput
from rpl.prompt_files import (
    Prompts,
    read_prompts,
    read_reference_checkpoint,
    write_prompts,
    write_reference_checkpoint,
)

ENCODER = Encoder("ViT-B-32", "openai", "ab" * 32, 512)


def prompts(n_ctx1: int = 1, n_ctx2: int = 2) -> Prompts:
    generator = torch.Generator().manual_seed(0)
    ctx1, ctx2 = (torch.randn((n, 8), generator=generator) for n in (n_ctx1, n_ctx2))
    return Prompts(ctx1, ctx2, ENCODER, {"schedule": "fast", "seed": 3, "holdout": 0.1})


def test_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    given = prompts()
    write_prompts(tmp_path / "a.safetensors", given)
    write_prompts(tmp_path / "b.safetensors", given)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = read_prompts(tmp_path / "a.safetensors")
    assert torch.equal(found.ctx1, given.ctx1) and torch.equal(found.ctx2, given.ctx2)
    assert (found.encoder, found.settings) == (given.encoder, given.settings)
    assert torch.equal(found.context, torch.cat([given.ctx1, given.ctx2]))


def class_specific(names: tuple[str, ...] = ("cat", "犬"), **settings: Any) -> Prompts:
    generator = torch.Generator().manual_seed(0)
    ctx1, ctx2 = (torch.randn((len(names), n, 8), generator=generator) for n in (1, 2))
    return Prompts(ctx1, ctx2, ENCODER, settings, names)


def test_class_specific_round_trip(tmp_path: Path) -> None:
    given = class_specific(layouts=["{ctx1} {name} {ctx2}", "{ctx2} {name} {ctx1}"])
    write_prompts(tmp_path / "a.safetensors", given)
    write_prompts(tmp_path / "b.safetensors", given)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = read_prompts(tmp_path / "a.safetensors")
    assert torch.equal(found.ctx1, given.ctx1) and torch.equal(found.ctx2, given.ctx2)
    assert (found.names, found.settings, found.encoder) == (given.names, given.settings, given.encoder)
    assert found.layouts == ("{ctx1} {name} {ctx2}", "{ctx2} {name} {ctx1}")
    assert torch.equal(found.context, torch.cat([given.ctx1, given.ctx2], dim=1))


def test_a_file_that_names_no_layout_was_learned_in_the_default_one(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.safetensors", prompts())
    assert read_prompts(tmp_path / "a.safetensors").layouts == (DEFAULT_LAYOUT,)


def test_categories_get_their_own_context_and_unknown_ones_the_mean() -> None:
    given = class_specific(("cat", "犬", "cup"))
    found = given.context_for(["犬", "dog", "cat", "犬"])
    assert found.shape == (4, 3, 8)
    assert torch.equal(found[[0, 2, 3]], given.context[[1, 0, 1]])
    torch.testing.assert_close(found[1], (given.context[0] + given.context[1] + given.context[2]) / 3)
    assert torch.equal(prompts().context_for(["犬", "dog"]), prompts().context), "a shared one is everybody's"


@pytest.mark.parametrize(
    "change",
    [
        {"names": None}, {"names": "ab"}, {"names": ["cat", 7]}, {"names": []}, {"names": {"cat": 1, "cup": 2}},
        {"settings": {"layouts": "{ctx1} {name} {ctx2}"}}, {"settings": {"layouts": ["{ctx1} {name}"]}},
        {"settings": {"layouts": []}}, {"settings": {"layouts": 5}}, {"settings": None}, {"encoder": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_head_that_says_other_things_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "prompts.safetensors"
    head = {"format": "rpl-prompts-1", "encoder": ENCODER.to_facts(), "settings": {}, "names": ["cat", "cup"]}
    tensors = {"ctx1": torch.zeros(2, 1, 8), "ctx2": torch.zeros(2, 1, 8)}
    save_file(tensors, path, metadata={"rpl": json.dumps(head)})
    assert read_prompts(path).names == ("cat", "cup")
    save_file(tensors, path, metadata={"rpl": json.dumps({**head, **change})})
    with pytest.raises(BadInput) as caught:
        read_prompts(path)
    assert str(caught.value) == (
        f"{path}: does not hold learned prompts; give a prompts.safetensors that learn wrote."
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "wrong"),
    [
        (((2, 1, 8), (3, 1, 8)), "ctx2"),
        (((3, 1, 8), (2, 1, 8)), "ctx1"),
        (((1, 8), (2, 1, 8)), "ctx1"),
        (((2, 1, 8), (2, 1, 1, 8)), "ctx2"),
    ],
)
def test_class_specific_contexts_have_a_row_for_each_name(
    tmp_path: Path, shapes: tuple[tuple[int, ...], tuple[int, ...]], wrong: str
) -> None:
    path = tmp_path / "prompts.safetensors"
    write_prompts(path, Prompts(torch.zeros(shapes[0]), torch.zeros(shapes[1]), ENCODER, {}, ("cat", "cup")))
    with pytest.raises(BadInput) as caught:
        read_prompts(path)
    assert str(caught.value) == (
        f"{path}: {wrong} is not a table of context vectors; give a file of learned prompts."
    )  # fmt: skip


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.safetensors"
    sentence = f"{path}: does not hold learned prompts; give a prompts.safetensors that learn wrote."
    path.write_bytes(b"{}")
    for write in (lambda: None, lambda: save_file({"ctx1": torch.zeros(1, 8)}, path), path.unlink):
        write()
        with pytest.raises(BadInput) as caught:
            read_prompts(path)
        assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"ctx1": torch.full((1, 8), torch.nan)}, "ctx1 holds values that are not numbers; learn the prompts again."),
        ({"ctx1": torch.zeros(2, 1, 8)}, "ctx1 is not a table of context vectors; give a file of learned prompts."),
        ({"ctx2": torch.zeros(1, 8).int()}, "ctx2 is not a table of context vectors; give a file of learned prompts."),
        ({"ctx2": torch.zeros(8)}, "ctx2 is not a table of context vectors; give a file of learned prompts."),
        ({"ctx2": torch.zeros(1, 9)}, "ctx1 and ctx2 differ in width (8, 9); learn them again."),
    ],
)
def test_wrong_numbers_are_refused(tmp_path: Path, change: dict[str, torch.Tensor], problem: str) -> None:
    path = tmp_path / "prompts.safetensors"
    state = {"ctx1": torch.zeros(1, 8), "ctx2": torch.zeros(1, 8), **change}
    write_prompts(path, Prompts(state["ctx1"], state["ctx2"], ENCODER, {}))
    with pytest.raises(BadInput) as caught:
        read_prompts(path)
    assert str(caught.value) == f"{path}: {problem}"


def reference_checkpoint(ctx1: torch.Tensor, ctx2: torch.Tensor) -> dict[str, Any]:
    """What the reference's trainer saves: its scheduler's state holds another scheduler, which holds the optimiser."""
    parameter = torch.nn.Parameter(ctx1.clone())
    optimiser = torch.optim.SGD([parameter], lr=0.002, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 6)
    parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    state = OrderedDict(ctx1=ctx1, ctx2=ctx2, embedding=torch.zeros((3, 77, ctx1.shape[1]), dtype=ctx1.dtype))
    scheduler = {"successor": cosine, "warmup_epoch": 1, "cons_lr": 1e-5, "base_lrs": [0.002], "last_epoch": 1}
    return {"state_dict": state, "epoch": 6, "optimizer": optimiser.state_dict(), "scheduler": scheduler}


def test_the_references_checkpoints_are_read_without_running_code(tmp_path: Path) -> None:
    given = prompts(1, 1)
    torch.save(reference_checkpoint(given.ctx1.half(), given.ctx2.half()), tmp_path / "model.pth.tar-6")
    ctx1, ctx2, epoch = read_reference_checkpoint(tmp_path / "model.pth.tar-6")
    assert ctx1.dtype == torch.float32 and epoch == 6
    assert torch.equal(ctx1, given.ctx1.half().float()) and torch.equal(ctx2, given.ctx2.half().float())


def test_what_is_written_is_what_the_reference_reads(tmp_path: Path) -> None:
    given, path = prompts(1, 1), tmp_path / "model.pth.tar-6"
    write_reference_checkpoint(path, given.ctx1, given.ctx2, 6, torch.zeros(3, 77, 8))
    raw = torch.load(path, weights_only=True)
    assert list(raw) == ["state_dict", "epoch", "optimizer", "scheduler"]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in raw["state_dict"].items()} == {
        "ctx1": (torch.float16, (1, 8)), "ctx2": (torch.float16, (1, 8)), "embedding": (torch.float16, (3, 77, 8)),
    }  # fmt: skip
    ctx1, _, epoch = read_reference_checkpoint(path)
    assert epoch == 6 and torch.equal(ctx1, given.ctx1.half().float())
    write_reference_checkpoint(path, given.ctx1, given.ctx2, 6, None)
    assert list(torch.load(path, weights_only=True)["state_dict"]) == ["ctx1", "ctx2"]


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = tmp_path / "model.pth.tar-6"
    contents: list[Any] = [{"state_dict": Attack(), "epoch": 6}, {"epoch": 6}, [1, 2]]
    for content in contents:
        torch.save(content, path)
        with pytest.raises(BadInput) as caught:
            read_reference_checkpoint(path)
        assert str(caught.value) == (
            f"{path}: is not a checkpoint of the reference's prompt learner; give a model.pth.tar-N of its output."
        )
    path.write_bytes(pickle.dumps(Attack(), protocol=2))
    with pytest.raises(BadInput):
        read_reference_checkpoint(path)
    assert not (tmp_path / "ran").exists()
