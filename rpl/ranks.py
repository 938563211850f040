"""Several processes that learn together, one on each GPU (torchrun), and the one that works alone.

Work is cut into parts whose number and order do not depend on how many processes there are. Each part is done by one
rank, then handed to all, and sums run over parts in their order: so any number of ranks gives the same result, on a
CPU to the bit. Knows nothing of prompts or losses.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rpl.errors import TryAgain

_SILENCE = datetime.timedelta(minutes=10)  # a rank that is gone is noticed after that at the latest


@dataclass(frozen=True)
class Ranks:
    """This process among `count` ones."""

    index: int = 0
    count: int = 1

    def owners(self, costs: Sequence[float]) -> list[int]:
        """For each part the rank that does it, such that ranks have about equal costs (longest part first)."""
        loads = [0.0] * self.count
        owners = [0] * len(costs)
        for part in sorted(range(len(costs)), key=lambda part: (-costs[part], part)):
            owners[part] = loads.index(min(loads))
            loads[owners[part]] += costs[part]
        return owners

    def hand_out(self, parts: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Fill every part with what its owner holds in it; all ranks give parts of the same shapes in the same order.

        Raises:
            TryAgain: another rank is gone.
        """
        if self.count == 1:
            return
        try:
            for part, owner in zip(parts, owners, strict=True):
                dist.broadcast(part, src=owner)
        except RuntimeError as error:
            raise TryAgain(f"learning: another rank is gone ({_first_line(error)}); start it again.") from error

    def agreed(self, number: int) -> int:
        """Rank 0's number."""
        told = torch.tensor([number])
        self.hand_out([told], [0])
        return int(told)


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started this process among; `ALONE` without torchrun.

    Raises:
        TryAgain: the other ranks do not appear.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    backends = "gloo"
    if torch.cuda.is_available():
        backends = "cpu:gloo,cuda:nccl"  # a number is agreed on, and `runtime.device: cpu` works, on the CPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group(backends, timeout=_SILENCE)
    except (RuntimeError, ValueError) as error:
        raise TryAgain(f"learning: the other ranks cannot be reached ({_first_line(error)}).") from error
    try:
        yield Ranks(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
