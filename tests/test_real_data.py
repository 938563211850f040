"""Real photographs with real boxes through every stage, with COCO's and with LVIS's JSON and PromptDet's own lists.

The small CLIP of the demo knows drawings, so nothing is said here about accuracy: the files must be right.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from rpl.clip import load_clip
from rpl.config import Clip, RunConfig
from rpl.demo.server import WebServer
from rpl.demo.world_files import CLIP_MODEL, CLIP_WEIGHTS
from rpl.local import create_run, run_all
from rpl.results import fetch_results
from tests.fake_stages import QUIET

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not (DATA / "coco128").is_dir(), reason="the folder shared/data with real images is not beside this checkout"
)
SMALL_CLIP = {"model": str(CLIP_MODEL), "pretrained": str(CLIP_WEIGHTS)}
HOST = "photos.example"
WEB_PICTURES = 150


@pytest.fixture(scope="module")
def photo_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of real photographs with a web server's table, embedded by the small CLIP."""
    folder = tmp_path_factory.mktemp("photo-pool")
    files = sorted((DATA / "imagenet_sample" / "images").glob("*.jpg"))[:WEB_PICTURES]
    urls = [f"http://{HOST}/{index}.jpg" for index in range(len(files))]
    model = load_clip(Clip.model_validate(SMALL_CLIP), "cpu")
    with torch.inference_mode():
        batch = torch.stack([model.preprocess(Image.open(file).convert("RGB")) for file in files])
        vectors = torch.nn.functional.normalize(model.encode_images(batch), dim=-1)
    (folder / "img_emb").mkdir()
    np.save(folder / "img_emb" / "img_emb_0.npy", vectors.numpy().astype(np.float16))
    (folder / "metadata").mkdir()
    table = pa.table({"url": urls, "caption": [file.stem for file in files]})
    pq.write_table(table, folder / "metadata" / "metadata_0.parquet")
    (folder / "web").mkdir()
    for file in files:
        (folder / "web" / file.name).symlink_to(file)
    routes = {url: {"kind": "ok", "file": file.name} for url, file in zip(urls, files, strict=True)}
    (folder / "web" / "routes.json").write_text(json.dumps(routes))
    return folder


def settings(pool: Path, web: WebServer, run: Path, annotations: str, categories: dict[str, str]) -> RunConfig:
    coco = DATA / "coco128"
    return RunConfig.model_validate(
        {
            "run": str(run),
            "data": {
                split: {
                    "annotations": str(coco / "annotations" / f"{annotations}_{split}2017.derived.json"),
                    "images": str(coco / "images" / f"{split}2017"),
                }
                for split in ("train", "val")
            },
            "categories": categories,
            "pool": {"vectors": str(pool)},
            "clip": SMALL_CLIP | {"views": 2},
            "learn": {"max_iterations": 3},
            "rounds": {
                "max_rounds": 1,
                "candidates": {"base": 4, "novel": 4},
                "kept": {"base": 2, "novel": 2},
            },
            "runtime": {"resolve": {HOST: web.address}},
        }
    )


def check_export(folder: Path, names: list[str]) -> None:
    embeddings = torch.load(folder / "export" / "category_embeddings.pt", weights_only=True)
    assert embeddings.shape == (len(names), json.loads(CLIP_MODEL.read_text())["embed_dim"])
    assert not torch.allclose(embeddings.float().norm(dim=-1), torch.ones(len(names))), "unnormalised, as PromptDet's"
    categories = json.loads((folder / "export" / "categories.json").read_text())
    assert [category["name"] for category in categories] == names
    coco = COCO(str(folder / "export" / "sourced_novel.json"))
    assert coco.getImgIds()
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(folder / "export" / "images" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
    novel = {category["id"] for category in categories if category["split"] == "novel"}
    assert {annotation["category_id"] for annotation in coco.anns.values()} <= novel


def test_coco(photo_pool: Path, tmp_path: Path) -> None:
    source = json.loads((DATA / "coco128/annotations/instances_train2017.derived.json").read_text())
    categories = [
        {"id": c["id"], "name": c["name"], "split": "novel" if index % 4 == 3 else "base"}
        for index, c in enumerate(source["categories"])
    ]
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    with WebServer(photo_pool / "web") as web:
        run = create_run(
            settings(photo_pool, web, tmp_path / "run", "instances", {"file": str(tmp_path / "categories.json")})
        )
        run_all(run, QUIET)
    summary = fetch_results(run, tmp_path / "results")
    check_export(tmp_path / "results", [c["name"] for c in categories])
    assert summary["rounds"][0]["accuracy"]["learned"]["novel"] is not None


def test_lvis_with_promptdet_s_own_files(photo_pool: Path, tmp_path: Path) -> None:
    promptdet = DATA / "promptdet"
    with WebServer(photo_pool / "web") as web:
        config = settings(
            photo_pool,
            web,
            tmp_path / "run",
            "lvis_style",
            {
                "file": str(promptdet / "lvis_category_and_description.txt"),
                "base": str(promptdet / "lvis_base_inds.txt"),
            },
        )
        config = config.model_copy(
            update={"evaluate": config.evaluate.model_copy(update={"templates": ("a photo of {name}",)})}
        )
        run = create_run(config)
        run_all(run, QUIET)
    fetch_results(run, tmp_path / "results")
    categories = json.loads((tmp_path / "results" / "export" / "categories.json").read_text())
    assert len(categories) == 1203
    assert sum(category["split"] == "base" for category in categories) == 866
    assert categories[0]["name"] == "aerosol can"
    assert categories[0]["description"] == "a dispenser that holds a substance under pressure"
    check_export(tmp_path / "results", [c["name"] for c in categories])
