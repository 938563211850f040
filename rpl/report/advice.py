"""What a person might change where a run came out poorly: sentences for page, summary and terminal, pure functions."""

from __future__ import annotations

from rpl.report import text
from rpl.report.model import SPLITS, ReportData

LEAST_GAP = 0.005
"""Learned prompts that are less far below the hand-written one are as good: validation crops are a few thousand."""


def advice(data: ReportData) -> tuple[str, ...]:
    """Sentences, none where there is nothing to say."""
    accuracy = data.best.accuracy
    below = []
    for split in SPLITS:
        gain = accuracy.gain(split)
        if gain is not None and gain < -LEAST_GAP:
            learned, manual = (text.percent(each.of(split)) for each in (accuracy.learned, accuracy.manual))
            below.append(f"{learned} against {manual} on {split} categories")
    if not below:
        return ()
    figures = " and ".join(below).replace("\u00a0", " ")  # people search a terminal for plain blanks
    return (
        f"The learned prompt is below the hand-written one, {figures}. Where crops are small, cluttered or few, the "
        "loss rewards a prompt that commits itself to nothing: try learn.temperature: 3, or a smaller "
        "data.scaling_factor.",
    )
