"""Starts several ranks of one command on this machine, and ends as they ended.

The starting is torchrun's own agent (torch.distributed's elastic launch); what torchrun as a program loses, the exit
code of the rank that failed, is kept here: whoever tries again goes by it.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rpl.errors import BadInput, TryAgain

_MEANT = (BadInput.exit_code, TryAgain.exit_code)


def run_ranks(count: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m MODULE ARGUMENTS` as `count` ranks that find each other; the exit code for them all.

    0 if all ended well; else the first failed rank's code where it is 2 or 75, 75 where that rank (or this process) was
    stopped by a signal, and 1 for anything else.
    """
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
    )  # fmt: skip
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # a failed rank has said why itself
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException:
        return TryAgain.exit_code
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = int(failure.exitcode)
        if code < 0:
            return TryAgain.exit_code
        return code if code in _MEANT else 1
    return 0
