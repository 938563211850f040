"""Category lists: names, descriptions and the base/novel split, from every form they come in.

Reads our JSON (`[{name, description?, split?, id?}]`), PromptDet's text (a line `name name_which_is_description` for
each) with its file of base indices, and the `categories` of COCO and LVIS files. Row order is the order of the
embeddings everywhere else. Names are data: shown and embedded, never paths.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rpl.errors import BadInput
from rpl.json_stream import stream_lists
from rpl.store import open_uri, read_uri

Split = Literal["base", "novel"]

MAX_TEXT = 1000
"""Longest name or description, characters; LVIS's longest has 246."""

_WHICH_IS = "_which_is_"

# The LVIS file's spelling, which PromptDet's list (and the reference's README, by `mv`) corrects. The other name that
# the README renames, `monitor_(computer_equipment) computer_monitor`, differs in its underscores only.
_CORRECTIONS = {"speaker (stero equipment)": "speaker (stereo equipment)"}


@dataclass(frozen=True)
class Category:
    """One category. `id` is the data set's own (LVIS and COCO count from 1); `name` has spaces, not underscores."""

    id: int
    name: str
    description: str
    split: Split


def split_name(text: str) -> tuple[str, str]:
    """Name and description of `name_which_is_description`, with spaces; without the middle, no description."""
    name, _, description = text.partition(_WHICH_IS)
    name = _spaced(name)
    return _CORRECTIONS.get(name, name), _spaced(description)


def match_key(name: str) -> str:
    """What two spellings of one category share: case, underscores and runs of spaces do not tell names apart."""
    return split_name(name)[0].casefold()


def read_categories(file: str | None, base: str | None, annotated: Sequence[Category], source: str) -> list[Category]:
    """The category list of a run, in row order.

    Args:
        file: URI of a list in one of the forms above; None: the categories of the annotations, all base.
        base: URI of PromptDet's file of zero-based base indices; None: splits as the list says, base by default.
        annotated: categories of the training annotations.
        source: the annotations' name in messages.

    Raises:
        BadInput: a list that cannot be read, an empty, repeated or unprintable name, no base category, or a base
            category that the annotations do not know (it could never have a training crop).
    """
    if file is None:
        # by id, so that the order of the JSON is nothing
        categories, origin, has_splits = sorted(annotated, key=lambda category: category.id), source, False
    else:
        records = _read_records(file)
        categories, origin = _checked(records, file), file
        has_splits = any(record.split is not None for record in records)
    if base is not None:
        if has_splits:
            raise BadInput(f"{origin}: gives splits, and so does {base}; remove one of the two.")
        categories = with_base(categories, read_uri(base), base)
    if not any(category.split == "base" for category in categories):
        raise BadInput(f"{origin}: no category is base, so there is nothing to learn from; mark some as base.")
    known = {match_key(category.name) for category in annotated}
    for row, category in enumerate(categories):
        if category.split == "base" and match_key(category.name) not in known:
            raise BadInput(
                f"{origin}: base category {category.name!r} (row {row}) is empty, since {source} has no category of "
                "that name; correct the name, or make it novel."
            )
    return categories


def with_base(categories: Sequence[Category], data: bytes, source: str) -> list[Category]:
    """`categories` with those at the zero-based indices in `data` (`0, 1, 2`) base and all others novel.

    Raises:
        BadInput: something is not an index into `categories`, or comes twice.
    """
    chosen: set[int] = set()
    for word in re.split(r"[\s,]+", _text(data, source).strip()):
        if not re.fullmatch(r"\d{1,9}", word, re.ASCII):
            raise BadInput(f"{source}: {word[:50]!r} is not an index; write numbers from 0, separated by commas.")
        if int(word) >= len(categories):
            raise BadInput(f"{source}: index {word} is beyond the {len(categories)} categories (0-based); correct it.")
        if int(word) in chosen:
            raise BadInput(f"{source}: index {word} comes twice; remove one.")
        chosen.add(int(word))
    return [replace(category, split="base" if row in chosen else "novel") for row, category in enumerate(categories)]


def categories_from_records(records: Iterable[Any], source: str) -> list[Category]:
    """Categories of a COCO or LVIS file's `categories` list, all base; LVIS's `def` is the description.

    Raises:
        BadInput: as `read_categories`, and where an id is missing.
    """
    read = [_record(raw, _entry(row), source) for row, raw in enumerate(records)]
    for record in read:
        if record.id is None:
            raise BadInput(f"{source}: {record.where} ({record.name!r}) has no id; give it one.")
    return _checked(read, source)


def rows_by_id(annotated: Sequence[Category], categories: Sequence[Category]) -> dict[int, int]:
    """Row in `categories` by the annotations' category id, matched by name; ids that are not listed are left out."""
    rows = {match_key(category.name): row for row, category in enumerate(categories)}
    return {c.id: rows[match_key(c.name)] for c in annotated if match_key(c.name) in rows}


def categories_to_json(categories: Sequence[Category]) -> bytes:
    """The committed `categories.json`: `[{id, name, description, split}]` in row order."""
    return json.dumps([asdict(category) for category in categories], indent=1, ensure_ascii=False).encode()


def categories_from_json(data: bytes) -> list[Category]:
    """What `categories_to_json` wrote."""
    return [Category(**raw) for raw in json.loads(data)]


@dataclass(frozen=True)
class _Record:
    """An entry as read; `where` names it in messages."""

    where: str
    name: str
    description: str
    id: int | None
    split: Split | None


def _read_records(uri: str) -> list[_Record]:
    with open_uri(uri) as stream:
        start = stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"{":
        return _from_annotations(uri)
    data = read_uri(uri)
    return _from_json(data, uri) if start == b"[" else _from_text(data, uri)


def _from_annotations(uri: str) -> list[_Record]:
    with open_uri(uri) as stream:
        raw = [entry for key, entry in stream_lists(stream, uri) if key == "categories"]
    if not raw:
        raise BadInput(f"{uri}: has no 'categories'; give a category list, or a COCO or LVIS file.")
    return [_record(entry, _entry(row), uri) for row, entry in enumerate(raw)]


def _from_json(data: bytes, uri: str) -> list[_Record]:
    try:
        raw = json.loads(_text(data, uri))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{uri}: is not valid JSON ({_one_line(error)}); correct it.") from error
    return [_record(entry, _entry(row), uri) for row, entry in enumerate(raw)]


def _from_text(data: bytes, uri: str) -> list[_Record]:
    return [
        _from_line(line, f"line {number}", uri)
        for number, line in enumerate(_text(data, uri).split("\n"), start=1)
        if line.strip()
    ]


def _from_line(line: str, where: str, uri: str) -> _Record:
    words = line.split()
    if len(words) > 2:
        raise BadInput(f"{uri}: {where} has {len(words)} words, not two; write `name name_which_is_description`.")
    name, description = split_name(words[-1])
    if match_key(words[0]) != match_key(name):
        raise BadInput(f"{uri}: {where} names both {words[0]!r} and {name!r}; write the same name twice.")
    return _record({"name": name, "description": description}, where, uri)


def _record(raw: Any, where: str, source: str) -> _Record:
    if not isinstance(raw, dict):
        raise BadInput(f'{source}: {where} is not an object with a name; write {{"name": …}}.')
    text = _field(raw, "name", where, source, required=True)
    name, description = split_name(text)
    given = _field(raw, "description", where, source) or _field(raw, "def", where, source)
    split, number = raw.get("split"), raw.get("id")
    if split not in (None, "base", "novel"):
        raise BadInput(f"{source}: {where} ({name!r}) has split {split!r}; write base or novel.")
    if number is not None and (type(number) is not int or not -(2**63) <= number < 2**63):
        raise BadInput(f"{source}: {where} ({name!r}) has id {number!r}, not a whole number; correct it.")
    return _Record(where, name, _spaced(given) if given else description, number, split)


def _entry(row: int) -> str:
    return f"category {row} (from 0)"


def _field(raw: dict[str, Any], key: str, where: str, source: str, *, required: bool = False) -> str:
    value = raw.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise BadInput(f"{source}: {where} has no text as its {key}; write it in quotes.")
    if len(value) > MAX_TEXT:
        raise BadInput(f"{source}: {where} has a {key} of {len(value)} characters; shorten it to {MAX_TEXT} at most.")
    bad = next((sign for sign in value if _is_control(sign)), None)
    if bad is not None:
        raise BadInput(f"{source}: {where} has the control character U+{ord(bad):04X} in its {key}; remove it.")
    return value


def _checked(records: Sequence[_Record], source: str) -> list[Category]:
    if not records:
        raise BadInput(f"{source}: holds no categories; add some.")
    without_id = [record for record in records if record.id is None]
    if without_id and len(without_id) < len(records):
        raise BadInput(f"{source}: {without_id[0].where} has no id while others have one; give all an id, or none.")
    for record in records:
        if not record.name:
            raise BadInput(f"{source}: {record.where} has an empty name; name it or remove it.")
    _refuse_twice(records, lambda record: match_key(record.name), "the name", source)
    if not without_id:
        _refuse_twice(records, lambda record: record.id, "the id", source)
    return [
        Category(row + 1 if record.id is None else record.id, record.name, record.description, record.split or "base")
        for row, record in enumerate(records)
    ]


def _refuse_twice(records: Sequence[_Record], key: Callable[[_Record], Any], what: str, source: str) -> None:
    seen: dict[Any, _Record] = {}
    for record in records:
        first = seen.setdefault(key(record), record)
        if first is not record:
            shown = repr(record.name) if what == "the name" else str(record.id)
            raise BadInput(
                f"{source}: {first.where} and {record.where} both have {what} {shown}; remove or change one."
            )


def _is_control(sign: str) -> bool:
    """Control characters, line and paragraph separators, half surrogates: what breaks lines, logs and encodings."""
    return unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp")


def _spaced(text: str) -> str:
    return " ".join(text.replace("_", " ").split())


def _text(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{source}: is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
