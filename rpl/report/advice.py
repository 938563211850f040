"""What a person might change where a run came out poorly: sentences for page, summary and terminal, pure functions."""

from __future__ import annotations

from rpl.report.model import SPLITS, ReportData

LEAST_LOSS = 0.005
"""Learned prompts that are less far below the hand-written one are as good: validation crops are a few thousand."""


def advice(data: ReportData) -> tuple[str, ...]:
    """Sentences, none where there is nothing to say."""
    accuracy = data.best.accuracy
    below = []
    for split in SPLITS:
        learned, manual = accuracy.learned.of(split), accuracy.manual.of(split)
        if learned is not None and manual is not None and learned < manual - LEAST_LOSS:
            below.append(f"{100 * learned:.1f} % against {100 * manual:.1f} % on {split} categories")
    if not below:
        return ()
    return (
        f"The learned prompt is below the hand-written one, {' and '.join(below)}. Where crops are small, cluttered "
        "or few, the loss rewards a prompt that commits itself to nothing: try learn.temperature: 3, or a smaller "
        "data.scaling_factor.",
    )
