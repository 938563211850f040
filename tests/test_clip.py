"""The CLIP behind its few calls: loading and its refusals, identity, and text passes equal to the padded ones."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rpl.clip import device_name, import_open_clip, load_clip, reproducible
from rpl.config import Clip
from rpl.encoder import Encoder, check_same
from rpl.errors import BadInput, TryAgain
from tests.clip_models import TOWERS, config, make_clip, open_clip_model, padded_features, write_clip

TEXTS = ["a cat", "", "a photo of a very long description, which is full of words and commas, and goes on", "Straße 犬"]


def refusal(settings: Clip) -> str:
    with pytest.raises(BadInput) as caught:
        load_clip(settings, "cpu")
    return str(caught.value)


@pytest.mark.parametrize("changes", TOWERS.values(), ids=TOWERS)
def test_texts_give_what_the_padded_pass_gives(tmp_path: Path, changes: dict[str, Any]) -> None:
    clip = make_clip(tmp_path, changes)
    expected = open_clip_model(clip).encode_text(clip.tokenise(TEXTS))
    torch.testing.assert_close(clip.encode_texts(TEXTS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", TOWERS.values(), ids=TOWERS)
def test_values_and_gradients_equal_the_padded_pass(tmp_path: Path, changes: dict[str, Any]) -> None:
    clip = make_clip(tmp_path, changes)
    ids_NL = clip.tokenise(TEXTS)
    ends_N = (ids_NL == clip.end_token).int().argmax(1)
    length = clip.context_length if clip.text.whole_length else int(ends_N.max()) + 1
    padded = clip.text.embed(ids_NL).requires_grad_()
    cut = clip.text.embed(ids_NL[:, :length]).requires_grad_()
    weights = torch.randn((len(TEXTS), clip.identity.dim), generator=torch.Generator().manual_seed(1))

    expected, found = padded_features(clip, ids_NL, padded), clip.text.features(cut, ends_N)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), padded)
    (found_gradient,) = torch.autograd.grad((found * weights).sum(), cut)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    tolerance = 1e-4 * float(expected_gradient.abs().max())
    torch.testing.assert_close(found_gradient, expected_gradient[:, :length], rtol=0, atol=tolerance)
    assert not expected_gradient[:, length:].any()  # what was cut off has no part in the result
    assert found_gradient.abs().max() > 1e-3


def test_which_towers_need_their_whole_length(tmp_path: Path) -> None:
    whole = {name for name, changes in TOWERS.items() if make_clip(tmp_path / name, changes).text.whole_length}
    assert whole == {"not causal", "read at the last token"}


def test_a_cut_sequence_is_refused_where_the_whole_is_needed(tmp_path: Path) -> None:
    clip = make_clip(tmp_path, TOWERS["not causal"])
    with pytest.raises(ValueError, match="5 tokens, but this tower needs all 77"):
        clip.text.features(torch.zeros(1, 5, clip.text.width), torch.tensor([4]))


def test_images_are_encoded_by_the_models_own_tower(tmp_path: Path) -> None:
    clip = make_clip(tmp_path)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    images = clip.normalise(pixels)
    torch.testing.assert_close(clip.preprocess(Image.fromarray(pixels[1].numpy())), images[1])
    features = clip.encode_images(images)
    assert features.shape == (3, 16) and features.dtype == torch.float32
    torch.testing.assert_close(features, open_clip_model(clip).encode_image(images))


def test_the_model_is_frozen(tmp_path: Path) -> None:
    model = open_clip_model(make_clip(tmp_path))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_identity_follows_weights_activation_and_preprocessing_but_not_the_place(tmp_path: Path) -> None:
    plain = make_clip(tmp_path / "here").identity
    assert (plain.model, plain.pretrained, plain.dim) == ("model.json", "weights.safetensors", 16)
    assert make_clip(tmp_path / "there").identity == plain
    assert make_clip(tmp_path / "other", seed=1).identity.digest != plain.digest
    assert make_clip(tmp_path / "gelu", {"quick_gelu": True}).identity.digest != plain.digest
    settings = write_clip(tmp_path / "mean")
    wrapped = {"model_cfg": config(), "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    Path(settings.model).write_text(json.dumps(wrapped), encoding="utf-8")
    clip = load_clip(settings, "cpu")
    assert clip.preprocessing.mean == (0.5, 0.5, 0.5)
    assert clip.identity.digest != plain.digest


def test_precision_changes_the_arithmetic_and_not_the_identity(tmp_path: Path) -> None:
    settings = write_clip(tmp_path)
    plain = load_clip(settings, "cpu")
    half = load_clip(settings.model_copy(update={"precision": "bf16"}), "cpu")
    assert half.identity == plain.identity
    assert half.text.dtype == torch.bfloat16
    found = half.encode_texts(TEXTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain.encode_texts(TEXTS), rtol=0.1, atol=0.1)


def test_weights_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    settings = write_clip(tmp_path)
    state = load_file(str(settings.pretrained))
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "weights.pt")
    found = load_clip(settings.model_copy(update={"pretrained": str(tmp_path / "weights.pt")}), "cpu")
    assert found.identity.digest == load_clip(settings, "cpu").identity.digest


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone(tmp_path: Path) -> None:
    settings = write_clip(tmp_path).model_copy(update={"pretrained": None})
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = load_clip(settings, "cpu").identity, load_clip(settings, "cpu").identity
    assert first == second and first.pretrained is None
    assert torch.equal(torch.random.get_rng_state(), before)


def test_two_configs_of_one_file_name_do_not_meet(tmp_path: Path) -> None:
    assert make_clip(tmp_path / "a").text.width == 32
    assert make_clip(tmp_path / "b", {"text_cfg": {"width": 48, "heads": 3}}).text.width == 48
    assert make_clip(tmp_path / "a").text.width == 32


def test_a_tag_brings_its_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(BaseException):
        pass

    def create_model(_name: str, **settings: Any) -> None:
        raise Asked(settings["force_quick_gelu"])

    monkeypatch.setattr(import_open_clip(), "create_model", create_model)
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        with pytest.raises(Asked, match=str(quick)):
            load_clip(Clip(model="ViT-B-32", pretrained=tag), "cpu")


def test_a_failed_download_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(import_open_clip().factory, "download_pretrained", download)
    with pytest.raises(TryAgain) as caught:
        load_clip(Clip(model="ViT-B-32", pretrained="openai"), "cpu")
    assert str(caught.value) == (
        "clip.pretrained: the weights 'openai' could not be downloaded "
        "(Failed to download weights for tag 'openai': no route to host)."
    )


def test_unknown_names_are_refused() -> None:
    assert refusal(Clip(model="ViT-B-33", pretrained=None)) == (
        "clip.model: open_clip knows no model 'ViT-B-33'; choose one of open_clip.list_models(), such as ViT-B-32, "
        "or give a config file that ends in .json."
    )
    sentence = refusal(Clip(model="RN50", pretrained="opnai"))
    assert sentence.startswith("clip.pretrained: open_clip has no weights 'opnai' for RN50; choose one of openai, ")
    assert sentence.endswith(", or give a weights file.")


def test_missing_and_wrong_files_are_refused(tmp_path: Path) -> None:
    settings = write_clip(tmp_path)

    def given(**changes: str) -> str:
        return refusal(settings.model_copy(update=changes))

    assert "does not exist" in given(model=str(tmp_path / "none.json"))
    assert "does not exist" in given(pretrained=str(tmp_path / "none.safetensors"))
    assert given(pretrained="weights.onnx") == (
        "weights.onnx: is not a weights file; give one that ends in .safetensors, .pt, .pth, .bin."
    )
    (tmp_path / "list.json").write_text("[1]")
    assert given(model=str(tmp_path / "list.json")).startswith(f"{tmp_path}/list.json: is not an open_clip config (")
    (tmp_path / "part.json").write_text('{"embed_dim": 3, "vision_cfg": {}}')
    assert given(model=str(tmp_path / "part.json")) == (
        f"{tmp_path}/part.json: is not an open_clip config, since 'text_cfg' is missing; add it."
    )
    (tmp_path / "key.json").write_text(json.dumps(config({"text_cfg": {"colour": 1}})))
    assert given(model=str(tmp_path / "key.json")).startswith(
        f"clip.model: open_clip cannot build {tmp_path}/key.json ("
    )


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    settings = write_clip(tmp_path / "this")
    other = str(write_clip(tmp_path / "other", {"text_cfg": {"layers": 1}}).pretrained)
    sentence = refusal(settings.model_copy(update={"pretrained": other}))
    assert sentence.startswith(f"{other}: does not fit {settings.model} (Missing key(s) in state_dict: ")
    assert sentence.endswith("); give the weights of that model.")
    state = load_file(str(settings.pretrained))
    save_file({**state, "ln_final.bias": torch.zeros(31)}, tmp_path / "size.safetensors")
    assert "size mismatch for ln_final.bias" in refusal(
        settings.model_copy(update={"pretrained": str(tmp_path / "size.safetensors")})
    )


def test_weights_that_would_run_code_are_not_read(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "weights.pt"
    settings = write_clip(tmp_path).model_copy(update={"pretrained": str(path)})
    for content in (pickle.dumps(Attack(), protocol=2), b"", b"not weights"):
        path.write_bytes(content)
        sentence = refusal(settings)
        assert sentence.startswith(f"{path}: holds no weights that can be read safely (")
        assert sentence.endswith("give a .safetensors file, or a .pt file with a plain state dict.")
    torch.save({"state_dict": Attack()}, path)
    assert "holds no weights that can be read safely" in refusal(settings)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "its tokeniser is not CLIP's own"),
        ({"custom_text": True, "text_cfg": {"embed_cls": True}}, "it appends a class token"),
        ({"custom_text": True, "text_cfg": {"pool_type": "none"}}, "it is read by 'none' pooling"),
        (
            {"custom_text": True, "text_cfg": {"pool_type": "eos"}},
            "it is read at token 2, and its tokeniser ends texts with token 49407",
        ),
        ({"text_cfg": {"vocab_size": 1000}}, "it knows 1000 tokens, and its tokeniser 49408"),
    ],
)
def test_towers_that_take_no_context_vectors_are_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(config(changes)))
    assert refusal(Clip(model=str(path), pretrained=None)) == (
        f"clip.model: the text tower of {path} takes no context vectors, since {why}; "
        "choose a model with CLIP's own text tower, such as ViT-B-32."
    )


def test_devices() -> None:
    assert device_name("cpu") == "cpu"
    if torch.cuda.is_available():
        assert device_name("auto") == device_name("cuda") == "cuda"
        return
    assert device_name("auto") == "cpu"
    with pytest.raises(BadInput) as caught:
        device_name("cuda")
    assert str(caught.value) == (
        "runtime.device: torch finds no CUDA device; set it to auto or cpu, or install torch for CUDA."
    )


def test_vectors_of_two_encoders_never_meet() -> None:
    one, other = Encoder("ViT-B-32", "openai", "a" * 64, 512), Encoder("RN50", None, "b" * 64, 1024)
    assert Encoder.from_facts(json.loads(json.dumps(one.to_facts()))) == one
    check_same(one, Encoder("elsewhere", "named", "a" * 64, 512), "the crops were encoded", "run encode again")
    with pytest.raises(BadInput) as caught:
        check_same(one, other, "the crops were encoded", "run encode again")
    assert str(caught.value) == (
        "the crops were encoded with RN50 with random weights (bbbbbbbbbbbb, 1024 dimensions), but this run's CLIP is "
        "ViT-B-32 openai (aaaaaaaaaaaa, 512 dimensions); run encode again."
    )


def test_reproducible_restores_what_it_found() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with reproducible():
        assert torch.are_deterministic_algorithms_enabled() is not torch.cuda.is_available()
    assert torch.are_deterministic_algorithms_enabled() is before
