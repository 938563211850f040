"""Lists streamed out of a JSON object: equal to the whole file's, whatever the chunks, and exact about damage."""

from __future__ import annotations

import io
import json
import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpl import json_stream
from rpl.errors import BadInput
from rpl.json_stream import stream_lists


def streamed(data: bytes) -> list[tuple[str, Any]]:
    return list(stream_lists(io.BytesIO(data), "x.json"))


def problem(data: bytes) -> str:
    with pytest.raises(BadInput) as raised:
        streamed(data)
    said = str(raised.value)
    assert said.startswith("x.json: is not a whole JSON object (")
    assert said.endswith("); correct it or download it again.")
    return said[36:-35]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@given(
    st.dictionaries(st.text(max_size=5), values, max_size=5),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_equals_json_whatever_the_chunks(content: dict, chunk: int, ascii_only: bool, indent: int | None) -> None:
    data = json.dumps(content, ensure_ascii=ascii_only, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK_BYTES", chunk)
        expected = [(key, element) for key, value in content.items() if isinstance(value, list) for element in value]
        assert streamed(data) == expected


def test_lists_come_in_the_files_order_and_nan_comes_through() -> None:
    found = streamed(b'\xef\xbb\xbf {"b": [1, {"x": NaN}], "n": 12, "o": {"k": [3]}, "a": [], "c": [[2]]}\n')
    assert [key for key, _ in found] == ["b", "b", "c"]
    assert found[2] == ("c", [2])
    assert math.isnan(found[1][1]["x"])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "it ends early at character 0"),
        (b"<html>", "'{' expected, not '<' at character 0"),
        (b"[1, 2]", "'{' expected, not '[' at character 0"),
        (b'{"a": [1, 2', "it ends early at character 11"),
        (b'{"a": [1, {"b": "cut', "unterminated string starting at character 16"),
        (b'{"a": [1,]}', "expecting value at character 9"),
        (b'{"a": [1 2]}', "',' expected, not '2' at character 9"),
        (b'{"a" 1}', "':' expected, not '1' at character 5"),
        (b'{"a": 1,}', "expecting value at character 8"),
        (b"{1: 2}", "a key is not a string at character 2"),
        (b'{"a": 1} {}', "text follows the object at character 9"),
        (b'{"a": "\xff"}', "not UTF-8 at character 0"),
        (b'{"a": ' + b"[" * 200_000, "a value too deep or too long at character 7"),
        (b'{"a": [' + b"1" * 5000 + b"]}", "a value too deep or too long at character 7"),
    ],
)
def test_damage_is_named_with_its_place(data: bytes, expected: str) -> None:
    assert problem(data) == expected


def test_every_cut_of_a_file_is_noticed() -> None:
    whole = json.dumps({"images": [{"id": 1, "name": "ä"}, {"id": 2}], "x": {"y": 1.5}}, ensure_ascii=False).encode()
    for cut in range(len(whole)):
        problem(whole[:cut])


def test_memory_does_not_grow_with_the_file() -> None:
    class Endless(io.RawIOBase):
        """An object with 300,000 elements that is never there as a whole."""

        parts = iter([b'{"a": [0', *([b',{"bbox": [1.5, 2, 3, 4]}' * 1000] * 300), b"]}"])

        def read(self, size: int = -1) -> bytes:
            return next(self.parts, b"")

    tracemalloc.start()
    assert sum(1 for _ in stream_lists(Endless(), "x")) == 300_001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_one_endless_element_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 16)
    monkeypatch.setattr(json_stream, "MAX_ELEMENT_CHARS", 100)
    assert problem(b'{"a": ["' + b"x" * 1000 + b'"]}') == "unterminated string starting at character 7"
