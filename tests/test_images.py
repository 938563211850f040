"""Pictures: what is refused, what a decoded picture looks like, and that encoding leaks and varies nothing."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rpl.images import FORMATS, ImageRefused, decode_image, encode_jpeg, image_format

RED, WHITE = (255, 0, 0), (255, 255, 255)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(90, 160, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def refusal(data: bytes, **options: object) -> ImageRefused:
    with pytest.raises(ImageRefused) as raised:
        decode_image(data, **{"max_pixels": 10_000, **options})
    return raised.value


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_decodes_to_rgb(kind: str) -> None:
    data = encoded(Image.new("RGB", (20, 10), RED), kind)
    image = decode_image(data, max_pixels=200)
    assert (image.mode, image.size, image.info, image_format(data)) == ("RGB", (20, 10), {}, kind)
    assert np.allclose(image.getpixel((3, 3)), RED, atol=3)


def test_what_is_no_picture_is_told_from_a_damaged_one() -> None:
    assert refusal(b"<html>not found</html>").reason == "not_an_image"
    assert refusal(b"").reason == "not_an_image"
    whole = encoded(noise(60, 60), "JPEG")
    assert refusal(whole[: len(whole) // 2]).reason == "damaged_image"
    assert refusal(b"\x89PNG\r\n\x1a\n" + b"x" * 50).reason == "damaged_image"


def test_formats_beyond_the_accepted_ones_are_no_pictures() -> None:
    assert refusal(encoded(Image.new("RGB", (4, 4)), "TIFF")).reason == "not_an_image"
    assert refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n").reason == "not_an_image"
    assert refusal(encoded(Image.new("RGB", (4, 4))), formats=("JPEG",)).detail == "the first bytes are of none of JPEG"


def test_a_bomb_is_refused_from_its_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(90_001)))
    error = refusal(bomb, max_pixels=50_000_000)
    assert (error.reason, error.detail) == ("too_many_pixels", "30000 x 30000 pixels are more than 50000000")
    assert str(error) == "too_many_pixels: 30000 x 30000 pixels are more than 50000000"


def test_the_limit_is_on_pixels_not_on_sides() -> None:
    data = encoded(Image.new("RGB", (100, 100)))
    assert decode_image(data, max_pixels=10_000).size == (100, 100)
    assert refusal(data, max_pixels=9_999).reason == "too_many_pixels"


def test_a_gif_frame_larger_than_its_header_says_is_refused() -> None:
    data = bytearray(encoded(Image.new("RGB", (200, 200), RED), "GIF"))
    data[6:10] = struct.pack("<HH", 1, 1)
    assert refusal(bytes(data)).reason == "too_many_pixels"


def test_pictures_above_pillows_own_limit_pass_where_the_caller_allows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert decode_image(encoded(Image.new("RGB", (100, 100))), max_pixels=10_000).size == (100, 100)


def test_transparency_becomes_white() -> None:
    see_through = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    see_through.putpixel((0, 0), (*RED, 255))
    for data in (
        encoded(see_through),
        encoded(see_through.convert("P"), transparency=0),
        encoded(see_through, "WEBP", lossless=True),
    ):
        image = decode_image(data, max_pixels=16)
        assert image.getpixel((3, 3)) == WHITE
    assert decode_image(encoded(see_through), max_pixels=16).getpixel((0, 0)) == RED
    grey = Image.new("LA", (2, 2), (0, 0))
    assert decode_image(encoded(grey), max_pixels=16).getpixel((0, 0)) == WHITE


def test_sixteen_bit_greys_keep_their_shades() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    image = decode_image(encoded(Image.fromarray(ramp)), max_pixels=64)
    assert np.array_equal(np.asarray(image)[..., 1], ramp >> 8)


def test_other_modes_decode(tmp_path: Path) -> None:
    for mode, kind in [("CMYK", "JPEG"), ("L", "JPEG"), ("1", "PNG"), ("P", "GIF")]:
        assert decode_image(encoded(Image.new(mode, (4, 4)), kind), max_pixels=16).mode == "RGB"


def test_exif_orientation_is_applied_unless_pixels_are_wanted_as_stored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)
    assert decode_image(data, max_pixels=200).size == (10, 20)
    assert decode_image(data, max_pixels=200, orient=False).size == (20, 10)


def test_only_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.allclose(decode_image(data, max_pixels=64).getpixel((4, 4)), RED, atol=3)


@settings(max_examples=150)
@given(st.sampled_from(FORMATS), st.data())
def test_mangled_bytes_decode_or_are_refused_and_nothing_else(kind: str, data: st.DataObject) -> None:
    whole = bytearray(encoded(noise(24, 24), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(whole), max_pixels=10_000).mode == "RGB"
    except ImageRefused as refused:
        assert refused.reason in ("not_an_image", "too_many_pixels", "damaged_image")


def test_jpegs_carry_no_metadata_and_come_out_the_same_twice() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    source = encoded(noise(40, 30), "JPEG", exif=exif, comment=b"by me", dpi=(72, 72))
    image = Image.open(io.BytesIO(source))
    data = encode_jpeg(image)
    assert b"secret" not in data and b"by me" not in data and b"Exif" not in data
    assert data == encode_jpeg(decode_image(source, max_pixels=2000))
    assert image.info["comment"] == b"by me"  # the caller's image is left alone


def test_jpeg_quality_is_95_unless_asked_otherwise() -> None:
    picture = noise(64, 64)
    assert encode_jpeg(picture) == encode_jpeg(picture, 95)
    assert len(encode_jpeg(picture, 60)) < len(encode_jpeg(picture))
    grey = picture.convert("L").convert("RGB")  # colour is halved in both directions, so only greys stay close
    back = decode_image(encode_jpeg(grey), max_pixels=5000)
    assert np.abs(np.asarray(back).astype(int) - np.asarray(grey)).mean() < 3
