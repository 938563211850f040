"""What the previous run judged: which verdicts stand, whose pictures are taken, and that nobody is asked for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpl import download
from rpl.errors import BadInput
from rpl.judged import Judged, last_verdicts, standing, take_pictures
from rpl.reasons import Reason
from rpl.tars import write_tar
from rpl.waves import Verdict

ON_THE_WAY = [reason for reason in Reason if reason.stage in ("fetch", "picture")]


def ok(sha256: str) -> Verdict:
    return Verdict("ok", None, "2020-01-01T00:00:00Z", sha256[:24], sha256, "0" * 16, 3, 2, "image/png")


def bad(reason: Reason) -> Verdict:
    return Verdict(reason.kind, reason.value, "2020-01-01T00:00:00Z")


def record(verdicts: dict[str, Verdict], not_needed: Sequence[str] = ()) -> pa.Table:
    """The record of a download in one category."""
    urls = [*verdicts, *not_needed]
    table = pa.table({"category": pa.array([0] * len(urls), pa.int32()), "url": pa.array(urls, pa.string())})
    return download.record(table, download.Walk(verdicts, {0: len(verdicts)}))


def test_verdicts_come_back_as_they_were_recorded() -> None:
    verdicts = {"a": ok("aa"), "b": bad(Reason.OPTED_OUT), "c": bad(Reason.NOT_FOUND)}
    assert last_verdicts([record(verdicts, ["d"])], "abcde") == verdicts
    assert last_verdicts([record(verdicts)], {"b", "x"}) == {"b": verdicts["b"]}, "only what is asked about"
    assert last_verdicts([], "a") == {} == last_verdicts([record({})], "a") == last_verdicts([record(verdicts)], "")


def test_the_last_verdict_counts() -> None:
    records = [record({"a": ok("aa"), "b": bad(Reason.TIMED_OUT)}), record({"a": bad(Reason.DENIED)}, ["b"])]
    assert last_verdicts(records, "ab") == {"a": bad(Reason.DENIED), "b": bad(Reason.TIMED_OUT)}


@pytest.mark.parametrize("reason", ON_THE_WAY)
def test_refused_stands_and_failed_is_asked_again(reason: Reason) -> None:
    verdicts = {"a": ok("aa"), "b": bad(reason)}
    assert standing(verdicts).keys() == ({"a", "b"} if reason.kind == "refused" else {"a"})


def test_a_reason_that_is_not_known_any_more_does_not_stand() -> None:
    assert standing({"a": Verdict("refused", "moon_phase", "2020-01-01T00:00:00Z")}) == {}


@given(st.data())
def test_nobody_is_asked_for_what_stands(data: st.DataObject) -> None:
    urls = [f"u{number}" for number in range(10)]
    verdict = st.one_of(st.sampled_from("xyz").map(ok), st.sampled_from(ON_THE_WAY).map(bad))
    verdicts = {url: data.draw(verdict) for url in data.draw(st.lists(st.sampled_from(urls), unique=True))}
    judged = Judged(verdicts, standing(verdicts))
    asked: list[str] = []
    reused: list[int] = []

    def ask(wave: Sequence[str]) -> dict[str, Verdict]:
        assert wave, "a wave holds an address at least"
        asked.extend(wave)
        return dict.fromkeys(wave, ok("new"))

    wave = data.draw(st.lists(st.sampled_from(urls), unique=True, min_size=1))
    found = judged.before(ask, reused.append)(wave)
    assert found.keys() == set(wave)
    assert not judged.stands.keys() & set(asked)
    assert {url: found[url] for url in wave if url in judged.stands} == {
        url: verdict for url, verdict in judged.stands.items() if url in wave
    }
    assert sum(reused) + len(asked) == len(wave)


def test_facts_count_different_addresses_that_were_needed() -> None:
    before = {
        "good": ok("aa"), "refused": bad(Reason.TOO_SMALL), "dead": bad(Reason.NOT_FOUND),
        "risen": bad(Reason.TIMED_OUT), "late": ok("bb"),
    }  # fmt: skip
    judged = Judged(before, standing(before))
    now = {**before, "risen": ok("cc"), "new": ok("dd"), "dead": bad(Reason.SERVER_ERROR)}
    del now["late"]
    table = record(now, ["late", "good"])
    assert judged.facts(table) == {"reused": 2, "asked_again": 2, "revived": 1}
    nothing_stands = Judged(before, {})
    assert nothing_stands.facts(table) == {"reused": 0, "asked_again": 4, "revived": 1}
    assert Judged({}, {}).facts(record({})) == {"reused": 0, "asked_again": 0, "revived": 0}


def test_pictures_are_taken_by_key(tmp_path: Path) -> None:
    samples = [(key, {"jpg": key.encode(), "json": b"{}"}) for key in ("aa", "bb", "cc")]
    write_tar(tmp_path / "images.tar", [*samples, ("dd", {"json": b"{}"})])
    kept: dict[str, bytes] = {}
    assert take_pictures(tmp_path / "images.tar", {"bb", "dd", "zz"}, kept.__setitem__) == {"bb"}
    assert kept == {"bb": b"bb"}
    (tmp_path / "torn.tar").write_bytes((tmp_path / "images.tar").read_bytes()[:700])
    with pytest.raises(BadInput, match=r"torn\.tar: is not a whole tar"):
        take_pictures(tmp_path / "torn.tar", {"bb"}, kept.__setitem__)
