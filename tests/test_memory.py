"""Peaks of memory, in a process with and without a GPU."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from rpl.memory import peak_device_memory_bytes, peak_memory_bytes


def test_the_peak_is_in_bytes_and_stays_after_what_was_held_is_gone() -> None:
    # The kernel hands the peak of whoever started a process down to it, so only a lower bound is sure.
    code = 'held = b"x" * 2**28; del held; from rpl.memory import peak_memory_bytes; print(peak_memory_bytes())'
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert 2**28 < int(done.stdout) < 2**36
    assert peak_memory_bytes() > 2**20


@pytest.mark.parametrize("is_initialized", [True, False])
def test_device_memory_is_asked_for_only_where_a_device_is_in_use(
    monkeypatch: pytest.MonkeyPatch, is_initialized: bool
) -> None:
    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_initialized=lambda: is_initialized, max_memory_allocated=lambda: 123
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert peak_device_memory_bytes() == (123 if is_initialized else None)


def test_asking_imports_no_torch() -> None:
    code = "import sys, rpl.memory as m; assert m.peak_device_memory_bytes() is None; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
