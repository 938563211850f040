"""The report in a real browser, where one is installed: nothing sticks out on a phone or a desk, all text can be read.

A wrapper page opens the report in frames of several widths and measures them; the report itself runs no script.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rpl.report.page import render
from tests.fake_report import report_data
from tests.test_report import hostile

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

WIDTHS = (400, 1400)
READABLE = 4.5
"""Contrast that WCAG 2.1 AA asks of body text."""

MEASURE = """
<!doctype html><meta charset="utf-8"><body>
<pre id="out"></pre>
<script>
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
function contrast(a, b) {
  const [light, dark] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (light + .05) / (dark + .05);
}
function ground(element) {
  for (let e = element; e; e = e.parentElement) {
    const colour = numbers(e.ownerDocument.defaultView.getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
}
function measure(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll('details').forEach(d => { d.open = true; });
  const root = page.documentElement, worst = { ratio: 99, text: '' };
  const out = [];
  for (const e of page.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    const scrolls = e.closest('.scroll, pre, .chart');
    if (box.width && box.right > view.innerWidth + 1 && !scrolls) out.push(e.tagName + '.' + e.className);
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.getClientRects().length) continue;
    const style = view.getComputedStyle(e);
    const ratio = contrast(numbers(e.closest('svg') ? style.fill : style.color), ground(e));
    if (ratio < worst.ratio) { worst.ratio = ratio; worst.text = e.textContent.trim().slice(0, 60); }
  }
  const shown = [...page.images].filter(i => i.complete && i.naturalWidth > 0).length;
  return { width: view.innerWidth, scrollWidth: root.scrollWidth, out, worst, shown,
           images: page.images.length, ground: view.getComputedStyle(page.body).backgroundColor };
}
const WIDTHS_HERE = %s;
Promise.all(WIDTHS_HERE.map(width => new Promise(done => {
  const frame = document.createElement('iframe');
  frame.style = `border:0;width:${width}px;height:20000px`;
  frame.onload = () => done(measure(frame));
  frame.src = 'page.html';
  document.body.append(frame);
}))).then(found => { document.getElementById('out').textContent = JSON.stringify(found); });
</script>
"""


def measured(folder: Path, page: str, scheme: str) -> list[dict[str, Any]]:
    """One measurement per width; `scheme` is what the reader's system prefers."""
    (folder / "page.html").write_text(page)
    (folder / "measure.html").write_text(MEASURE % json.dumps(WIDTHS))
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--allow-file-access-from-files",
        "--virtual-time-budget=10000",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        "--dump-dom",
        (folder / "measure.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None and found[1], f"the browser measured nothing: {done.stderr[-2000:]}"
    result: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    return result


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_and_everything_can_be_read(tmp_path: Path, scheme: str) -> None:
    data = report_data(rounds=3, base=50, novel=5)
    for frame, width in zip(measured(tmp_path, render(data), scheme), WIDTHS, strict=True):
        assert frame["width"] == width
        assert frame["out"] == []
        assert frame["scrollWidth"] <= width
        assert frame["worst"]["ratio"] >= READABLE, frame["worst"]
        assert frame["shown"] == frame["images"] == sum(len(sheet.pictures) for sheet in data.sheets)
        brightness = sum(int(part) for part in re.findall(r"\d+", frame["ground"])[:3])
        assert (brightness < 200) == (scheme == "dark"), frame["ground"]


def test_long_words_from_outside_do_not_break_the_layout(tmp_path: Path) -> None:
    page = render(hostile(report_data())).replace("alert", "x" * 150)
    for frame in measured(tmp_path, page, "light"):
        assert frame["out"] == []
        assert frame["scrollWidth"] <= frame["width"]
