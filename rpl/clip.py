"""An open_clip model behind a few calls: encode images, encode texts, tokenise, describe itself.

Knows nothing of training, prompts or stages. The model is named in the configuration: an open_clip name with a
`pretrained` tag, or files (config JSON, weights). It is frozen and in evaluation mode. Weights are read without
running code from them (safetensors, or torch's weights-only unpickler).

Letters: B images, N texts, T tokens, D dimension of the shared space.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import pickle
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from rpl.config import Clip
from rpl.encoder import Encoder
from rpl.errors import BadInput, TryAgain
from rpl.store import local_copy
from rpl.text_tower import TextTower, UnfitTower
from rpl.views import Preprocessing, evaluation_view

_TOKENS_AT_ONCE = 16_384  # bounds the memory of a pass over many texts
_WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")
# What the readers of safetensors and torch answer malformed bytes with.
_MALFORMED = (
    SafetensorError, pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError,
    AssertionError, StopIteration, struct.error,
)  # fmt: skip
_RANDOM_SEED = 0  # of a model without weights: always the same one


class ClipModel:
    """A frozen CLIP. `identity` says which; features are float32, on `device`, and not normalised."""

    def __init__(self, model: Any, tokeniser: Any, preprocessing: Preprocessing, identity: Encoder) -> None:
        self.identity = identity
        self.preprocessing = preprocessing
        self.text = TextTower(model, end_token=tokeniser.eot_token_id, vocabulary=tokeniser.vocab_size)
        self._model = model
        self._tokeniser = tokeniser

    @property
    def device(self) -> torch.device:
        return self.text.device

    @property
    def context_length(self) -> int:
        return self.text.context_length

    @property
    def start_token(self) -> int:
        return int(self._tokeniser.sot_token_id)

    @property
    def end_token(self) -> int:
        return int(self._tokeniser.eot_token_id)

    @property
    def logit_scale(self) -> float:
        """What CLIP multiplies cosines by (the inverse of its temperature)."""
        return float(self._model.logit_scale.exp())

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB picture as float32 [3, H, W]: open_clip's evaluation transform."""
        return self.normalise(torch.from_numpy(evaluation_view(image, self.preprocessing).copy())[None])[0]

    def normalise(self, pixels_BHWC: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] of `rpl.views` as the float32 [B, 3, H, W] that `encode_images` takes, on the device."""
        mean, std = (
            torch.tensor(values, device=self.device)[:, None, None]
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        # The pixels' own order is kept: convolutions are 1.4 times as fast on it (measured on a CPU).
        return pixels_BHWC.to(self.device).permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)

    @torch.inference_mode()
    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """Image features [B, D] of preprocessed images [B, 3, H, W]."""
        features_BD: Tensor = self._model.encode_image(images_BCHW.to(self.device, self.text.dtype))
        return features_BD.float()

    def token_ids(self, text: str) -> list[int]:
        """The ids of `text` alone, without start and end."""
        ids: list[int] = self._tokeniser.encode(text)
        return ids

    def tokenise(self, texts: Sequence[str]) -> Tensor:
        """int64 [N, context length]: start, text, end, zeros. A text that is too long loses its tail."""
        ids_NT: Tensor = self._tokeniser(list(texts), context_length=self.context_length)
        return ids_NT

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Text features [N, D], each text in a pass no longer than the longest beside it."""
        ids_NT = self.tokenise(texts).to(self.device)
        ends_N = (ids_NT == self.end_token).int().argmax(1)
        features_ND = torch.empty((len(texts), self.identity.dim), device=self.device)
        order = torch.argsort(ends_N, stable=True)
        while len(order):
            # Shortest last: the longest left decides how many fit.
            length = self.context_length if self.text.whole_length else int(ends_N[order[-1]]) + 1
            rows, order = order[-max(1, _TOKENS_AT_ONCE // length) :], order[: -max(1, _TOKENS_AT_ONCE // length)]
            features_ND[rows] = self.text.features(self.text.embed(ids_NT[rows, :length]), ends_N[rows])
        return features_ND


def device_name(wanted: Literal["auto", "cpu", "cuda"]) -> str:
    """The torch device for the configuration's `runtime.device`.

    Raises:
        BadInput: CUDA is asked for, and torch finds none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadInput("runtime.device: torch finds no CUDA device; set it to auto or cpu, or install torch for CUDA.")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def load_clip(settings: Clip, device: str) -> ClipModel:
    """The CLIP that the configuration names, frozen, on `device`.

    Raises:
        BadInput: open_clip knows no such name or tag, a file is missing, is not what it should be or does not fit the
            other, or the text tower cannot be fed with context vectors.
        TryAgain: the weights of a tag could not be downloaded.
    """
    open_clip = import_open_clip()
    with tempfile.TemporaryDirectory(prefix="rpl-clip-") as folder:
        name, preprocessing = _model_name(open_clip, settings.model, Path(folder))
        config = open_clip.get_model_config(name)
        if _other_tokeniser(name, config):
            raise _unfit(settings, "its tokeniser is not CLIP's own")
        builder = _Builder(open_clip, name, settings, preprocessing, _weights_file(open_clip, name, settings, folder))
        model = builder.build("fp32")
        how = _preprocessing(open_clip, model)
        identity = _identity(settings, model, how, config["embed_dim"])
        if settings.precision != "fp32":
            model = builder.build(settings.precision)
    try:
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return ClipModel(model, open_clip.get_tokenizer(name), how, identity)
    except UnfitTower as error:
        raise _unfit(settings, str(error)) from error


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Within, torch uses only kernels that give the same bytes each time. On a GPU it is left to choose."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def import_open_clip() -> Any:
    """The module open_clip.

    Beside a torch of another build (PyPI's torchvision next to a CPU torch), torchvision fails to import because its
    compiled operators are missing. CLIP uses none of them: after that failure, and only then, they are declared
    without a body, and the import goes through.
    """
    try:
        import open_clip
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _declare_torchvision_operators()
        import open_clip
    return open_clip


_declared: list[Any] = []  # torch forgets an operator with the object that declared it


def _declare_torchvision_operators() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


class _Builder:
    """Makes the model in a precision, from the weights each time, so that nothing is rounded twice."""

    def __init__(
        self, open_clip: Any, name: str, settings: Clip, preprocessing: dict[str, Any] | None, weights: Path | None
    ) -> None:
        self._open_clip, self._name, self._settings = open_clip, name, settings
        self._preprocessing, self._weights = preprocessing, weights

    def build(self, precision: str) -> nn.Module:
        tag = self._settings.pretrained if self._weights is None else None
        # A tag knows the activation its weights were trained with; open_clip's plain names take the other one.
        quick = bool(tag and self._open_clip.get_pretrained_cfg(self._name, tag).get("quick_gelu"))
        try:
            # open_clip warns that the weights are random. They are read next, or meant to be.
            with torch.random.fork_rng(devices=[]), _without_warnings():
                torch.manual_seed(_RANDOM_SEED)
                model: nn.Module = self._open_clip.create_model(
                    self._name, pretrained=tag, precision=precision, force_quick_gelu=quick,
                    force_preprocess_cfg=self._preprocessing,
                )  # fmt: skip
        except (RuntimeError, TypeError, ValueError, KeyError, AssertionError, OSError, ImportError) as error:
            raise self._explained(error, tag) from error
        if self._weights is not None:
            self._read_weights(model, self._weights)
        return model.eval().requires_grad_(False)

    def _explained(self, error: Exception, tag: str | None) -> Exception:
        if tag is not None and "download" in str(error):
            return TryAgain(f"clip.pretrained: the weights {tag!r} could not be downloaded ({_first_line(error)}).")
        model = self._settings.model
        return BadInput(f"clip.model: open_clip cannot build {model} ({_first_line(error)}); correct or change it.")

    def _read_weights(self, model: nn.Module, weights: Path) -> None:
        given = self._settings.pretrained
        try:
            self._open_clip.load_checkpoint(model, str(weights), strict=True, weights_only=True)
        except RuntimeError as error:
            if "Error(s) in loading state_dict" not in str(error):
                raise self._unreadable(error) from error
            problem = str(error).splitlines()[1].strip().rstrip(".") if "\n" in str(error) else str(error)
            raise BadInput(
                f"{given}: does not fit {self._settings.model} ({problem[:200]}); give the weights of that model."
            ) from error
        except _MALFORMED as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> BadInput:
        return BadInput(
            f"{self._settings.pretrained}: holds no weights that can be read safely ({_first_line(error)}); "
            "give a .safetensors file, or a .pt file with a plain state dict."
        )


def _model_name(open_clip: Any, model: str, folder: Path) -> tuple[str, dict[str, Any] | None]:
    """The name open_clip knows the model by, and the preprocessing its file states (None: open_clip's own)."""
    if not model.endswith(".json"):
        known = open_clip.list_models()
        if model not in known:
            close = difflib.get_close_matches(model, known, 3)
            raise BadInput(
                f"clip.model: open_clip knows no model {model!r}; choose one of open_clip.list_models()"
                f"{f', such as {close[0]},' if close else ''} or give a config file that ends in .json."
            )
        return model, None
    path = local_copy(model, folder)
    try:
        raw = json.loads(path.read_bytes())
        config = raw.get("model_cfg", raw)  # open_clip's own files on model hubs have it inside
        preprocessing = raw.get("preprocess_cfg")
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    except (ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"{model}: is not an open_clip config ({_first_line(error)}); correct the file.") from error
    if missing:
        raise BadInput(f"{model}: is not an open_clip config, since {missing[0]!r} is missing; add it.")
    # open_clip keeps configs by file name for the life of the process; named by content, two never meet.
    text = json.dumps(config, sort_keys=True)
    name = "rpl-" + hashlib.sha256(text.encode()).hexdigest()[:24]
    if name not in open_clip.list_models():
        copy = folder / f"{name}.json"
        copy.write_text(text, encoding="utf-8")
        open_clip.add_model_config(copy)
    return name, preprocessing


def _other_tokeniser(name: str, config: dict[str, Any]) -> bool:
    text = config["text_cfg"]
    return bool(text.get("hf_model_name") or text.get("hf_tokenizer_name") or "siglip" in name.lower())


def _unfit(settings: Clip, why: str) -> BadInput:
    return BadInput(
        f"clip.model: the text tower of {settings.model} takes no context vectors, since {why}; "
        "choose a model with CLIP's own text tower, such as ViT-B-32."
    )


def _weights_file(open_clip: Any, name: str, settings: Clip, folder: str) -> Path | None:
    """The local weights file; None where `pretrained` is a tag that open_clip knows, or null."""
    given = settings.pretrained
    if given is None:
        return None
    if "/" not in given and "." not in given:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not open_clip.is_pretrained_cfg(name, given):
            choice = f"choose one of {', '.join(tags)}, or give" if tags else "give"
            raise BadInput(
                f"clip.pretrained: open_clip has no weights {given!r} for {settings.model}; {choice} a weights file."
            )
        return None
    if not given.endswith(_WEIGHT_FILES):
        raise BadInput(f"{given}: is not a weights file; give one that ends in {', '.join(_WEIGHT_FILES)}.")
    return local_copy(given, Path(folder))


def _preprocessing(open_clip: Any, model: nn.Module) -> Preprocessing:
    raw = open_clip.get_model_preprocess_cfg(model)
    size = raw["size"]
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    return Preprocessing(
        size=(int(height), int(width)), mean=tuple(raw["mean"]), std=tuple(raw["std"]),
        interpolation="bilinear" if raw["interpolation"] == "bilinear" else "bicubic",
        resize_mode=raw["resize_mode"] or "shortest", fill_color=raw["fill_color"],
    )  # fmt: skip


def _identity(settings: Clip, model: nn.Module, how: Preprocessing, dim: int) -> Encoder:
    """Name and digest of a model in fp32, so that the precision it runs in does not change who it is."""
    digest = hashlib.sha256()
    # The one part of the function that leaves no trace in the weights, and that is confused in practice.
    quick = any(type(module).__name__ == "QuickGELU" for module in model.modules())
    digest.update(json.dumps({"preprocessing": asdict(how), "quick_gelu": quick}, sort_keys=True).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    # Without the folders of files, so that the same model is the same on every machine.
    pretrained = settings.pretrained and settings.pretrained.rsplit("/", 1)[-1]
    return Encoder(settings.model.rsplit("/", 1)[-1], pretrained, digest.hexdigest(), dim)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].strip().rstrip(".")[:200] if text else type(error).__name__


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
