"""Progress lines: a live bar on a terminal, a plain line now and then elsewhere.

Knows nothing of stages but their names. Writes to standard error only, so that standard output stays for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from tqdm import tqdm


class OnProgress(Protocol):
    """Is told of every update, so it must be quick and must not raise."""

    def __call__(self, done: int, total: int | None, values: Mapping[str, float]) -> None:
        """`done` of `total` items (None: unknown), and what the stage has noted beside the count."""


class Progress:
    """One stage's count of items. Safe to leave by exception: the line ends where it was."""

    def __init__(
        self, name: str, total: int | None, unit: str, *, live: bool, every_s: float,
        on_progress: OnProgress | None = None,
    ) -> None:  # fmt: skip
        self._name, self._total, self._unit = name, total, unit
        self._every_s = every_s
        self._on_progress = on_progress
        self._values: dict[str, float] = {}
        self._started = self._printed = time.monotonic()
        self._done = 0
        self._bar = tqdm(desc=f"{name:<18}", total=total, unit=f" {unit}", leave=False) if live else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def note(self, **values: float) -> None:
        """Show these numbers, a loss for example, beside the count from now on."""
        self._values |= values
        if self._bar is not None:
            self._bar.set_postfix(self._values, refresh=False)

    def update(self, count: int = 1) -> None:
        self._done += count
        if self._on_progress is not None:
            self._on_progress(self._done, self._total, self._values)
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed >= self._every_s:
            self._printed = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        rate = self._done / seconds if seconds else 0.0
        of = f"{self._done}/{self._total}" if self._total is not None else str(self._done)
        left = ""
        if self._total is not None and rate > 0:
            left = f", {(self._total - self._done) / rate:.0f} s left"
        noted = "".join(f", {name} {value:.4g}" for name, value in self._values.items())
        return f"{self._name}: {of} {self._unit}, {rate:.1f}/s{left}{noted}"


class Reporter:
    """Makes progress lines of one kind.

    Args:
        live: draw bars; by default where standard error is a terminal.
        every_s: seconds between plain lines.
        on_progress: is called at every update of every line.
    """

    def __init__(
        self, *, live: bool | None = None, every_s: float = 5.0, on_progress: OnProgress | None = None
    ) -> None:
        self._live = sys.stderr.isatty() if live is None else live
        self._every_s = every_s
        self._on_progress = on_progress

    def stage(self, name: str, total: int | None, unit: str) -> Progress:
        return Progress(name, total, unit, live=self._live, every_s=self._every_s, on_progress=self._on_progress)

    def say(self, text: str) -> None:
        """One line of its own, above any bar."""
        if self._live:
            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
