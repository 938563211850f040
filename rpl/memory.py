"""The most memory that this process has held: of the machine, and of its GPU."""

from __future__ import annotations

import platform
import resource
import sys


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far; its workers' is not in it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def peak_device_memory_bytes() -> int | None:
    """Peak of what tensors held on the current CUDA device so far; None in a process that uses none.

    Imports nothing and starts no CUDA context: most stages have no torch.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())
