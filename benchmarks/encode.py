"""Does encoding keep its device busy? From JPEGs to features, against the model alone and against the old way.

For example:

    python -m benchmarks.encode

Prints a table of views per second and writes benchmarks/results/encode.json. The pictures are the demo's: crops of
objects, and the scenes they come from, about as large as pictures of the web. The columns:

    tower      the model alone, on batches that lie ready on its device
    cut        decoding and cutting views alone, on one core
    limit      what the machine allows: on a GPU `tower`; on a CPU both need the same cores and their seconds per view
               add up, so 1 / (1 / tower + 1 / (cores * cut))
    encode     `rpl.encoding.encode_pictures`, the start of its worker processes included, and its share of the limit
    useful     how much of the core seconds that `encode` spends, in all its processes, `tower` and `cut` need alone;
               unlike the rates it hardly depends on what else the machine is doing
    old way    as a step of the research code: the file decoded for each view anew, 32 views at a time, in one process

Each is the best of a few repeats taken in turns, so that other work on the machine counts as little as it can.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from rpl.demo.world_files import CLIP_MODEL, CLIP_WEIGHTS
from rpl.views import Picture, Pixels, ViewRecipe, augmented_view, cut_views, evaluation_view

# What takes long to import is imported where it is used: each worker process imports this module once more.
if TYPE_CHECKING:
    from torch import Tensor

    from rpl.clip import ClipModel

RESULT = Path(__file__).parent / "results" / "encode.json"
CROPS = 1500
OLD_BATCH = 32
CPU_BATCH = 32
GPU_BATCH = 256
REPEATS = 3
READY = 512
"""Views that the tower is given again and again."""


@dataclass(frozen=True)
class Case:
    """A model, and `number` pictures that each have `views` random views beside the evaluation view."""

    model: str
    pretrained: str | None
    pictures: str
    number: int
    number_on_gpu: int
    views: int


CASES = (
    Case(str(CLIP_MODEL), str(CLIP_WEIGHTS), "crops", number=CROPS, number_on_gpu=4 * CROPS, views=4),
    Case(str(CLIP_MODEL), str(CLIP_WEIGHTS), "scenes", number=700, number_on_gpu=2000, views=4),
    Case("ViT-B-32", None, "crops", number=64, number_on_gpu=4 * CROPS, views=1),
    Case("ViT-B-32", None, "scenes", number=64, number_on_gpu=4 * CROPS, views=1),
)


def main() -> None:
    import torch

    files = _draw_files()
    print(
        f"{'model':<9} {'pictures':<14} {'tower':>8} {'cut':>8} {'limit':>8} {'encode':>8} {'share':>6} "
        f"{'useful':>6} {'pictures/s':>10} {'old way':>8} {'ratio':>6}"
    )
    rows = []
    for case in CASES:
        row = _measure(case, files[case.pictures])
        rows.append(row)
        print(
            f"{row['model']:<9} {row['number']:>5,} {row['pictures']:<8} {row['tower']:8.1f} {row['cut']:8.1f} "
            f"{row['limit']:8.1f} {row['encode']:8.1f} {row['share']:6.1%} "
            f"{row['useful']:6.1%} {row['pictures_per_s']:10.1f} {row['old_way']:8.1f} {row['ratio']:6.2f}",
            flush=True,
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"device": device, "cores": _cores(), "cases": rows}, indent=1) + "\n")


def _measure(case: Case, files: list[bytes]) -> dict[str, Any]:
    from rpl.clip import device_name, load_clip
    from rpl.config import Clip
    from rpl.encoding import encode_pictures

    clip = load_clip(Clip(model=case.model, pretrained=case.pretrained), device_name("auto"))
    on_gpu = clip.device.type == "cuda"
    number = case.number_on_gpu if on_gpu else case.number
    pictures = [Picture(f"{n:024x}", files[n % len(files)], case.views) for n in range(number)]
    recipe = ViewRecipe(clip.preprocessing, (0.4, 1.0), seed=0)
    views = number * (1 + case.views)
    few = pictures[: READY // (1 + case.views) + 1]
    ready = _ready_batches(clip, few, recipe)

    def encode() -> int:
        encoded = encode_pictures(clip, pictures, recipe, batch_size=GPU_BATCH, workers=_cores())
        return sum(1 + len(each.views) for each in encoded)

    ways: dict[str, Callable[[], int]] = {
        "tower": lambda: _tower(clip, ready, views),
        "cut": lambda: sum(1 for _ in cut_views(few, recipe)),
        "encode": encode,
        "old_way": lambda: _old_way(clip, pictures[: number // 4], recipe),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    core_seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _, (name, way) in itertools.product(range(REPEATS), ways.items()):
        rate, spent = _timed(way)
        rates[name].append(rate)
        core_seconds[name].append(spent)
    best = {name: max(each) for name, each in rates.items()}
    least = {name: min(each) for name, each in core_seconds.items()}
    limit = best["tower"] if on_gpu else 1 / (1 / best["tower"] + 1 / (_cores() * best["cut"]))
    return {
        "model": "demo" if case.model == str(CLIP_MODEL) else case.model,
        "pictures": case.pictures,
        "number": number,
        "views": 1 + case.views,
        **best,
        "limit": limit,
        "share": best["encode"] / limit,
        "useful": (least["tower"] + least["cut"]) / least["encode"],
        "pictures_per_s": best["encode"] / (1 + case.views),
        "ratio": best["encode"] / best["old_way"],
        "repeats": rates,
        "core_seconds_per_view": core_seconds,
    }


def _timed(way: Callable[[], int]) -> tuple[float, float]:
    """Views per second, and the core seconds that a view takes in this process and its workers."""
    started, spent = time.perf_counter(), _core_seconds()
    views = way()
    seconds = time.perf_counter() - started
    while multiprocessing.active_children():  # their time counts once they are gone
        time.sleep(0.01)
    return views / seconds, (_core_seconds() - spent) / views


def _core_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _ready_batches(clip: ClipModel, pictures: list[Picture], recipe: ViewRecipe) -> list[Tensor]:
    import torch

    size = GPU_BATCH if clip.device.type == "cuda" else CPU_BATCH
    views = list(itertools.islice(cut_views(pictures, recipe), READY))
    starts = range(0, len(views) - size + 1, size)
    return [clip.normalise(torch.from_numpy(np.stack(views[start : start + size]))) for start in starts]


def _tower(clip: ClipModel, ready: list[Tensor], views: int) -> int:
    """The tower on `views` views or a few more; on a CPU each core takes batches of its own, the fastest way there."""
    import torch

    todo = list(itertools.islice(itertools.cycle(ready), -(-views // len(ready[0]))))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1 if clip.device.type == "cuda" else _cores()) as pool:
        features = list(pool.map(clip.encode_images, todo))
    features[-1].cpu()  # waits for a GPU
    torch.set_num_threads(threads)
    return len(todo) * len(ready[0])


def _old_way(clip: ClipModel, pictures: list[Picture], recipe: ViewRecipe) -> int:
    import torch

    how = recipe.preprocessing
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (how.mean, how.std))
    views = _views_of_old(pictures, recipe)
    done = 0
    while batch := list(itertools.islice(views, OLD_BATCH)):
        images = [(torch.from_numpy(view).permute(2, 0, 1) / 255 - mean_C11) / std_C11 for view in batch]
        done += len(torch.nn.functional.normalize(clip.encode_images(torch.stack(images)), dim=1).cpu())
    return done


def _views_of_old(pictures: list[Picture], recipe: ViewRecipe) -> Iterator[Pixels]:
    """The same views, but each from the file."""
    for picture in pictures:
        yield evaluation_view(_opened(picture), recipe.preprocessing).copy()
        for view in range(picture.views):
            seed = f"{recipe.seed}/{picture.key}/{view}"
            yield augmented_view(_opened(picture), recipe.preprocessing, recipe.scale, seed).copy()


def _opened(picture: Picture) -> Image.Image:
    return Image.open(io.BytesIO(picture.data)).convert("RGB")


def _draw_files() -> dict[str, list[bytes]]:
    """JPEGs of the demo's scenes, and of the crops of their objects as stage `crop` makes them."""
    from rpl.demo import scenes
    from rpl.demo.run import demo_config
    from rpl.demo.sprites import demo_categories, rasterise
    from rpl.images import encode_jpeg
    from rpl.sampling import crop_rectangles

    scaling = demo_config(Path(), "run", {}).data.scaling_factor
    emojis = [category.emoji for category in demo_categories()]
    sprites = rasterise(emojis, 160)
    wanted = [scenes.Wanted(number % len(emojis), 1) for number in range(CROPS)]
    whole, crops = [], []
    for scene in scenes.deal(wanted, "bench", random.Random(0)):
        drawn = scenes.draw(scene, sprites, seed=0)
        file = io.BytesIO()
        drawn.picture.save(file, "JPEG", quality=88)
        whole.append(file.getvalue())
        boxes = np.array([box for _, box in drawn.boxes])
        rectangles = crop_rectangles(boxes, np.array([drawn.picture.size] * len(boxes)), scaling)
        for left, top, right, bottom in rectangles.tolist():
            crops.append(encode_jpeg(drawn.picture.crop((left, top, right, bottom))))
    return {"crops": crops, "scenes": whole}


def _cores() -> int:
    return os.cpu_count() or 1


if __name__ == "__main__":
    main()
