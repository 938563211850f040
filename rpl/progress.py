"""Progress lines: a live bar on a terminal, a plain line now and then elsewhere.

Knows nothing of stages but their names. Writes to standard error only, so that standard output stays for results.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """One stage's count of items. Safe to leave by exception: the line ends where it was."""

    def __init__(self, name: str, total: int | None, unit: str, *, live: bool, every_s: float) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._every_s = every_s
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

    def update(self, count: int = 1) -> None:
        self._done += count
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
        return f"{self._name}: {of} {self._unit}, {rate:.1f}/s{left}"


class Reporter:
    """Makes progress lines of one kind.

    Args:
        live: draw bars; by default where standard error is a terminal.
        every_s: seconds between plain lines.
    """

    def __init__(self, *, live: bool | None = None, every_s: float = 5.0) -> None:
        self._live = sys.stderr.isatty() if live is None else live
        self._every_s = every_s

    def stage(self, name: str, total: int | None, unit: str) -> Progress:
        return Progress(name, total, unit, live=self._live, every_s=self._every_s)

    def say(self, text: str) -> None:
        """One line of its own, above any bar."""
        if self._live:
            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
