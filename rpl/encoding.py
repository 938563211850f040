"""Pictures to CLIP features: worker processes decode and cut views, threads run the tower in batches.

Knows nothing of categories or stages. A picture is decoded once for all of its views. Results come in the order of
the pictures, and a feature's bytes depend neither on the number of workers nor on the order of their work. On a CPU
each core takes whole batches of its own: torch's way, all cores on each operation, waits at every one of them for the
core that is decoding (measured on 2 cores: a third of the speed). On a GPU one batch travels while another computes.

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
from torch import Tensor

from rpl.clip import ClipModel
from rpl.errors import TryAgain
from rpl.views import Picture, Pixels, ViewRecipe, cut_views
from rpl.workers import SharedSlots, fill_slot, worker_pool

_PICTURES_PER_TASK = 8  # sending them to a worker costs about as much as decoding a small one
_VIEWS_PER_TASK = 64  # that shared memory has room for; more of them go through a pipe
# CPU kernels for fewer than 16 rows round differently (measured), so a small batch is filled up. Larger batches are no
# faster, and their activations are so large that the allocator gives them back to the system after each operation.
_CPU_BATCH = 32
_GPU_THREADS = 2  # one waits for the device while the other hands it the next batch

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
        batch_size: views in one pass through the tower on a GPU; on a CPU it is always 32.
        workers: processes that decode.

    Raises:
        BadInput: a picture cannot be decoded.
        TryAgain: a worker process died.
    """
    on_gpu = clip.device.type == "cuda"
    threads, size = (_GPU_THREADS, batch_size) if on_gpu else (torch.get_num_threads(), _CPU_BATCH)
    tasks = 2 * workers + 2
    shared = SharedSlots(tasks, _VIEWS_PER_TASK, (*clip.preprocessing.size, 3))
    counts: deque[tuple[str, int]] = deque()
    cut = functools.partial(fill_slot, functools.partial(cut_views, recipe=recipe))
    with worker_pool(workers, shared) as decoders, _tower_threads(threads, on_gpu) as towers:
        try:
            chunks = _noting(_chunks(pictures, _PICTURES_PER_TASK), counts)
            # A task gets the slot of the one `tasks` before it: that one's views have then been copied into batches.
            filled = _in_order(decoders, cut, zip(itertools.cycle(range(tasks)), chunks), ahead=tasks)
            pixels = itertools.chain.from_iterable(map(shared.read, filled))
            encode = functools.partial(_encode, clip)
            batches = _batches(pixels, size, pinned=on_gpu)
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


def _encode(clip: ClipModel, pixels_BHWC: Tensor) -> npt.NDArray[np.float16]:
    """The features [B, D] of a batch of views, of length 1."""
    missing = max(0, _CPU_BATCH - len(pixels_BHWC))
    filled_BHWC = torch.cat([pixels_BHWC, pixels_BHWC[:1].expand(missing, -1, -1, -1)]) if missing else pixels_BHWC
    features_BD = clip.encode_images(clip.normalise(filled_BHWC))
    unit_BD: npt.NDArray[np.float16] = torch.nn.functional.normalize(features_BD, dim=1).half().cpu().numpy()
    return unit_BD[: len(pixels_BHWC)]


def _batches(views: Iterable[Pixels], size: int, *, pinned: bool) -> Iterator[Tensor]:
    """Copies of the views, `size` at a time and at last what is left; in pinned memory a GPU fetches them itself."""
    todo = iter(views)
    for first in todo:
        batch_BHWC = torch.empty((size, *first.shape), dtype=torch.uint8, pin_memory=pinned)
        rows, count = batch_BHWC.numpy(), 0
        for view in itertools.chain([first], itertools.islice(todo, size - 1)):
            rows[count] = view
            count += 1
        yield batch_BHWC[:count]


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
def _tower_threads(count: int, on_gpu: bool) -> Iterator[ThreadPoolExecutor]:
    """`count` threads in which each operation of torch keeps to its own thread, and on a GPU to its own stream."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, "tower", initializer=_own_stream if on_gpu else None) as threads:
            yield threads
    finally:
        torch.set_num_threads(before)


def _own_stream() -> None:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())  # there the weights were moved to the device
    torch.cuda.set_stream(stream)
