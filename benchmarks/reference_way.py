"""Prompt learning as the research code does it, small and faithful: the yardstick of `benchmarks.learn`.

Re-expressed from what fcjian/RPL does (trainers/rpl.py on Dassl's trainer), not copied: each step decodes and augments
32 crops, sends them through the image tower, assembles every category's prompt in a Python loop, pads it to 77 tokens
and sends all of them through the text tower, forward and backward; SGD moves the two context vectors. Augmentation is
torchvision's, loading torch's DataLoader, the towers open_clip's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

BATCH = 32
EPOCHS = 6


class Crops(Dataset[tuple[Tensor, int]]):
    """Crop files with their labels, augmented anew each time one is read."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], size: int, mean: Any, std: Any) -> None:
        from torchvision import transforms

        self._paths, self._labels = paths, labels
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, (0.4, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self._paths[index]) as image:
            return self._transform(image.convert("RGB")), self._labels[index]


class Prompts:
    """`X name X description.` of every category, X being the learned vectors; padded to 77 tokens."""

    def __init__(self, model: Any, tokeniser: Any, names: Sequence[str], descriptions: Sequence[str]) -> None:
        self._model = model
        self._ids = tokeniser([f"X {n} X {d}." for n, d in zip(names, descriptions, strict=True)])
        self._name_lengths = [len(tokeniser.encode(name)) for name in names]
        with torch.no_grad():
            self._embedding = model.token_embedding(self._ids.to(model.positional_embedding.device)).float()

    def features(self, context: Tensor, rows: slice = slice(None)) -> Tensor:
        """Normalised text features [categories, D] with `context` [2, W] in its places."""
        prompts = []
        for vectors, length in zip(self._embedding[rows], self._name_lengths[rows], strict=True):
            second = 2 + length
            parts = [vectors[:1], context[:1], vectors[2:second], context[1:], vectors[second + 1 :]]
            prompts.append(torch.cat(parts)[None])
        x = torch.cat(prompts) + self._model.positional_embedding
        x = self._model.ln_final(self._model.transformer(x, attn_mask=self._model.attn_mask))
        ends = self._ids[rows].argmax(1)
        x = x[torch.arange(len(x)), ends] @ self._model.text_projection
        return functional.normalize(x, dim=1)


def learn(
    model: Any, prompts: Prompts, crops: Crops, seed: int, on_step: Callable[[int, Tensor], None], workers: int
) -> tuple[Tensor, int]:
    """The learned context [2, W] and the number of steps; `on_step` is given each step's number and context."""
    torch.manual_seed(seed)
    context = (torch.randn((2, model.positional_embedding.shape[1])) * 0.02).requires_grad_()
    optimiser = torch.optim.SGD([context], lr=0.002, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        crops, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )  # fmt: skip
    steps = 0
    for epoch in range(EPOCHS):
        optimiser.param_groups[0]["lr"] = 1e-5 if epoch == 0 else 0.001 * (1 + math.cos(math.pi * (epoch - 1) / EPOCHS))
        for images, labels in loader:
            loss = step_loss(model, prompts, context, images, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps += 1
            on_step(steps, context.detach())
    return context.detach(), steps


def step_loss(model: Any, prompts: Prompts, context: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        image_features = functional.normalize(model.encode_image(images), dim=1)
    logits = model.logit_scale.exp() * image_features @ prompts.features(context).T
    return functional.cross_entropy(logits, labels)
