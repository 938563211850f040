"""Runs a command for as long as this process's standard input stays open: `python guardian.py COMMAND ...`.

The input is a pipe whose other end only the parent holds, so the command ends with its parent however that one ends,
SIGKILL included. Stopping is SIGTERM, then SIGKILL: a server that hangs on its way out must not outlive its data.
Knows nothing of the command; imports nothing of this package, so that it starts at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

GRACE_S = 5.0


def main(command: list[str]) -> int:
    """Run `command` until it ends or standard input does; its exit status."""
    # Files that were handed down (a lock) go on to the command: while it lives, they are held.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)
    threading.Thread(target=_stop_at_end_of_input, args=(process,), daemon=True).start()
    return process.wait()


def _stop_at_end_of_input(process: subprocess.Popen[bytes]) -> None:
    # Not sys.stdin: Python aborts at its exit while a thread is inside a buffered read.
    while os.read(0, 4096):
        continue
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
