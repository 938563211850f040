"""Pictures to CLIP features: worker processes decode and cut views, threads run the tower in batches.

Knows nothing of categories or stages. A picture is decoded once for all of its views. Results come in the order of
the pictures, and a feature's bytes depend neither on the number of workers nor on the order of their work. On a CPU
each core takes whole batches of its own: torch's way, all cores on each operation, waits at every one of them for the
core that is decoding (measured on 2 cores: a third of the speed).

Letters: B views of a batch, V random views of a picture, H, W pixels, D dimension.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from rpl.clip import ClipModel
from rpl.errors import TryAgain
from rpl.views import Picture, Pixels, ViewRecipe, cut_views
from rpl.workers import worker_pool

_PICTURES_PER_TASK = 8  # sending them to a worker costs about as much as decoding a small one
_CPU_BATCH = 64  # larger ones fall out of a core's cache
_FEWEST_ROWS = 32  # CPU kernels for fewer than 16 rows round differently (measured); a small batch is filled up

S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True)
class Encoded:
    """Features of length 1, fp16: `feature` [D] of the evaluation view, `views` [V, D] of the random ones."""

    key: str
    feature: npt.NDArray[np.float16]
    views: npt.NDArray[np.float16]


def encode_pictures(
    clip: ClipModel, pictures: Iterable[Picture], recipe: ViewRecipe, *, batch_size: int, workers: int
) -> Iterator[Encoded]:
    """The features of `pictures`, in their order.

    Args:
        batch_size: views in one pass through the tower; on a CPU at most 64.
        workers: processes that decode.

    Raises:
        BadInput: a picture cannot be decoded.
        TryAgain: a worker process died.
    """
    on_cpu = clip.device.type == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    counts: deque[tuple[str, int]] = deque()
    cut = functools.partial(cut_views, recipe=recipe)
    with worker_pool(workers) as decoders, _tower_threads(threads) as towers:
        try:
            chunks = _noting(_chunks(pictures, _PICTURES_PER_TASK), counts)
            pixels = itertools.chain.from_iterable(
                itertools.chain.from_iterable(_in_order(decoders, cut, chunks, ahead=2 * workers + 2))
            )
            batches = _chunks(pixels, min(batch_size, _CPU_BATCH) if on_cpu else batch_size)
            encode = functools.partial(_encode, clip)
            features = itertools.chain.from_iterable(_in_order(towers, encode, batches, ahead=threads + 1))
            for feature in features:
                key, count = counts.popleft()
                views = np.empty((count, len(feature)), np.float16)
                for row in range(count):
                    views[row] = next(features)
                yield Encoded(key, feature, views)
        except BrokenProcessPool as error:
            raise TryAgain(
                "a process that decodes pictures died, most likely for lack of memory; try again, with a smaller "
                "runtime.workers if it happens once more."
            ) from error
        finally:
            decoders.shutdown(wait=False, cancel_futures=True)


def _encode(clip: ClipModel, batch: list[Pixels]) -> npt.NDArray[np.float16]:
    """The features [B, D] of a batch of views, of length 1."""
    filled = batch + [batch[0]] * (_FEWEST_ROWS - len(batch))
    features_BD = clip.encode_images(clip.normalise(torch.from_numpy(np.stack(filled))))
    unit_BD: npt.NDArray[np.float16] = torch.nn.functional.normalize(features_BD, dim=1).half().cpu().numpy()
    return unit_BD[: len(batch)]


def _noting(chunks: Iterable[list[Picture]], counts: deque[tuple[str, int]]) -> Iterator[list[Picture]]:
    """The same chunks; each picture's key and number of random views is noted as it passes."""
    for chunk in chunks:
        counts.extend((picture.key, picture.views) for picture in chunk)
        yield chunk


def _chunks(items: Iterable[S], size: int) -> Iterator[list[S]]:
    todo = iter(items)
    while chunk := list(itertools.islice(todo, size)):
        yield chunk


def _in_order(pool: Executor, function: Callable[[S], R], items: Iterable[S], ahead: int) -> Iterator[R]:
    """Results of `function` in the order of `items`, with at most `ahead` of them under way."""
    todo = iter(items)
    tasks: deque[Future[R]] = deque(pool.submit(function, item) for item in itertools.islice(todo, ahead))
    while tasks:
        yield tasks.popleft().result()
        tasks.extend(pool.submit(function, item) for item in itertools.islice(todo, 1))


@contextlib.contextmanager
def _tower_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """`count` threads in which each operation of torch keeps to its own thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, thread_name_prefix="tower") as threads:
            yield threads
    finally:
        torch.set_num_threads(before)
