"""Encoding in worker processes: the right features in the right order, and the same bytes however it is done."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rpl import encoding
from rpl.clip import ClipModel, load_clip
from rpl.encoding import Encoded, encode_pictures
from rpl.errors import BadInput, TryAgain
from rpl.features import FeatureSet, FeatureWriter
from rpl.images import encode_jpeg
from rpl.views import Picture, Pixels, ViewRecipe, cut_views
from rpl.workers import SharedSlots
from tests.clip_models import make_clip, write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipModel:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    """Every third one has no random views, as validation crops between training crops."""
    draws = np.random.default_rng(0)
    made = []
    for number in range(31):
        rough = Image.fromarray(draws.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        data = encode_jpeg(rough.resize((40 + number, 60), Image.Resampling.BICUBIC))
        made.append(Picture(f"{number:024x}", data, 0 if number % 3 == 2 else 4))
    return made


def recipe(clip: ClipModel) -> ViewRecipe:
    return ViewRecipe(clip.preprocessing, (0.4, 1.0), seed=0)


def encode(clip: ClipModel, pictures: list[Picture], workers: int = 1) -> list[Encoded]:
    return list(encode_pictures(clip, pictures, recipe(clip), batch_size=64, workers=workers))


def content(found: list[Encoded]) -> list[tuple[bytes, bytes]]:
    return [(each.feature.tobytes(), each.views.tobytes()) for each in found]


def test_features_are_those_of_each_picture_alone(clip: ClipModel, pictures: list[Picture]) -> None:
    found = encode(clip, pictures)
    assert [each.key for each in found] == [each.key for each in pictures]
    for picture, each in zip(pictures, found, strict=True):
        views = list(cut_views([picture], recipe(clip)))
        features = clip.encode_images(clip.normalise(torch.from_numpy(np.stack(views))))
        expected = torch.nn.functional.normalize(features, dim=1).half().numpy()
        assert each.feature.dtype == each.views.dtype == np.float16
        assert each.views.shape == (picture.views, 16)
        np.testing.assert_allclose(np.stack([each.feature, *each.views]), expected, atol=1e-3)


def test_the_same_bytes_whatever_the_workers_batches_and_neighbours(
    clip: ClipModel, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    whole = content(encode(clip, pictures))
    assert content(encode(clip, pictures[3:5])) == whole[3:5]
    monkeypatch.setattr(encoding, "_CPU_BATCH", 48)
    assert content(encode(clip, pictures, workers=2)) == whole
    assert torch.get_num_threads() == threads


def test_shared_memory_is_used_again_and_may_be_too_small(
    clip: ClipModel, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(encode(clip, pictures))
    monkeypatch.setattr(encoding, "_PICTURES_PER_TASK", 1)
    monkeypatch.setattr(encoding, "_VIEWS_PER_TASK", 3)  # of 5
    features = encode_pictures(clip, pictures * 3, recipe(clip), batch_size=64, workers=1)
    first = next(features)
    time.sleep(0.5)  # in which the worker does all that it has been given
    assert content([first, *features]) == whole * 3


def test_arrays_beyond_a_slots_room_follow_it() -> None:
    shared = SharedSlots(3, 2, (2, 3))
    arrays = [np.full((2, 3), number, np.uint8) for number in range(8)]
    filled = [shared.write(2, arrays[:4]), shared.write(0, arrays[4:5]), shared.write(1, arrays[5:7])]
    assert [each.written for each in filled] == [2, 1, 2]
    assert [len(each.rest) for each in filled] == [2, 0, 0]
    found = [[int(array[1, 2]) for array in shared.read(each)] for each in filled]
    assert found == [[0, 1, 2, 3], [4], [5, 6]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same_features(tmp_path: Path, clip: ClipModel, pictures: list[Picture]) -> None:
    on_gpu = load_clip(write_clip(tmp_path / "clip"), "cuda")
    for ours, expected in zip(encode(on_gpu, pictures), encode(clip, pictures), strict=True):
        assert ours.key == expected.key
        np.testing.assert_allclose(ours.feature, expected.feature, atol=2e-3)
        np.testing.assert_allclose(ours.views, expected.views, atol=2e-3)


def test_no_pictures_give_no_features(clip: ClipModel) -> None:
    assert encode(clip, []) == []


def test_a_damaged_picture_names_itself(clip: ClipModel, pictures: list[Picture]) -> None:
    broken = Picture("f" * 24, pictures[0].data[:300], 1)
    with pytest.raises(BadInput, match=f"picture {'f' * 24}: cannot be decoded"):
        encode(clip, [*pictures[:10], broken])


def die(pictures: list[Picture], recipe: ViewRecipe) -> Iterator[Pixels]:
    os._exit(9)  # as the kernel does to a process when memory runs out


def test_a_worker_that_dies_is_an_error_and_no_hang(
    clip: ClipModel, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "cut_views", die)
    with pytest.raises(TryAgain) as caught:
        encode(clip, pictures)
    assert str(caught.value) == (
        "a process that decodes pictures died, most likely for lack of memory; try again, with a smaller "
        "runtime.workers if it happens once more."
    )


def test_no_more_is_decoded_ahead_than_needed(clip: ClipModel, pictures: list[Picture]) -> None:
    """The source of millions of pictures is read as they are encoded, and left at once with the consumer."""
    given = 0

    def source() -> Iterator[Picture]:
        nonlocal given
        for number in range(100_000):
            given += 1
            yield pictures[number % 31]

    features = encode_pictures(clip, source(), recipe(clip), batch_size=32, workers=1)
    next(features)
    features.close()  # type: ignore[attr-defined]
    assert given < 400


def write(folder: Path, numbers: range, views: int) -> None:
    folder.mkdir()
    with FeatureWriter(folder, dim=4, views=views) as writer:
        for number in numbers:
            feature = np.full(4, number, np.float16)
            has_views = number % 2 == 0
            made = np.full((views, 4), number + 0.5, np.float16) if has_views else np.empty((0, 4), np.float16)
            writer.add(f"key{number}", "train" if has_views else "val", number % 3, feature, made)
        names = [path.name for path in writer.finish()]
    assert names == ["features.npy", "features.parquet", "views.npy"]
    assert sorted(path.name for path in folder.iterdir()) == names  # nothing unfinished stays


def read(*folders: Path) -> FeatureSet:
    return FeatureSet(
        *([folder / name for folder in folders] for name in ("features.npy", "features.parquet", "views.npy"))
    )


def test_shards_of_features_read_as_one(tmp_path: Path) -> None:
    for shard, numbers in enumerate((range(5), range(5, 5), range(5, 12))):
        write(tmp_path / str(shard), numbers, views=3)
    assert np.load(tmp_path / "1" / "views.npy").shape == (0, 3, 4)
    found = read(*(tmp_path / str(shard) for shard in range(3)))
    assert found.keys == [f"key{number}" for number in range(12)]
    assert found.features.dtype == np.float16
    assert found.features[:, 0].tolist() == list(range(12))
    assert found.category.tolist() == [number % 3 for number in range(12)]
    rows = np.array([10, 0, 8, 2])
    assert found.split[rows].tolist() == ["train"] * 4
    assert found.views(rows)[:, 2, 3].tolist() == [10.5, 0.5, 8.5, 2.5]
    with pytest.raises(BadInput) as caught:
        found.views(np.array([2, 7]))
    assert str(caught.value) == "picture key7: has no views to learn from; run encode again."


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", range(5), views=1)
    np.save(tmp_path / "a" / "features.npy", np.zeros((4, 4), np.float16))
    with pytest.raises(BadInput) as caught:
        read(tmp_path / "a")
    assert str(caught.value) == f"{tmp_path}/a/features.npy: has 4 rows, its parquet 5; run encode again."
