"""Worker processes that never outlive their parent and leave the decision to stop to it.

A SIGTERM reaches a whole process group: workers that died of it first would look like a broken pool, so they ignore
it. A parent that was killed outright leaves no orphans: each worker watches for it. A worker that dies breaks the
pool with an error; it never hangs (multiprocessing.Pool would). Pixels come back through shared memory: pickled and
sent through a pipe they cost a worker a tenth of its time and the parent twice as much (measured).
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.uint8]
T = TypeVar("T")

_spawn = multiprocessing.get_context("spawn")


class Filled(NamedTuple):
    """What a worker wrote: the first `written` arrays of `slot`, and those that found no room there."""

    slot: int
    written: int
    rest: list[Array]


class SharedSlots:
    """Memory that a process shares with the workers it spawns: `slots` times `room` uint8 arrays of one shape.

    It has no name in the file system, so nothing is left of it however the processes end. Where /dev/shm is too small
    for it, as in a container's default of 64 MB, it is a file of the temporary folder.
    """

    def __init__(self, slots: int, room: int, shape: tuple[int, ...]) -> None:
        self._shape = (slots, room, *shape)
        self._memory = _spawn.RawArray(ctypes.c_uint8, math.prod(self._shape))

    def read(self, filled: Filled) -> Iterator[Array]:
        """The arrays in their order; those in the slot are to be copied before it is filled again."""
        yield from self._arrays(filled.slot)[: filled.written]
        yield from filled.rest

    def write(self, slot: int, arrays: Iterable[Array]) -> Filled:
        """Fills a slot. What finds no room there is sent through the pipe after all."""
        room = self._arrays(slot)
        count, rest = 0, []
        for array in arrays:
            if count < len(room):
                room[count] = array
                count += 1
            else:
                rest.append(array)
        return Filled(slot, count, rest)

    def _arrays(self, slot: int) -> Array:
        arrays: Array = np.ctypeslib.as_array(self._memory).reshape(self._shape)[slot]
        return arrays


_shared: list[SharedSlots] = []  # in a worker, the one that its pool was given


def worker_pool(processes: int, shared: SharedSlots | None = None) -> ProcessPoolExecutor:
    """An executor of `processes` fresh (spawned) processes; functions and arguments must pickle.

    Args:
        shared: what `fill_slot` fills in these processes.
    """
    return ProcessPoolExecutor(
        max_workers=processes, mp_context=_spawn, initializer=_initialise, initargs=(os.getpid(), shared)
    )


def fill_slot(function: Callable[[T], Iterable[Array]], call: tuple[int, T]) -> Filled:
    """In a worker: writes the arrays of `function(item)` to the pool's shared memory; `call` is (slot, item)."""
    slot, item = call
    return _shared[0].write(slot, function(item))


def kill_workers() -> None:
    """Kill this process's workers at once; for a process that is about to leave."""
    for child in multiprocessing.active_children():
        child.kill()


def _initialise(parent: int, shared: SharedSlots | None) -> None:
    if shared is not None:
        _shared.append(shared)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
