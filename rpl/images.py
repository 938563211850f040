"""Pictures from strangers: bytes to RGB pixels and back, or a refusal with its reason.

Knows nothing of where bytes come from or of CLIP; crop, download and encode share it. The header is read and the
number of pixels checked before anything is decoded; only the formats named here are tried, each by its own magic
number. Encoding is deterministic and carries no metadata (no EXIF, GPS, comment, profile).
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP"]
FORMATS: tuple[Format, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# The plugins' classes instead of Image.open: its guard against bombs is one number for the whole process, warns
# where it should refuse, and would forbid the user's own large aerial pictures. `decode_image` checks the size itself.
_READERS: dict[Format, tuple[Callable[[bytes], bool], type[ImageFile.ImageFile]]] = {
    "JPEG": (lambda head: head.startswith(b"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    "PNG": (lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    "WEBP": (lambda head: head.startswith(b"RIFF") and head[8:12] == b"WEBP", WebPImagePlugin.WebPImageFile),
    "GIF": (lambda head: head.startswith((b"GIF87a", b"GIF89a")), GifImagePlugin.GifImageFile),
    "BMP": (lambda head: head.startswith(b"BM"), BmpImagePlugin.BmpImageFile),
}

# Pillow's decoders answer malformed bytes with any of these; none of them says more than "cannot be read".
_MALFORMED = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, OverflowError, struct.error, zlib.error,
)  # fmt: skip

RefusalReason = Literal["not_an_image", "too_many_pixels", "damaged_image"]


class ImageRefused(Exception):
    """Bytes that are no picture for us. `reason` is one word for counting, `detail` a clause for a person."""

    def __init__(self, reason: RefusalReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: RefusalReason = reason
        self.detail = detail


def decode_image(
    data: bytes, *, max_pixels: int, formats: tuple[Format, ...] = FORMATS, orient: bool = True
) -> Image.Image:
    """The picture in `data` as RGB: first frame only, on white where it is transparent, without metadata.

    Args:
        data: a whole file.
        max_pixels: width x height above this is refused from the header, before decoding.
        formats: what to accept; told by the first bytes, whatever name or content type came along.
        orient: turn the pixels as EXIF says; False: as stored.

    Raises:
        ImageRefused: `not_an_image`, `too_many_pixels` or `damaged_image` (truncated files included).
    """
    try:
        image = _open(data, formats)
        _check_pixels(image, max_pixels)
        image.load()
        _check_pixels(image, max_pixels)  # a GIF's first frame may be larger than its header said
        oriented = ImageOps.exif_transpose(image) if orient else image
        rgb = _to_rgb(oriented)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRefused("too_many_pixels", str(error)) from error
    except _MALFORMED as error:
        raise ImageRefused("damaged_image", str(error) or type(error).__name__) from error
    rgb.info = {}
    return rgb


def image_format(data: bytes, formats: tuple[Format, ...] = FORMATS) -> Format | None:
    """The format that the first bytes announce, or None."""
    head = data[:16]
    return next((name for name in formats if _READERS[name][0](head)), None)


def encode_jpeg(image: Image.Image, quality: int = 95) -> bytes:
    """`image` as a baseline JPEG without metadata: the same bytes for the same pixels and quality."""
    bare = image.convert("RGB")  # a copy, so the caller's image keeps its info
    bare.info = {}
    out = io.BytesIO()
    bare.save(out, "JPEG", quality=quality, subsampling="4:2:0", optimize=False, progressive=False)
    return out.getvalue()


def _open(data: bytes, formats: tuple[Format, ...]) -> ImageFile.ImageFile:
    name = image_format(data, formats)
    if name is None:
        raise ImageRefused("not_an_image", f"the first bytes are of none of {', '.join(formats)}")
    return _READERS[name][1](io.BytesIO(data))


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageRefused("too_many_pixels", f"{width} x {height} pixels are more than {max_pixels}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit greys: Pillow's own conversion clips at 255 and makes nearly every such picture white.
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image.convert("RGB")
