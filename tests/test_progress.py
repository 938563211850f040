"""Progress lines, what is noted beside the count, and who is told of it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from rpl.progress import Reporter


def test_a_plain_line_shows_the_count_and_what_was_noted(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(live=False, every_s=0).stage("learn", 10, "steps") as progress:
        progress.update(3)
        progress.note(loss=2.34567)
        progress.update()
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"learn: 3/10 steps, \S+/s, \d+ s left", first)
    assert re.fullmatch(r"learn: 4/10 steps, \S+/s, \d+ s left, loss 2.346", second)


def test_a_bar_shows_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(live=True).stage("learn", 2, "steps") as progress:
        progress.note(loss=2.5)
        progress.update(2)
        progress._bar.refresh()  # type: ignore[union-attr]  # a bar is drawn now and then only
    assert "loss=2.5" in capsys.readouterr().err


def test_every_update_is_told() -> None:
    told: list[tuple[int, int | None, dict[str, float]]] = []

    def listen(done: int, total: int | None, values: Mapping[str, float]) -> None:
        told.append((done, total, dict(values)))

    with Reporter(live=False, on_progress=listen).stage("index", None, "vectors") as progress:
        progress.update(5)
        progress.note(recall=0.5)
        progress.update(0)
    assert told == [(5, None, {}), (5, None, {"recall": 0.5})]
