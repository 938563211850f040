"""Builds the demo's world on disk: a labelled data set, a pool of embedded web pictures, and the web itself.

Everything is made from a seed: the same bytes twice, and the same with one worker process or many. Knows nothing of
stages or servers. Scenes come from scenes.py, the web's pictures from web.py, vectors from the small CLIP.

    categories.json                       [{name, description, split}] in id order
    {train,val}/annotations.json, images/ COCO form; train labels base categories only
    pool/img_emb/, pool/metadata/         clip-retrieval's layout, two shards
    pool/truth.parquet                    (url, category or ""): for evaluation alone
    web/routes.json, pages/               what the demo's server answers
    world.json                            written last: seed, scale and version
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from rpl.clip import ClipModel, load_clip
from rpl.config import Clip
from rpl.demo import scenes, web
from rpl.demo.sprites import DemoCategory, Sprites, demo_categories, rasterise, vocabulary
from rpl.demo.web import Page
from rpl.demo.world_files import CLIP_MODEL, CLIP_WEIGHTS, FULL, MARKER, Scale, World, find_world, identity
from rpl.progress import Progress
from rpl.views import Preprocessing, evaluation_view
from rpl.workers import worker_pool

CLIP = Clip(model=str(CLIP_MODEL), pretrained=str(CLIP_WEIGHTS))
SPRITE_PIXELS = 160
_SHARDS = 2
_EMBED_BATCH = 256
_FOLDERS = ("train", "val", "pool", "web")

T = TypeVar("T")
R = TypeVar("R")


def build_world(
    directory: Path,
    *,
    seed: int = 0,
    scale: Scale = FULL,
    clip: Clip = CLIP,
    processes: int | None = None,
    progress: Progress | None = None,
) -> World:
    """Fills `directory`, or returns at once where the same world stands complete.

    Args:
        clip: the CLIP that embeds the pool; its model and weights are files.
        processes: worker processes; 1 works in this one. The default is one per core, eight at most.
        progress: is told of every picture drawn.
    """
    wanted = identity(seed, scale, (Path(clip.model), Path(clip.pretrained or clip.model)))
    found = find_world(directory, wanted)
    if found is not None:
        return found
    marker = directory / MARKER
    marker.unlink(missing_ok=True)
    for folder in _FOLDERS:
        shutil.rmtree(directory / folder, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    count = processes or min(8, os.cpu_count() or 1)
    with _Crew(count, directory / "sprites.npy", progress) as crew:
        _Builder(directory, seed, scale, crew).build(load_clip(clip, "cpu"))
    marker.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    return World(directory)


class _Builder:
    def __init__(self, directory: Path, seed: int, scale: Scale, crew: _Crew) -> None:
        self.directory, self.seed, self.scale, self.crew = directory, seed, scale, crew
        self.categories = _chosen(demo_categories(), scale)
        shown = {category.emoji for category in self.categories}
        others = [thing for thing in vocabulary() if thing.emoji not in shown]
        self.things = [thing for thing in vocabulary() if thing.emoji in shown] + others[: scale.others]
        rows = {thing.emoji: row for row, thing in enumerate(self.things)}
        self.rows = [rows[category.emoji] for category in self.categories]

    def build(self, clip: ClipModel) -> None:
        self.crew.rasterise([thing.emoji for thing in self.things])
        _write_json(
            self.directory / "categories.json",
            [{"name": c.name, "description": c.description, "split": c.split} for c in self.categories],
        )
        shutil.copyfile(Path(__file__).parent / "ATTRIBUTION.md", self.directory / "ATTRIBUTION.md")
        self._scenes("train", self._train_tokens())
        self._scenes("val", self._val_tokens())
        self._web(clip)

    def _train_tokens(self) -> list[scenes.Wanted]:
        """A long tail of base boxes, and novel objects that nobody labelled."""
        rng = random.Random(f"train boxes {self.seed}")
        base = [number for number, category in enumerate(self.categories) if category.split == "base"]
        rng.shuffle(base)
        tokens: list[scenes.Wanted] = []
        for rank, number in enumerate(base):
            count = round(2 * self.scale.most_boxes / (rank + 1) ** 0.75)
            count = max(self.scale.fewest_boxes, min(self.scale.most_boxes, count))
            tokens += [scenes.Wanted(self.rows[number], number + 1)] * count
        for number, category in enumerate(self.categories):
            if category.split == "novel":
                tokens += [scenes.Wanted(self.rows[number], 0)] * self.scale.unlabelled
        return tokens

    def _val_tokens(self) -> list[scenes.Wanted]:
        return [scenes.Wanted(row, number + 1) for number, row in enumerate(self.rows)] * self.scale.val_boxes

    def _scenes(self, part: str, tokens: Sequence[scenes.Wanted]) -> None:
        dealt = scenes.deal(tokens, part, random.Random(f"{part} scenes {self.seed}"))
        folder = self.directory / part / "images"
        folder.mkdir(parents=True)
        drawn = list(self.crew.map(partial(_draw_scene, folder=folder, seed=self.seed), dealt))
        document = scenes.coco(
            [(c.name, c.description) for c in self.categories],
            [(f"{scene.key}.jpg", *size) for scene, (size, _) in zip(dealt, drawn, strict=True)],
            [boxes for _, boxes in drawn],
        )
        _write_json(self.directory / part / "annotations.json", document)

    def _web(self, clip: ClipModel) -> None:
        names = {row: category.name for row, category in zip(self.rows, self.categories, strict=True)}
        pages = web.plan_web(self.things, names, self.scale.web, random.Random(f"web {self.seed}"))
        folder = self.directory / "web"
        for group in {(folder / page.file).parent for page in pages} | {folder / "pages/shared"}:
            group.mkdir(parents=True, exist_ok=True)
        (folder / web.SHARED_FILES["html"]).write_bytes(web.html_page())
        (folder / web.SHARED_FILES["placeholder"]).write_bytes(web.placeholder())
        (folder / web.SHARED_FILES["bomb"]).write_bytes(web.bomb())
        _write_json(folder / "routes.json", web.routes(pages))
        draw = partial(_draw_page, folder=folder, seed=self.seed, how=clip.preprocessing)
        self._pool(clip, pages, np.stack(list(self.crew.map(draw, pages))))

    def _pool(self, clip: ClipModel, pages: Sequence[Page], views: NDArray[np.uint8]) -> None:
        """`views` uint8 [N, S, S, 3]: each page's picture as the CLIP sees it, in page order."""
        blocks = [
            clip.encode_images(clip.normalise(torch.from_numpy(views[start : start + _EMBED_BATCH])))
            for start in range(0, len(views), _EMBED_BATCH)
        ]
        vectors = torch.nn.functional.normalize(torch.cat(blocks), dim=-1).half().numpy()
        for name in ("img_emb", "metadata"):
            (self.directory / "pool" / name).mkdir(parents=True)
        bounds = np.linspace(0, len(pages), _SHARDS + 1).astype(int)
        for shard, (start, end) in enumerate(itertools.pairwise(bounds)):
            np.save(self.directory / f"pool/img_emb/img_emb_{shard}.npy", vectors[start:end])
            rows = pages[start:end]
            table = pa.table({"url": [page.url for page in rows], "caption": [page.caption for page in rows]})
            pq.write_table(table, self.directory / f"pool/metadata/metadata_{shard}.parquet")
        truth = {"url": [page.url for page in pages], "category": [page.category for page in pages]}
        pq.write_table(pa.table(truth), self.directory / "pool/truth.parquet")


def _chosen(categories: Sequence[DemoCategory], scale: Scale) -> list[DemoCategory]:
    """The first `base` and `novel` ones, in their common order."""
    left = {"base": scale.base, "novel": scale.novel}
    chosen = []
    for category in categories:
        if left[category.split] > 0:
            left[category.split] -= 1
            chosen.append(category)
    return chosen


class _Crew:
    """Maps functions over items, in this process or in several; either way in the same order."""

    def __init__(self, processes: int, sprites: Path, progress: Progress | None) -> None:
        self._sprites = sprites
        self._progress = progress
        self._pool = worker_pool(processes) if processes > 1 else None

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._sprites.unlink(missing_ok=True)
        _sprites.cache_clear()

    def rasterise(self, emojis: Sequence[str]) -> None:
        """Leaves the sprites in a file, which workers map into memory instead of receiving them."""
        groups = [emojis[start : start + 40] for start in range(0, len(emojis), 40)]
        np.save(self._sprites, np.concatenate(list(self._each(partial(rasterise, size=SPRITE_PIXELS), groups, 1))))

    def map(self, function: Callable[..., R], items: Sequence[T]) -> Iterator[R]:
        """`function(item, sprites=FILE)` of each item."""
        for result in self._each(partial(function, sprites=self._sprites), items, 24):
            if self._progress is not None:
                self._progress.update()
            yield result

    def _each(self, function: Callable[[T], R], items: Sequence[T], chunk: int) -> Iterator[R]:
        if self._pool is None:
            return map(function, items)
        return self._pool.map(function, items, chunksize=chunk)


@lru_cache(maxsize=1)
def _sprites(path: Path) -> Sprites:
    torch.set_num_threads(1)  # only ever called where one of several workers draws, or the pictures are few
    sprites: Sprites = np.load(path, mmap_mode="r")
    return sprites


def _draw_scene(
    scene: scenes.Scene, *, sprites: Path, folder: Path, seed: int
) -> tuple[tuple[int, int], list[scenes.Label]]:
    drawn = scenes.draw(scene, _sprites(sprites), seed)
    drawn.picture.save(folder / f"{scene.key}.jpg", quality=88)
    return drawn.picture.size, drawn.boxes


def _draw_page(page: Page, *, sprites: Path, folder: Path, seed: int, how: Preprocessing) -> NDArray[np.uint8]:
    """Writes the page's picture; returns what the CLIP sees of it."""
    data = web.page_bytes(page, _sprites(sprites), seed)
    (folder / page.file).write_bytes(data)
    return evaluation_view(web.decode(data), how)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
