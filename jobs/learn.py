"""Learn the prompt's context vectors.

For example:

    python -m jobs.learn --run s3://bucket/runs/first --round 1

With four GPUs, each doing its share of every pass:

    RPL_RANKS=4 python -m jobs.learn --run s3://bucket/runs/first --round 1

which is what torchrun does (`torchrun --standalone --nproc-per-node 4 -m -- jobs.learn --run ...`), but for the exit
code: torchrun's own is 1 whatever a rank's was.
"""

import os
import sys

from jobs.common import stage_command

main = stage_command("learn")


def _ranks() -> int:
    """How many processes to start; 1 in a process that was started as one of several."""
    wanted = os.environ.get("RPL_RANKS", "")
    return int(wanted) if wanted.isdecimal() and "RANK" not in os.environ and "--help" not in sys.argv else 1


if __name__ == "__main__":
    if (count := _ranks()) > 1:
        from rpl.launch import run_ranks

        sys.exit(run_ranks(count, "jobs.learn", sys.argv[1:]))
    main()
