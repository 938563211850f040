"""The demo's ten hand-written prompts, the competition of the learned ones. Holds no code."""

from __future__ import annotations

TEMPLATES: tuple[str, ...] = (
    "a photo of {name}",
    "{name}",
    "a picture of {name}",
    "a cartoon of {name}",
    "a line drawing of {name}",
    "a sketch of {name}",
    "a poster with {name}",
    "a photo of {name}, which is {description}",
    "a drawing of {name}, which is {description}",
    "{name}, {description}",
)
"""The first is what people type when they think of nothing better."""
