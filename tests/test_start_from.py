"""Prompts that were learned elsewhere: started from, used as they are, handed over, refused where they do not fit."""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np
import pytest
import torch

from rpl.clip import load_clip
from rpl.config import parse_config
from rpl.errors import BadInput
from rpl.prompt_files import Prompts, read_prompts, read_reference_checkpoint, write_prompts, write_reference_checkpoint
from rpl.rounds import Node
from rpl.stage import Run
from tests.clip_models import write_clip
from tests.small_run import do, install_light_stages, make_small_run, path

WIDTH = 32
AS_THEY_ARE = {"starts": 0, "max_iterations": 0}


@pytest.fixture(autouse=True)
def light_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    install_light_stages(monkeypatch)


def given_vectors() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randn((2, 1, WIDTH), generator=torch.Generator().manual_seed(8)) * 0.05
    return drawn[0].half().float(), drawn[1].half().float()


def reference_file(folder: Path) -> Path:
    file = folder / "model.pth.tar-6"
    write_reference_checkpoint(file, *given_vectors(), 6, None)
    return file


def small_run(folder: Path, **learn: object) -> Run:
    return make_small_run(folder, str(folder / f"run-{secrets.token_hex(4)}"), **learn)


def learned(run: Run) -> Prompts:
    (manifest,) = do(run, "crop", "encode") and do(run, "learn", round_=1)
    return read_prompts(path(run, manifest, "prompts.safetensors"))


def test_a_checkpoint_of_the_reference_is_used_as_it_is(tmp_path: Path) -> None:
    run = small_run(tmp_path, start_from=str(reference_file(tmp_path)), **AS_THEY_ARE)
    found = learned(run)
    torch.testing.assert_close((found.ctx1, found.ctx2), given_vectors(), rtol=0, atol=0)


def test_prompts_of_another_run_race_with_the_drawn_ones(tmp_path: Path) -> None:
    first = learned(small_run(tmp_path))
    file = tmp_path / "prompts.safetensors"
    write_prompts(file, first)
    goes_on = small_run(tmp_path, start_from=str(file), starts=2, max_iterations=1)
    anew = small_run(tmp_path, starts=2, max_iterations=1)
    losses = []
    for run in (goes_on, anew):
        (manifest,) = do(run, "crop", "encode") and do(run, "learn", round_=1)
        losses.append(manifest.facts["loss"])
    assert losses[0] < losses[1]


def test_a_changed_file_is_new_work(tmp_path: Path) -> None:
    file = reference_file(tmp_path)
    run = small_run(tmp_path, start_from=str(file), **AS_THEY_ARE)
    do(run, "crop", "encode")
    do(run, "learn", round_=1)
    write_reference_checkpoint(file, *(vectors * 2 for vectors in given_vectors()), 6, None)
    assert Run(run.uri).manifests(Node("learn", 1)) is None


def test_what_was_learned_is_a_checkpoint_of_the_reference_too(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    own = learned(run)
    (manifest,) = do(run, "learn", round_=1)
    ctx1, ctx2, epoch = read_reference_checkpoint(path(run, manifest, "model.pth.tar"))
    torch.testing.assert_close((ctx1, ctx2), (own.ctx1.half().float(), own.ctx2.half().float()), rtol=0, atol=0)
    assert epoch == run.config.clip.views


@pytest.mark.parametrize("kind", ["shared", "class-specific"])
def test_vectors_of_another_number_are_refused(tmp_path: Path, kind: str) -> None:
    file = reference_file(tmp_path)
    run = small_run(tmp_path, start_from=str(file), n_ctx1=4, class_specific=kind == "class-specific")
    do(run, "crop", "encode")
    with pytest.raises(BadInput) as caught:
        do(run, "learn", round_=1)
    assert str(caught.value) == (
        f"{file}: holds 1 + 1 context vectors of width {WIDTH}, and this run learns 4 + 1 of width {WIDTH}; "
        "set learn.n_ctx1 and n_ctx2, or give others."
    )


def test_prompts_of_another_clip_are_refused(tmp_path: Path) -> None:
    other = load_clip(write_clip(tmp_path / "other", seed=5), "cpu")
    file = tmp_path / "prompts.safetensors"
    write_prompts(file, Prompts(*given_vectors(), other.identity, {}))
    run = small_run(tmp_path, start_from=str(file))
    do(run, "crop", "encode")
    with pytest.raises(
        BadInput, match=r"was learned with model\.json weights\.safetensors .*; give prompts of this CLIP"
    ):
        do(run, "learn", round_=1)


def test_class_specific_vectors_may_start_from_shared_ones(tmp_path: Path) -> None:
    run = small_run(tmp_path, start_from=str(reference_file(tmp_path)), class_specific=True, **AS_THEY_ARE)
    found = learned(run)
    assert found.names == ("cat", "cup", "tent") and found.ctx1.shape == (3, 1, WIDTH)
    assert np.allclose(found.ctx1, given_vectors()[0])


def test_no_start_at_all_is_refused() -> None:
    text = "run: r\ndata: {train: {annotations: a, images: i}}\npool: {vectors: v}\nlearn: {starts: 0}\n"
    with pytest.raises(BadInput) as caught:
        parse_config(text, "my.yaml")
    assert str(caught.value) == (
        "my.yaml: key 'learn': Value error, starts: 0 needs start_from, or there is nothing to learn from; "
        "correct the value."
    )
