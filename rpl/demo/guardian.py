"""Runs a command for as long as this process's standard input stays open: `python guardian.py COMMAND ...`.

The input is a pipe whose other end only the parent holds, so the command ends with its parent however that one ends,
SIGKILL included; a SIGTERM to this process does the same. Stopping is SIGTERM, then SIGKILL: a server that hangs on its
way out must not outlive its data.
Knows nothing of the command; imports nothing of this package, so that it starts at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 5.0


def main(command: list[str]) -> int:
    """Run `command` until it ends or standard input does; its exit status."""
    # Files that were handed down (a lock) go on to the command: while it lives, they are held.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: asked.set())
    threading.Thread(target=_watch_input, args=(asked,), daemon=True).start()
    threading.Thread(target=_stop_when_asked, args=(asked, process), daemon=True).start()
    return process.wait()


def _watch_input(asked: threading.Event) -> None:
    # Not sys.stdin: Python aborts at its exit while a thread is inside a buffered read.
    while os.read(0, 4096):
        continue
    asked.set()


def _stop_when_asked(asked: threading.Event, process: subprocess.Popen[bytes]) -> None:
    asked.wait()
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
