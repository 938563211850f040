"""The journal: what was measured comes back bit for bit, is saved when it should be, and bad files do no harm."""

from __future__ import annotations

import math
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from rpl.learning import FileJournal, NoJournal, journal
from rpl.learning.journal import Measured

NEVER = 1e9


class Files(dict[str, bytes]):
    """Where a journal saves."""

    def journal(self, every_s: float = NEVER) -> FileJournal:
        return FileJournal(dict(self), self.__setitem__, every_s)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(journal, "time", types.SimpleNamespace(monotonic=lambda: self.now))


def key(number: int) -> bytes:
    return bytes([number]) * 32


def measured(number: int = 0, shape: tuple[int, ...] = (2, 3)) -> Measured:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(number))
    return Measured(0.1 + number, 1 / 3, None, None, gradient)


def same(found: Measured | None, expected: Measured) -> bool:
    assert found is not None
    numbers = [
        (each.loss, each.accuracy, each.holdout_loss, each.holdout_accuracy) for each in (found, expected)
    ]  # fmt: skip
    return (
        numbers[0] == numbers[1]
        and found.gradient.dtype == torch.float32
        and found.gradient.shape == expected.gradient.shape
        and found.gradient.numpy().tobytes() == expected.gradient.numpy().tobytes()
    )


def interrupt(files: Files, entries: dict[bytes, Measured], error: BaseException | None = None) -> None:
    """An attempt that measures `entries` and is then torn away."""
    error = error or RuntimeError()
    with pytest.raises(type(error)), files.journal() as torn:
        for name, each in entries.items():
            torn.add(name, each)
        raise error


def valid_file() -> bytes:
    files = Files()
    interrupt(files, {key(1): measured(1), key(2): measured(2)})
    return files["000000.safetensors"]


@pytest.mark.parametrize("shape", [(2, 5), (3, 2, 5)], ids=["shared", "of each category"])
@pytest.mark.parametrize("held", [(None, None), (0.1 + 0.2, 1 / 3), (5e-324, 0.0)])
def test_what_was_measured_comes_back_bit_for_bit(
    shape: tuple[int, ...], held: tuple[float | None, float | None]
) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gradient.view(-1)[:3] = torch.tensor([1e-45, -0.0, 3e38])  # a number next to zero, a signed zero, a large one
    given = Measured(math.pi * 1e-7, 2 / 3, *held, gradient)
    files = Files()
    interrupt(files, {key(1): given, key(2): measured(5, shape)})
    again = files.journal()
    assert len(again) == 2
    assert same(again.find(key(1)), given) and same(again.find(key(2)), measured(5, shape))
    assert again.find(key(3)) is None


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_an_exception_of_any_kind_saves_what_is_left(error: BaseException) -> None:
    files = Files()
    interrupt(files, {key(1): measured(1)}, error)
    assert list(files) == ["000000.safetensors"]
    assert same(files.journal().find(key(1)), measured(1))


def test_a_clean_end_saves_nothing() -> None:
    files = Files()
    with files.journal() as clean:
        clean.add(key(1), measured())
    assert files == {}


def test_an_exception_with_nothing_new_saves_nothing() -> None:
    files = Files()
    interrupt(files, {key(1): measured()})
    interrupt(files, {})
    assert list(files) == ["000000.safetensors"]


def test_files_are_saved_so_many_seconds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, files = Clock(monkeypatch), Files()
    saved = []
    with files.journal(every_s=30) as slow:
        for number, seconds in enumerate([0, 29.9, 0.1, 0, 29.9, 60, 0.1]):
            clock.now += seconds
            slow.add(key(number), measured(number))
            saved.append(len(files))
    assert saved == [0, 0, 1, 1, 1, 2, 2]
    assert [len(load(data)["keys"]) for data in files.values()] == [3, 3], "each entry is saved once"
    again = files.journal()
    assert all(same(again.find(key(number)), measured(number)) for number in range(6))


def test_an_entry_is_found_before_it_is_saved() -> None:
    """Ranks save at different moments; what one finds, all must find, or they would wait in different passes."""
    unsaved = Files().journal()
    unsaved.add(key(1), measured(1))
    assert same(unsaved.find(key(1)), measured(1))
    assert len(unsaved) == 1


def test_file_numbers_go_on_after_earlier_ones() -> None:
    files = Files()
    for number in range(3):
        interrupt(files, {key(number): measured(number)})
    assert list(files) == ["000000.safetensors", "000001.safetensors", "000002.safetensors"]
    del files["000001.safetensors"]
    interrupt(files, {key(3): measured(3)})
    files["notes.txt"] = b"mine"
    interrupt(files, {key(4): measured(4)})
    numbers = [name.partition(".")[0] for name in files]
    assert numbers == ["000000", "000002", "000003", "notes", "000004"]
    assert [files.journal().find(key(number)) is not None for number in range(5)] == [True, False, True, True, True]


FOREIGN: dict[str, bytes] = {
    "empty": b"",
    "text": b"not a journal",
    "other tensors": save({"ctx1": torch.zeros(1, 4)}),
    "no gradients": save({"keys": torch.zeros((2, 32), dtype=torch.uint8), "numbers": torch.zeros(2, 4)}),
    "too few numbers": save(
        {"keys": torch.zeros((2, 32), dtype=torch.uint8), "numbers": torch.zeros(2, 3), "gradients": torch.zeros(2, 1)}
    ),
    "numbers in a row": save(
        {"keys": torch.zeros((2, 32), dtype=torch.uint8), "numbers": torch.zeros(2), "gradients": torch.zeros(2, 1)}
    ),
    "other counts": save(
        {"keys": torch.zeros((2, 32), dtype=torch.uint8), "numbers": torch.zeros(2, 4), "gradients": torch.zeros(3, 1)}
    ),
    "keys that are no bytes": save(
        {"keys": torch.full((2, 32), 0.5), "numbers": torch.zeros(2, 4), "gradients": torch.zeros(2, 1)}
    ),
    "keys beyond a byte": save(
        {"keys": torch.full((2, 32), 256), "numbers": torch.zeros(2, 4), "gradients": torch.zeros(2, 1)}
    ),
    "single values": save({"keys": torch.tensor(1), "numbers": torch.tensor(1.0), "gradients": torch.tensor(1.0)}),
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_passed_over_and_the_others_read(data: bytes) -> None:
    again = FileJournal({"000000.safetensors": data, "000001.safetensors": valid_file()}, Files().__setitem__)
    assert len(again) == 2
    assert same(again.find(key(1)), measured(1)) and same(again.find(key(2)), measured(2))


@given(st.binary(max_size=300))
def test_random_bytes_are_passed_over(data: bytes) -> None:
    assert len(FileJournal({"000000.safetensors": data}, Files().__setitem__)) == 0


def test_a_file_that_was_cut_anywhere_is_passed_over() -> None:
    whole = valid_file()
    for length in range(len(whole)):
        assert len(FileJournal({"000000.safetensors": whole[:length]}, Files().__setitem__)) == 0, length


@given(st.data())
def test_a_file_with_a_damaged_head_never_raises(data: st.DataObject) -> None:
    whole = bytearray(valid_file())
    head = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, head - 1))] = data.draw(st.integers(0, 255))
    assert len(FileJournal({"000000.safetensors": bytes(whole)}, Files().__setitem__)) in (0, 1, 2)


def test_no_journal_remembers_nothing() -> None:
    none = NoJournal()
    none.add(key(1), measured())
    assert none.find(key(1)) is None
