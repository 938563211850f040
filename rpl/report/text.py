"""Numbers and strangers' texts as the page shows them. Knows nothing of HTML; escaping is the template's."""

from __future__ import annotations

import math
import re
from urllib.parse import urlsplit

MISSING = "–"

# Control characters, and the marks that turn the direction of text: a caption must not rearrange what stands around it.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]+")


def plain(text: str, length: int = 200) -> str:
    """One line of at most `length` characters without control characters."""
    line = " ".join(_UNSAFE.sub(" ", text).split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def web_link(url: str) -> str | None:
    """`url` where a browser may follow it: http or https with a host, nothing else."""
    if _UNSAFE.search(url):
        return None
    try:
        parts = urlsplit(url.strip())
        host = parts.hostname
    except ValueError:  # such as an unfinished IPv6 address
        return None
    return url.strip() if parts.scheme in ("http", "https") and host else None


def host(url: str) -> str:
    """The host a picture came from, for its caption; without user, port or path."""
    try:
        return plain(urlsplit(url.strip()).hostname or MISSING, 80)
    except ValueError:
        return MISSING


def percent(fraction: float | None, digits: int = 1) -> str:
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f}\u00a0%"  # never breaks before the sign


def points(difference: float | None) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return MISSING if difference is None else f"{100 * difference:+.1f}".replace("-", "−")


def count(number: float) -> str:
    return f"{number:,.0f}"


def decimal(number: float | None, digits: int = 3) -> str:
    return MISSING if number is None else f"{number:.{digits}f}".replace("-", "−")


def seconds(value: float | None) -> str:
    """Seconds as a table shows them; empty where the stage did not run."""
    if value is None:
        return ""
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def duration(value: float) -> str:
    """A span for a sentence: `48 s`, `5 min 10 s`, `3 h 20 min`."""
    total = round(value)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


def size(size_bytes: int) -> str:
    if size_bytes < 1000:
        return f"{size_bytes} B"
    power = min(4, int(math.log10(size_bytes)) // 3)
    value = size_bytes / 1000**power
    return f"{value:.{0 if value >= 100 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def plural(number: int, one: str, many: str | None = None) -> str:
    return f"{count(number)} {one if number == 1 else many or one + 's'}"
