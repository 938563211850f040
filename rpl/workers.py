"""Worker processes that never outlive their parent and leave the decision to stop to it.

A SIGTERM reaches a whole process group: workers that died of it first would look like a broken pool, so they ignore
it. A parent that was killed outright leaves no orphans: each worker watches for it. A worker that dies breaks the
pool with an error; it never hangs (multiprocessing.Pool would).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor


def worker_pool(processes: int) -> ProcessPoolExecutor:
    """An executor of `processes` fresh (spawned) processes; functions and arguments must pickle."""
    return ProcessPoolExecutor(
        max_workers=processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_initialise,
        initargs=(os.getpid(),),
    )


def kill_workers() -> None:
    """Kill this process's workers at once; for a process that is about to leave."""
    for child in multiprocessing.active_children():
        child.kill()


def _initialise(parent: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
