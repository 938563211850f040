"""The stages encode, learn and embed in a run of two rounds and the novel pass, on a tiny CLIP."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rpl.clip import load_clip
from rpl.config import DEFAULT_LAYOUT
from rpl.errors import BadInput
from rpl.features import FeatureSet
from rpl.manifests import Manifest, Shard
from rpl.prompt_files import read_prompts
from rpl.prompt_tokens import tokenise_prompts
from rpl.prompts import PromptBank
from rpl.rounds import Node
from rpl.stage import Context, Run, run_shard
from tests.fake_stages import QUIET
from tests.prompt_texts import OTHER_LAYOUTS
from tests.small_run import CATEGORIES, VIEWS, crop, do, install_light_stages, make_small_run, path

LAYOUTS = [DEFAULT_LAYOUT, OTHER_LAYOUTS[1]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    install_light_stages(monkeypatch)
    return make_small_run(tmp_path, str(tmp_path / "run"))


def do_round(run: Run, number: int) -> None:
    do(run, "learn", "embed", "retrieve", "download", "encode", "curate", round_=number)


def features(run: Run, manifests: list[Manifest]) -> FeatureSet:
    names = ("features.npy", "features.parquet", "views.npy")
    return FeatureSet(*([path(run, manifest, name) for manifest in manifests] for name in names))


def test_crops_are_encoded_with_views_for_training_alone(run: Run) -> None:
    manifests = do(run, "crop", "encode")
    found = features(run, manifests)
    assert sum(manifest.facts["images"] for manifest in manifests) == len(found.keys) == 52
    assert manifests[0].facts["encoder"] == load_clip(run.config.clip, "cpu").identity.to_facts()
    train = np.flatnonzero(found.split == "train")
    assert found.views(train).shape == (36, VIEWS, 16)
    assert sorted(set(found.split[found.category == 1])) == ["val"]
    lengths = np.linalg.norm(found.features.astype(np.float32), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=2e-3)
    with pytest.raises(BadInput, match="has no views to learn from"):
        found.views(np.flatnonzero(found.split == "val"))


def test_a_round_learns_prompts_and_measures_them(run: Run) -> None:
    do(run, "crop", "encode")
    (learned,) = do(run, "learn", round_=1)
    assert {key: learned.facts[key] for key in ("schedule", "steps", "crops", "sourced")} == {
        "schedule": "fast", "steps": 6, "crops": 36, "sourced": 0,
    }  # fmt: skip
    assert learned.facts["text_passes"] >= 7
    history = json.loads(path(run, learned, "history.json").read_bytes())
    assert [step["step"] for step in history] == list(range(7))
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[0]["holdout_loss"] is not None

    (embedded,) = do(run, "embed", round_=1)
    assert embedded.facts["prompts_digest"] == learned.facts["prompts_digest"]
    assert "best_round" not in embedded.facts
    clip, prompts = load_clip(run.config.clip, "cpu"), read_prompts(path(run, learned, "prompts.safetensors"))
    assert prompts.encoder == clip.identity and prompts.settings["seed"] == run.config.seed
    tokens = tokenise_prompts(clip, [c.name for c in CATEGORIES], [c.description for c in CATEGORIES], 1, 1)
    expected = PromptBank(clip.text, tokens).features(prompts.context)
    text_CD = torch.load(path(run, embedded, "category_embeddings.pt"), weights_only=True)
    assert text_CD.dtype == torch.float32 and text_CD.shape == (4, 16)
    torch.testing.assert_close(text_CD, expected)
    assert np.array_equal(np.load(path(run, embedded, "category_embeddings.npy")), text_CD.numpy())

    manual_TCD = torch.from_numpy(np.load(path(run, embedded, "manual_embeddings.npy")))
    torch.testing.assert_close(manual_TCD[0], clip.encode_texts([f"a photo of {c.name}" for c in CATEGORIES]))
    texts = ["cat, a small animal.", "dog, dog.", "cup, a vessel.", "tent, a shelter."]
    torch.testing.assert_close(manual_TCD[1], clip.encode_texts(texts))


@pytest.mark.parametrize(
    "learn",
    [
        {"class_specific": True},
        {"layouts": LAYOUTS},
        {"class_specific": True, "layouts": LAYOUTS, "n_ctx1": 2},
        {"class_specific": True, "schedule": "reference"},
    ],
    ids=str,
)
def test_other_prompts_are_learned_embedded_and_go_on_in_round_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learn: dict[str, Any]
) -> None:
    install_light_stages(monkeypatch)
    run = make_small_run(tmp_path, str(tmp_path / "run"), **learn)
    do(run, "crop", "encode", "index")
    do_round(run, 1)
    do_round(run, 2)
    clip = load_clip(run.config.clip, "cpu")
    counts, layouts = (learn.get("n_ctx1", 1), 1), learn.get("layouts", [DEFAULT_LAYOUT])
    texts = [each.name for each in CATEGORIES], [each.description for each in CATEGORIES]
    bank = PromptBank(clip.text, tokenise_prompts(clip, *texts, *counts, layouts=layouts))
    for number in (1, 2):
        (learned,), (embedded,) = (run.manifests(Node(stage, number)) or [] for stage in ("learn", "embed"))
        history = json.loads(path(run, learned, "history.json").read_bytes())
        if learn.get("schedule") != "reference":  # whose two steps are on different crops
            assert history[-1]["loss"] < history[0]["loss"]
        prompts = read_prompts(path(run, learned, "prompts.safetensors"))
        assert prompts.layouts == tuple(layouts)
        context = prompts.context
        if learn.get("class_specific"):
            assert prompts.names == ("cat", "cup", "tent")
            assert context.shape == (3, sum(counts), 32)
            assert not torch.equal(context[0], context[1])
            cat, cup, tent = context  # the dog is novel, and takes the mean
            context = torch.stack([cat, context.mean(0), cup, tent])
        else:
            assert prompts.names is None
        text_CD = torch.load(path(run, embedded, "category_embeddings.pt"), weights_only=True)
        torch.testing.assert_close(text_CD, bank.features(context))
    (novel,) = do(run, "embed", round_="novel")
    assert novel.facts["best_round"] in (1, 2)


def nearest(run: Run, manifests: list[Manifest], text_CD: np.ndarray, own: list[int], among: list[int]) -> float:
    """Accuracy by the plainest way."""
    found = features(run, manifests)
    hits: list[bool] = []
    for split, category, feature in zip(found.split, found.category, found.features, strict=True):
        if split == "val" and category in own:
            scores = [float(feature @ text_CD[c]) / float(np.linalg.norm(text_CD[c])) for c in among]
            hits.append(among[int(np.argmax(scores))] == int(category))
    return sum(hits) / len(hits)


def test_the_temperature_divides_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_light_stages(monkeypatch)
    run = make_small_run(tmp_path, str(tmp_path / "run"), temperature=4, max_iterations=0, starts=1, holdout=0)
    clip = load_clip(run.config.clip, "cpu")
    found = features(run, do(run, "crop", "encode"))
    (learned,), (embedded,) = do(run, "learn", round_=1), do(run, "embed", round_=1)
    text_CD = torch.load(path(run, embedded, "category_embeddings.pt"), weights_only=True)[[0, 2, 3]]
    train = np.flatnonzero(found.split == "train")
    views = torch.from_numpy(found.views(train)).float()
    cosines = torch.nn.functional.normalize(views, dim=2) @ torch.nn.functional.normalize(text_CD, dim=1).T
    labels = torch.from_numpy(np.searchsorted([0, 2, 3], found.category[train])).repeat_interleave(VIEWS)
    loss = torch.nn.functional.cross_entropy(cosines.reshape(-1, 3) * clip.logit_scale / 4, labels)
    assert learned.facts["loss"] == pytest.approx(float(loss), rel=1e-3)


def test_accuracies_are_those_of_their_protocol(run: Run) -> None:
    encoded = do(run, "crop", "encode")
    (embedded,) = do(run, "learn", "embed", round_=1)
    facts = embedded.facts["accuracy"]
    assert json.loads(path(run, embedded, "accuracy.json").read_bytes()) == facts
    learned_CD = np.load(path(run, embedded, "category_embeddings.npy"))
    manual_TCD = np.load(path(run, embedded, "manual_embeddings.npy"))
    base, novel, every = [0, 2, 3], [1], [0, 1, 2, 3]

    def both(text_CD: np.ndarray) -> dict[str, float]:
        pairs = {"base": base, "novel": novel}
        return {name: round(nearest(run, encoded, text_CD, own, own), 6) for name, own in pairs.items()}

    assert facts["protocol"] == "base among base, novel among novel"
    assert facts["learned"] == both(learned_CD)
    assert facts["manual"] == both(manual_TCD[0])
    assert facts["templates"] == [
        {"template": template, **both(text_CD)}
        for template, text_CD in zip(run.config.evaluate.templates, manual_TCD, strict=True)
    ]
    assert facts["best_manual"]["base"] == max(each["base"] for each in facts["templates"])
    unit_TCD = manual_TCD / np.linalg.norm(manual_TCD, axis=2, keepdims=True)
    assert facts["ensemble"] == both(unit_TCD.mean(0))
    assert facts["learned_among_all"] == {
        "base": round(nearest(run, encoded, learned_CD, base, every), 6),
        "novel": round(nearest(run, encoded, learned_CD, novel, every), 6),
    }
    assert facts["learned"]["base"] > 1 / 3


def test_round_two_learns_from_kept_pictures_and_the_novel_pass_takes_the_best_prompts(run: Run) -> None:
    do(run, "crop", "encode", "index")
    do_round(run, 1)
    web = run.manifests(Node("encode", 1))
    assert web is not None
    found = features(run, web)
    assert found.keys == ["f0" * 12, "f1" * 12, "f2" * 12]
    assert set(found.split) == {"web"} and set(found.category) == {-1}
    assert found.views(np.arange(3)).shape == (3, VIEWS, 16)
    do_round(run, 2)
    first, second = (run.manifests(Node("learn", number)) for number in (1, 2))
    assert first is not None and second is not None
    assert (first[0].facts["crops"], first[0].facts["sourced"]) == (36, 0)
    assert (second[0].facts["crops"], second[0].facts["sourced"]) == (36, 3)  # one is kept for two categories
    assert first[0].facts["prompts_digest"] != second[0].facts["prompts_digest"]

    (embedded,) = do(run, "embed", round_="novel")
    rounds = [run.manifests(Node("embed", number)) for number in (1, 2)]
    accuracies = [found[0].facts["accuracy"]["learned"]["base"] for found in rounds if found]
    best = accuracies.index(max(accuracies)) + 1
    assert embedded.facts["best_round"] == best
    source = rounds[best - 1]
    assert source is not None
    for name in ("category_embeddings.pt", "category_embeddings.npy", "accuracy.json"):
        assert embedded.files[name].sha256 == source[0].files[name].sha256
    encoded = do(run, "retrieve", "download", "encode", round_="novel")
    assert np.load(path(run, encoded[0], "views.npy")).shape == (0, VIEWS, 16)


def test_the_same_run_twice_gives_the_same_bytes(run: Run) -> None:
    def contents() -> list[str]:
        again = Run(run.uri)
        do(again, "crop", "encode")
        do(again, "learn", "embed", round_=1)
        nodes = [Node("encode"), Node("learn", 1), Node("embed", 1)]
        return [manifest.contents for node in nodes for manifest in again.manifests(node) or []]

    first = contents()
    for manifest in Path(run.uri).rglob("*-of-*.json"):
        manifest.unlink()
    assert contents() == first and len(first) == 4


def test_another_clips_features_are_not_used(run: Run, tmp_path: Path) -> None:
    (first, _) = do(run, "crop", "encode")
    found = Path(run.uri) / "encode" / f"{first.shard}.{first.digest[:16]}.json"
    raw = json.loads(found.read_bytes())
    raw["facts"]["encoder"]["digest"] = "0" * 64
    found.write_text(json.dumps(raw))
    again = Run(run.uri)
    with pytest.raises(BadInput) as caught:
        run_shard(again, Node("learn", 1), Shard(), QUIET)
    mine = load_clip(run.config.clip, "cpu").identity
    assert str(caught.value) == (
        "round-1/learn: the crops were encoded with model.json weights.safetensors (000000000000, 16 dimensions), but "
        f"this run's CLIP is {mine}; run encode again."
    )


def test_a_tar_and_a_table_that_disagree_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(ctx: Context) -> None:
        crop(ctx)
        whole = path(run, Manifest("", None, "", "", "", ctx.files, 0, {}, {}, {}, 0, 0), "crops.parquet")
        table = pq.read_table(whole)
        pq.write_table(table.slice(1), ctx.scratch / "less.parquet")
        ctx.add(ctx.scratch / "less.parquet", "crops.parquet")

    monkeypatch.setattr(sys.modules["rpl.stages.crop"], "run", forgetful)
    with pytest.raises(BadInput) as caught:
        do(run, "crop", "encode")
    assert str(caught.value).endswith(f"does not agree with its table on picture {'0' * 24}; make both again.")
