"""The top-level lists of a JSON object too large to load, element by element.

Knows nothing of COCO. One pass in constant memory: each element is decoded by the standard library's C scanner, which
on an LVIS-like file is several times faster than an event parser, keeps NaN for the caller to refuse by name, and
needs one pass for any number of lists.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from rpl.errors import BadInput

CHUNK_BYTES = 1 << 20
MAX_ELEMENT_CHARS = 1 << 26
"""A single element beyond this is refused rather than held in memory."""

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"[-+.eE0-9]*")
_decode = json.JSONDecoder().raw_decode


def stream_lists(stream: BinaryIO, source: str) -> Iterator[tuple[str, Any]]:
    """`(key, element)` for every element of every list in the object that `stream` holds, in the file's order.

    Values of the object that are no lists are checked for syntax and passed over.

    Raises:
        BadInput: not one whole JSON object in UTF-8; raised where it is met.
    """
    try:
        yield from _Reader(stream).lists()
    except _Malformed as error:
        raise BadInput(f"{source}: is not a whole JSON object ({error}); correct it or download it again.") from error


class _Malformed(Exception):
    """What is wrong, as a clause."""


class _Reader:
    """A window on the text: `_text[_at:]` is what has been read and not yet used."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._used = 0  # characters before the window, for messages
        self._ended = False

    def lists(self) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        if not self._next_is("}"):
            while True:
                key = self._value()
                if not isinstance(key, str):
                    raise self._wrong("a key is not a string")
                self._expect(":")
                if self._next_is("["):
                    for element in self._elements():
                        yield key, element
                else:
                    self._value()
                if self._next_is("}"):
                    break
                self._expect(",")
        if self._peek():
            raise self._wrong("text follows the object")

    def _elements(self) -> Iterator[Any]:
        if self._next_is("]"):
            return
        while True:
            yield self._value()
            if self._next_is("]"):
                return
            self._expect(",")

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = _decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                place = self._used + getattr(error, "pos", self._at)
                if self._more():  # it may only be cut by the window's edge
                    continue
                problem = error.msg if isinstance(error, json.JSONDecodeError) else "a value too deep or too long"
                raise _malformed(problem, place) from error
            rest = _NUMBER.match(self._text, end)
            assert rest is not None  # the pattern matches the empty string
            if rest.end() < len(self._text) or not self._more():  # `1.` and `1e` at the edge decode as 1
                self._at = end
                return value

    def _peek(self) -> str:
        """The next character that is no space, or "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None  # the pattern matches the empty string
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _next_is(self, sign: str) -> bool:
        if self._peek() != sign:
            return False
        self._at += 1
        return True

    def _expect(self, sign: str) -> None:
        if not self._next_is(sign):
            found = self._peek()
            raise self._wrong(f"{sign!r} expected, not {found!r}" if found else "it ends early")

    def _more(self) -> bool:
        """Take in more text, doubling what is unused so that a long element costs linear time. False at the end."""
        rest = self._text[self._at :]
        if self._ended or len(rest) > MAX_ELEMENT_CHARS:
            return False
        data = self._stream.read(max(CHUNK_BYTES, len(rest)))
        self._ended = not data
        try:
            new = self._utf8.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise self._wrong("not UTF-8") from error
        self._used += self._at
        self._text, self._at = rest + new, 0
        return bool(new) or self._more()

    def _wrong(self, problem: str) -> _Malformed:
        return _malformed(problem, self._used + self._at)


def _malformed(problem: str, place: int) -> _Malformed:
    clause = problem[0].lower() + problem[1:].removesuffix(" at")  # the scanner says "… starting at"
    return _Malformed(f"{clause} at character {place}")
