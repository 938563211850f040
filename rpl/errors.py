"""The project's exceptions, as a tree of two branches.

    RplError
    ├── BadInput   the user must change something; retrying cannot help      exit code 2
    └── TryAgain   the same call may succeed later (network, store, memory)  exit code 75

Raised anywhere below `jobs/`, turned into exit codes in `jobs/` alone. A lost race is a normal return, not an error.
"""


class RplError(Exception):
    """Base of what the command line prints as one sentence instead of a traceback."""

    exit_code = 1


class BadInput(RplError):
    """Input that only the user can mend. The message is one sentence: the file, the record, what is wrong, the fix."""

    exit_code = 2


class TryAgain(RplError):
    """A failure that the same call may not meet again: a store that does not answer, a full disk being emptied."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h; Argo's retry expression names it
