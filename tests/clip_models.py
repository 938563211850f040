"""Tiny open_clip models with random weights, made on the spot: real towers, real tokeniser, milliseconds a pass.

They suffice wherever arithmetic, identity or plumbing is tested; nothing here knows what a picture shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rpl.clip import ClipModel, import_open_clip, load_clip
from rpl.config import Clip

Json = dict[str, Any]

VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}

TOWERS: dict[str, Json] = {
    "plain": {},
    "ViT-B-32's text tower, 2 layers": {"text_cfg": {"width": 512, "heads": 8, "layers": 2}},
    "the demo's text tower": {"text_cfg": {"width": 96, "heads": 4, "layers": 3}},
    "custom text": {"custom_text": True},
    "quick gelu": {"quick_gelu": True},
    "read at eos, linear projection": {
        "custom_text": True,
        "text_cfg": {"pool_type": "eos", "eos_id": 49407, "proj_bias": True},
    },
    "other blocks": {"text_cfg": {"qk_norm": True, "scale_attn": True}},
    "not causal": {"custom_text": True, "text_cfg": {"no_causal_mask": True}},
    "read at the last token": {"custom_text": True, "text_cfg": {"pool_type": "last"}},
    "short": {"text_cfg": {"context_length": 32}},
}
"""Changes to the tiny model, by what they make of it."""


def config(changes: Json | None = None) -> Json:
    merged: Json = {"embed_dim": 16, "vision_cfg": dict(VISION), "text_cfg": dict(TEXT)}
    for key, value in (changes or {}).items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) else value
    return merged


def write_clip(folder: Path, changes: Json | None = None, seed: int = 0) -> Clip:
    """model.json and weights.safetensors in `folder`; the settings that name them."""
    open_clip = import_open_clip()
    folder.mkdir(parents=True, exist_ok=True)
    whole = config(changes)
    (folder / "model.json").write_text(json.dumps(whole), encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = open_clip.model.CustomTextCLIP if whole.pop("custom_text", False) else open_clip.CLIP
        model = kind(**whole)
        with torch.no_grad():
            # open_clip starts so small that a tower hardly tells texts apart; as trained ones, these do.
            for name, value in model.named_parameters():
                if "token_embedding" in name or "in_proj" in name or "c_fc" in name:
                    value.mul_(4)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "weights.safetensors")
    return Clip(model=str(folder / "model.json"), pretrained=str(folder / "weights.safetensors"))


def make_clip(folder: Path, changes: Json | None = None, seed: int = 0) -> ClipModel:
    return load_clip(write_clip(folder, changes, seed), "cpu")


def open_clip_model(clip: ClipModel) -> Any:
    return clip._model


def padded_features(clip: ClipModel, ids_NL: Tensor, embeddings_NLW: Tensor) -> Tensor:
    """open_clip's own pass over whole-length sequences, with `embeddings_NLW` in place of its token embeddings."""
    model = open_clip_model(clip)
    table = model.text.token_embedding if hasattr(model, "text") else model.token_embedding
    hook = table.register_forward_hook(lambda *_: embeddings_NLW)
    try:
        features_ND: Tensor = model.encode_text(ids_NL)
        return features_ND
    finally:
        hook.remove()
