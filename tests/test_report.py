"""The report: what is gathered, the page as text, the summary and its table. Its looks: test_report_browser.py."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rpl.manifests import Shard
from rpl.reasons import Reason
from rpl.report import text
from rpl.report.advice import advice
from rpl.report.charts import Dot, Line, apart, dot_chart, line_chart, nice_axis, thin
from rpl.report.collect import collect, read_attribution
from rpl.report.model import Accuracy, Changes, Picture, ReportData
from rpl.report.page import headline, linkified, paragraphs, refusal_groups, render
from rpl.report.sheets import choose, read_thumbnails, spread
from rpl.report.summary import summarise, summary_table
from rpl.rounds import Node
from rpl.stage import Run
from rpl.tars import write_tar
from tests.fake_report import report_data, since
from tests.scripted_stages import ATTRIBUTION, finished_run, key, picture

VOID = {"meta", "link", "img", "br"}
HOSTILE = "\"><script>alert('x')</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Tags with their attributes, the text, and every tag that was closed in the wrong place."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.misplaced: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        self.misplaced += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.misplaced.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts)).replace("\u00a0", " ")


def gathered(run: Run) -> ReportData:
    inputs = run.expected(Node("report"), Shard()).inputs
    attribution = read_attribution(run.config)
    return collect(inputs, lambda manifest, name: run.local(manifest.files[name]), run.config, attribution)


def hostile(data: ReportData) -> ReportData:
    """The same run with every text from outside replaced by an attack, and links of all bad kinds."""
    urls = ["javascript:alert(1)", "data:text/html,x", 'http://a.test/"onload=x', "//b.test/x", "ftp://c.test/x"]

    def attacked(shown: Picture, i: int) -> Picture:
        return dataclasses.replace(shown, caption=HOSTILE, url=urls[i % len(urls)])

    sheets = tuple(
        dataclasses.replace(
            sheet,
            name=HOSTILE,
            description=HOSTILE,
            pictures=tuple(attacked(shown, i) for i, shown in enumerate(sheet.pictures)),
        )
        for sheet in data.sheets
    )
    attacked_since = dataclasses.replace(since(HOSTILE, urls[0]), uri=HOSTILE)
    changes = dataclasses.replace(attacked_since.changes, gone_because={HOSTILE: 1})
    return dataclasses.replace(
        data, sheets=sheets, attribution=HOSTILE, settings_yaml=HOSTILE, encoder={HOSTILE: HOSTILE}, uri=HOSTILE,
        since=dataclasses.replace(attacked_since, changes=changes),
    )  # fmt: skip


# ---- gathering


def test_collect_reads_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(tmp_path, monkeypatch)
    data = gathered(run)
    assert data.name == "first"
    assert [r.number for r in data.rounds] == [1, 2]
    assert data.best_round == 2
    assert data.best.accuracy.learned == Accuracy(0.57, 0.52)
    assert data.rounds[0].accuracy.best_template == "a drawing of a {name}."
    assert [point.passes for point in data.rounds[0].curve] == list(range(2, 22, 2))
    assert (data.data.base, data.data.novel, data.data.train_crops, data.data.pool_rows) == (3, 2, 30, 6000)
    assert (data.data.base_without_crops, data.data.skipped_boxes) == (1, {"small": 2})
    assert data.attribution == ATTRIBUTION
    assert [sheet.name for sheet in data.sheets_of("novel")] == ["bagel", "<script>alert(1)</script>"]
    assert [[p.rank for p in sheet.pictures] for sheet in data.sheets] == [[0, 1, 2]] * 5
    assert data.sheets[1].pictures[0].width == 80
    assert data.novel.statuses == {"kept": 6, "spare": 2, "refused": 2, "failed": 2, "not_needed": 2}
    assert set(data.seconds) == {"crop", "encode", "index", "export"}
    assert list(data.rounds[0].sourcing.seconds) == ["encode", "learn", "embed", "retrieve", "download", "curate"]
    assert list(data.novel.seconds) == ["encode", "embed", "retrieve", "download", "curate"]


def test_an_address_counts_once_however_many_categories_wanted_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = gathered(finished_run(tmp_path, monkeypatch))
    assert data.rounds[0].sourcing.statuses["failed"] == 3
    assert data.rounds[0].sourcing.refusals == {"duplicate": 3, "not_found": 1}


def test_the_stage_commits_page_and_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(tmp_path, monkeypatch)
    manifests = run.manifests(Node("report"))
    assert manifests is not None
    assert set(manifests[0].files) == {"index.html", "summary.json"}
    page = Page(run.local(manifests[0].files["index.html"]).read_text())
    assert "Of objects in categories it never saw, the learned prompt names 52 % right" in page.text
    assert "CC BY-SA 4.0" in page.text
    assert json.loads(run.local(manifests[0].files["summary.json"]).read_bytes()) == summarise(gathered(run))


def test_a_run_without_validation_crops_or_truth_has_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gathered(finished_run(tmp_path, monkeypatch, measured=False))
    page = Page(render(data))
    assert not page.misplaced
    assert "6 pictures kept for 2 novel categories." in page.text
    assert "not measured" in page.text
    assert "which this one does not" in page.text
    assert "–" in summary_table(summarise(data))


# ---- contact sheets


def test_a_sheet_shows_a_spread_of_ranks() -> None:
    assert spread(range(100), 4) == [0, 33, 66, 99]
    assert spread([1, 2], 4) == [1, 2]
    assert spread([1, 2], 1) == [1]
    assert spread([1, 2], 0) == []
    assert spread([], 3) == []


def test_pictures_are_capped_per_sheet_and_per_page(monkeypatch: pytest.MonkeyPatch) -> None:
    yields = [{"category": c, "split": "novel" if c % 2 else "base"} for c in range(40)]
    kept = {c: [{"key": f"{c}-{i}"} for i in range(50)] for c in range(40)}
    counts = {c: len(rows) for c, rows in choose(yields, kept).items()}
    assert {counts[c] for c in range(0, 40, 2)} == {6}
    assert {counts[c] for c in range(1, 40, 2)} == {12}
    monkeypatch.setattr("rpl.report.sheets.PER_PAGE", 30)
    counts = {c: len(rows) for c, rows in choose(yields, kept).items()}
    assert sum(counts.values()) == 30
    assert {counts[c] for c in range(1, 40, 2)} == {1}, "novel categories come first"


def test_thumbnails_are_small_and_know_the_size_of_the_picture(tmp_path: Path) -> None:
    data = picture(0, 12, 1)
    write_tar(tmp_path / "images.tar", [(key(data), {"jpg": data})])
    (found,) = read_thumbnails([tmp_path / "images.tar"], {key(data)}, 10_000_000).values()
    assert (found.width, found.height) == (200, 60)
    assert len(found.jpeg) < len(data) + 2000


# ---- the page


def test_the_page_is_well_formed_and_names_the_figures() -> None:
    data = report_data()
    page = Page(render(data))
    assert not page.misplaced
    for expected in (
        "Sourcing run demo",
        "the learned prompt names 59 % right, the hand-written one 41 %.",
        "62.2 %",
        "+19.1 points over the hand-written prompt",
        "The server has no such picture (404 or 410).",
        "rpl fetch s3://bucket/runs/demo results",
        "CC BY-SA 4.0",
        "max_rounds: 2",
        "none for 1 base category",
        "12 too small; 830 beyond the number per category",
        "3f2a3f2a3f2a3f2a…",
    ):
        assert expected in page.text, expected
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    targets = {a["href"][1:] for tag, a in page.tags if tag == "a" and a["href"].startswith("#")}
    assert targets <= ids
    assert {"accuracy", "learning", "yield", "refused", "pictures", "time", "use", "settings", "sources"} <= ids


def test_every_picture_carries_score_rank_and_source() -> None:
    data = report_data(base=1, novel=1, pictures=2)
    page = Page(render(data))
    for sheet in data.sheets:
        assert sheet.description in page.text
        for shown in sheet.pictures:
            assert f"{shown.score:.3f} no. {shown.rank + 1}" in page.text
            assert text.host(shown.url) in page.text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == sum(len(sheet.pictures) for sheet in data.sheets)
    assert all(image["alt"] for image in images)


@pytest.mark.parametrize("attack", [False, True])
def test_the_page_loads_nothing_and_links_only_to_the_web(attack: bool) -> None:
    html = render(hostile(report_data()) if attack else report_data())
    page = Page(html)
    assert not page.misplaced
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "base", "form", "video", "audio", "source"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("srcset", "formaction", "ping")]
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/jpeg;base64,")
        if tag == "link":
            assert attributes["href"] == "data:,"
        if tag == "a" and not attributes["href"].startswith("#"):
            assert re.match(r"https?://", attributes["href"])
            assert attributes["rel"] == "noopener noreferrer"
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_clock_shows_in_one_section_only() -> None:
    data = report_data()
    slower = dataclasses.replace(
        data,
        seconds={stage: 10 * value for stage, value in data.seconds.items()},
        novel=dataclasses.replace(data.novel, seconds={"download": 1234.5}),
    )
    assert render(data) == render(report_data())

    def without_time(html: str) -> str:
        return re.sub(r'<section id="time">.*?</section>', "", html, flags=re.DOTALL)

    assert render(slower) != render(data)
    assert without_time(render(slower)) == without_time(render(data))


def test_many_rounds_and_no_pictures_still_make_a_page() -> None:
    page = Page(render(report_data(rounds=9, pictures=0, base=120)))
    assert not page.misplaced
    assert "learned, round 9" in page.text
    assert "84 more, which did better" in page.text


def test_the_headline_speaks_of_base_categories_where_no_novel_one_was_measured() -> None:
    data = report_data()
    accuracy = data.rounds[-1].accuracy
    only_base = dataclasses.replace(
        accuracy, learned=Accuracy(0.6, None), manual=Accuracy(0.4, None), ensemble=Accuracy(0.5, None)
    )
    rounds = tuple(dataclasses.replace(r, accuracy=only_base) for r in data.rounds)
    assert headline(dataclasses.replace(data, rounds=rounds)).replace("\u00a0", " ") == (
        "Of objects it was not shown, the learned prompt names 60 % right, the hand-written one 40 %."
    )


def test_refusals_are_grouped_and_sorted_and_unknown_words_survive() -> None:
    groups = refusal_groups([{"timed_out": 2, "duplicate": 1}, {"not_found": 5, "moon_phase": 3}])
    assert [(group.title, group.rows) for group in groups] == [
        ("While fetching", ((Reason.NOT_FOUND.sentence, (0, 5)), (Reason.TIMED_OUT.sentence, (2, 0)))),
        ("Compared with other pictures", ((Reason.DUPLICATE.sentence, (1, 0)),)),
        ("Other", (("moon_phase", (0, 3)),)),
    ]


def test_attribution_is_paragraphs_of_text_with_links() -> None:
    assert paragraphs("# Pictures\n\nBy A.\n  \n\nBy B,\nand C. #1\n") == ["Pictures", "By A.", "By B,\nand C. #1"]
    assert linkified('[A <b>](https://a.test/x) and [B](javascript:x) "') == (
        '<a href="https://a.test/x" rel="noopener noreferrer">A &lt;b&gt;</a> and [B](javascript:x) &#34;'
    )


def test_attribution_links_only_web_addresses() -> None:
    assert linkified("See https://a.test/x?b=1&c=2. <b> javascript:alert(1)") == (
        'See <a href="https://a.test/x?b=1&amp;c=2" rel="noopener noreferrer">https://a.test/x?b=1&amp;c=2</a>. '
        "&lt;b&gt; javascript:alert(1)"
    )


# ---- since the last run


def test_the_page_says_what_changed() -> None:
    data = dataclasses.replace(report_data(), since=since())
    page = Page(render(data))
    assert not page.misplaced
    for expected in (
        "sourced again from s3://bucket/runs/demo-1 .",
        "2,105 stood without a request; 310 addresses were asked again, of which 4 came back to life.",
        "Accuracy on novel categories 58.0 % – –",
        "Accuracy on base categories 61.0 % 61.0 % +0.0",
        "Retrieval precision 74.2 % 75.0 % +0.8",
        "Novel pictures kept of those wanted 75.8 % 76.9 % +1.2",
        "31 new pictures, 12 gone, 1,200 in both, of which 7 at another rank.",
        "apple 39 50 20 9 2",
        "bagel 60 57 3 5",
        "7 more categories changed less.",
        "The server has no such picture (404 or 410). 8",
        "Not among the category's candidates any more. 3",
        "moon_phase 1",
        "apple pictures-1.example.org 41 3",
    ):
        assert expected in page.text, expected
    assert ("a", {"href": "#since"}) in page.tags
    assert render(data) == render(dataclasses.replace(report_data(), since=since()))


def test_a_page_without_a_previous_run_does_not_speak_of_one() -> None:
    page = Page(render(report_data()))
    assert "last run" not in page.text and ("a", {"href": "#since"}) not in page.tags
    summary = summarise(report_data())
    assert "since" not in summary and "Since" not in summary_table(summary)


def test_nothing_changed_is_said_plainly() -> None:
    nothing = Changes(0, 0, 5, 0, {}, (), (), 0)
    page = Page(render(dataclasses.replace(report_data(), since=dataclasses.replace(since(), changes=nothing))))
    assert not page.misplaced
    assert "0 new pictures, 0 gone, 5 in both, of which 0 at another rank." in page.text
    assert "Why pictures are gone" not in page.text and "The largest moves" not in page.text


def test_the_summary_and_its_table_say_what_changed() -> None:
    summary = summarise(dataclasses.replace(report_data(), since=since()))
    assert json.loads(json.dumps(summary)) == summary
    found = summary["since"]
    assert found["run"] == "s3://bucket/runs/demo-1"
    assert found["pictures"] == {"new": 31, "gone": 12, "in_both": 1200, "moved": 7}
    assert found["gone_because"] == {"not_found": 8, "not_a_candidate": 3, "moon_phase": 1}
    assert found["categories"][1] == {"name": "bagel", "new": 0, "gone": 3, "stayed": 57, "moved": 5}
    assert found["moves"][1] == {"category": "bagel", "url": "http://b.test/2.jpg", "then": 1, "now": 2}
    assert found["now"]["accuracy"] == {"base": 0.61, "novel": None}
    assert found["addresses"] == {"reused": 2105, "asked_again": 310, "revived": 4}
    lines = summary_table(summary).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[:9] == [
        "Since s3://bucket/runs/demo-1",
        "                                then         now",
        "accuracy, base                61.0 %      61.0 %",
        "accuracy, novel               58.0 %           –",
        "retrieval precision           74.2 %      75.0 %",
        "novel pictures kept            1,212       1,231",
        "pictures: 31 new, 12 gone, 1,200 in both, of which 7 at another rank",
        "addresses: 2,105 not asked again, 310 asked again, of which 4 came back to life",
        "",
    ]


# ---- texts


@pytest.mark.parametrize(
    ("url", "link", "host"),
    [
        ("http://a.test/x", "http://a.test/x", "a.test"),
        ("HTTPS://user:secret@A.test:8443/x", "HTTPS://user:secret@A.test:8443/x", "a.test"),
        ("javascript:alert(1)", None, "–"),
        ("java\nscript:alert(1)", None, "–"),
        ("//a.test/x", None, "a.test"),
        ("http:///x", None, "–"),
        ("http://[::1", None, "–"),
        ("", None, "–"),
    ],
)
def test_links_and_hosts(url: str, link: str | None, host: str) -> None:
    assert text.web_link(url) == link
    assert text.host(url) == host


def test_plain_text_is_one_harmless_line() -> None:
    assert text.plain("a\u202eb\x00c\n\n d") == "a b c d"
    assert text.plain("x" * 300, 10) == "xxxxxxxxx…"
    assert text.plain("lone \ud800 surrogate").encode() == b"lone surrogate"


def test_numbers_as_text() -> None:
    assert [text.size(n) for n in (0, 999, 1000, 61_234, 14_681_000, 3 * 10**11)] == [
        "0 B", "999 B", "1.0 kB", "61.2 kB", "14.7 MB", "300 GB",
    ]  # fmt: skip
    assert [text.duration(s) for s in (0.4, 59, 61, 12_345)] == ["0 s", "59 s", "1 min 1 s", "3 h 25 min"]
    assert [text.points(p) for p in (0.1234, -0.05, None)] == ["+12.3", "−5.0", "–"]
    assert text.plural(1, "category", "categories") == "1 category"
    assert text.plural(1200, "picture") == "1,200 pictures"


# ---- charts


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.43, 0.61], (0.0, 0.2, 0.4, 0.6, 0.8)),
        ([], (0.0, 0.5, 1.0)),
        ([0.0], (0.0, 0.5, 1.0)),
        ([1.0], (0.0, 0.5, 1.0)),
    ],
)
def test_axis_from_zero(values: list[float], ticks: tuple[float, ...]) -> None:
    assert nice_axis(values, from_zero=True).ticks == ticks


def test_axis_holds_its_values() -> None:
    for values in ([2.07, 3.56], [1e-6, 2e-6], [5, 5], [0, 65], [-3, 1000]):
        axis = nice_axis(values)
        assert axis.low <= min(values) and max(values) <= axis.high
        assert 2 <= len(axis.ticks) <= 8
    assert nice_axis([0, 65], tight=True, ticks=3).high == 65


def test_labels_at_line_ends_keep_their_distance() -> None:
    assert apart([50, 52], 17, 0, 100) == [50, 67]
    assert apart([99, 98], 17, 0, 100) == [100, 83]
    assert apart([10, 80], 17, 0, 100) == [10, 80]
    assert apart([], 17, 0, 100) == []


def test_long_curves_are_thinned_but_keep_their_ends() -> None:
    points = [(float(i), float(i)) for i in range(5000)]
    thinned = thin(points, 240)
    assert len(thinned) == 240
    assert thinned[0] == points[0] and thinned[-1] == points[-1]


def test_charts_carry_their_numbers_and_escape_labels() -> None:
    dots = dot_chart([Dot("<i>", 0.25, "base"), Dot("none", None, "base")], nice_axis([0.25]), 0.2, 'a "title"')
    assert "25.0\u00a0%" in dots and "not measured" in dots
    assert "<i>" not in dots and "&lt;i&gt;" in dots
    assert 'aria-label="a &#34;title&#34;"' in dots
    line = Line("training", "train", [(0, None), (1, 0.5), (2, 0.75)])
    empty = Line("held out", "heldout", [(0, None)])
    curve = line_chart([line, empty], nice_axis([0, 2]), nice_axis([0.5, 1]), x_label="x", as_percent=False, title="t")
    assert "0.750" in curve and "held out" not in curve
    assert curve.count("<polyline") == 1


def test_a_prompt_below_the_hand_written_one_comes_with_advice() -> None:
    data = report_data()
    assert advice(data) == ()
    poor = dataclasses.replace(
        data.best.accuracy,
        learned=Accuracy(0.184, 0.225),
        manual=Accuracy(0.186, 0.281),
        best_manual=Accuracy(0.3, 0.3),
    )
    data = dataclasses.replace(data, rounds=tuple(dataclasses.replace(r, accuracy=poor) for r in data.rounds))
    (sentence,) = advice(data)
    assert "below the hand-written one, 22.5 % against 28.1 % on novel categories." in sentence
    assert sentence in Page(render(data)).text
    summary = summarise(data)
    assert summary["advice"] == [sentence]
    lines = summary_table(summary).splitlines()
    assert max(map(len, lines)) <= 100
    assert sentence in " ".join(lines)


# ---- the summary


def test_the_summary_has_what_programs_look_for() -> None:
    summary = summarise(report_data())
    assert json.loads(json.dumps(summary)) == summary
    first = summary["rounds"][0]
    assert first["round"] == 1
    assert first["accuracy"]["manual"] == {"template": "a photo of {name}", "base": 0.431, "novel": 0.412}
    assert first["accuracy"]["learned"] == {"base": 0.61, "novel": 0.58}
    assert first["accuracy"]["best_manual"]["template"] == "a drawing of a {name}."
    assert first["retrieval_precision"] == 0.742
    assert first["yield"] == {"kept": 199, "target": 240, "categories": 6, "categories_full": 3}
    assert first["seconds"]["download"] == 14.75
    assert set(first["refusals"]) == {"not_found", "timed_out", "duplicate", "private_address", "not_an_image"}
    assert summary["novel"]["best_round"] == 2
    assert summary["totals"]["text_passes"] == 130
    assert summary["totals"]["seconds"]["all"] == 140.29


def test_the_table_is_aligned_and_narrow() -> None:
    table = summary_table(summarise(report_data()))
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[3] == "round 1         43.1 %  41.2 %      52.2 %  49.7 %      50.9 %  50.1 %      61.0 %  58.0 %"
    assert 'hand-written: "a photo of {name}"; best: "a drawing of a {name}."' in lines
    assert "round 1 (base)          74.2 %   81.5 %          199/240               3/6" in table
    seconds = [line for line in lines if line.startswith(("Seconds", "once", "round 1  ", "in all"))]
    assert len({len(line) for line in seconds if not line.startswith("round 1    ")}) == 1


def test_the_table_stays_narrow_for_a_run_of_lvis_size() -> None:
    data = report_data(rounds=3)
    big = dataclasses.replace(data.novel, kept=101_100, target=101_100, categories=337, categories_full=337)
    big = dataclasses.replace(big, seconds={stage: 1000 * value for stage, value in data.novel.seconds.items()})
    assert max(map(len, summary_table(summarise(dataclasses.replace(data, novel=big))).splitlines())) <= 100
