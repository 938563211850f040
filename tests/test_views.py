"""Views of a picture: the evaluation view is open_clip's pixel for pixel, random ones are drawn as they should be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rpl.clip import import_open_clip
from rpl.errors import BadInput
from rpl.images import encode_jpeg
from rpl.views import Picture, Preprocessing, ViewRecipe, augmented_view, cut_views, evaluation_view

MEAN, STD = (0.48, 0.45, 0.40), (0.27, 0.26, 0.28)
HOW = Preprocessing((32, 32), MEAN, STD)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(32, 32), (33, 100), (101, 47), (20, 31), (64, 64), (5, 300), (1, 1)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interpolation": "bilinear"},
        {"resize_mode": "squash"},
        {"resize_mode": "longest", "fill_color": 127},
        {"size": (24, 40)},
        {"size": (24, 40), "resize_mode": "squash"},
        {"size": (40, 24), "resize_mode": "longest"},
    ],
)
def test_the_evaluation_view_is_open_clips(size: tuple[int, int], changes: dict[str, Any]) -> None:
    how = Preprocessing(**{"size": (32, 32), "mean": MEAN, "std": STD, **changes})
    transform = import_open_clip().image_transform(
        how.size, is_train=False, mean=how.mean, std=how.std, resize_mode=how.resize_mode,
        interpolation=how.interpolation, fill_color=how.fill_color,
    )  # fmt: skip
    image = picture(*size)
    view = evaluation_view(image, how)
    pixels = torch.from_numpy(view.copy()).permute(2, 0, 1).float() / 255
    expected = transform(image)
    assert torch.equal((pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], expected)


def test_a_random_view_depends_on_its_seed_alone() -> None:
    image = picture(90, 70)
    first = augmented_view(image, HOW, (0.4, 1.0), "0/key/1")
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert np.array_equal(first, augmented_view(image, HOW, (0.4, 1.0), "0/key/1"))
    assert not np.array_equal(first, augmented_view(image, HOW, (0.4, 1.0), "0/key/2"))


@pytest.mark.parametrize("size", [(200, 150), (150, 240), (100, 100)])
def test_random_crops_are_drawn_as_torchvisions(size: tuple[int, int]) -> None:
    """Read back from a picture whose red and green are its columns and rows."""
    width, height = size
    rows, columns = np.mgrid[0:height, 0:width]
    image = Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=2).astype(np.uint8))
    ours, flips = [], []
    for seed in range(1500):
        view = augmented_view(image, HOW, (0.4, 1.0), str(seed)).astype(float)
        # Pixel centres lie half a step inside the crop, so 32 of them span 31/32 of it.
        wide = (view[16, -1, 0] - view[16, 0, 0]) * 32 / 31
        high = (view[-1, 16, 1] - view[0, 16, 1]) * 32 / 31
        flips.append(wide < 0)
        left, top = min(view[16, 0, 0], view[16, -1, 0]), view[0, 16, 1]
        ours.append((abs(wide) * high / (width * height), np.log(abs(wide) / high), left / width, top / height))

    import_open_clip()  # torchvision may need its help to import
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    theirs = []
    for _ in range(1500):
        top, left, high, wide = RandomResizedCrop.get_params(image, [0.4, 1.0], [3 / 4, 4 / 3])
        theirs.append((wide * high / (width * height), np.log(wide / high), left / width, top / height))
    np.testing.assert_allclose(np.mean(ours, axis=0), np.mean(theirs, axis=0), atol=0.02)
    np.testing.assert_allclose(np.std(ours, axis=0), np.std(theirs, axis=0), atol=0.02)
    assert 0.46 < np.mean(flips) < 0.54


def test_a_picture_too_long_for_any_crop_gives_its_centre() -> None:
    stripe = Image.new("RGB", (400, 4), "red")
    stripe.paste((0, 0, 255), (190, 0, 210, 4))
    view = augmented_view(stripe, HOW, (0.9, 1.0), "seed")
    assert (view[..., 2] > 200).all()  # the crop is 5 x 4, well inside the blue


def test_all_views_of_a_picture_and_the_words_for_a_damaged_one() -> None:
    recipe = ViewRecipe(HOW, (0.4, 1.0), seed=7)
    data = encode_jpeg(picture(90, 70))
    views = list(cut_views([Picture("a" * 24, data, 2), Picture("b" * 24, data, 0)], recipe))
    assert len(views) == 4
    assert np.array_equal(views[0], views[3])  # the evaluation views
    assert not np.array_equal(views[1], views[2])
    with pytest.raises(BadInput) as caught:
        list(cut_views([Picture("c" * 24, data[:200], 0)], recipe))
    assert str(caught.value).startswith(f"picture {'c' * 24}: cannot be decoded (damaged_image: ")
    assert str(caught.value).endswith("); delete the output that holds it and make it again.")
