"""One wave of web addresses to checked, re-encoded pictures and a verdict each, through img2dataset's Downloader.

img2dataset brings the threads, the flow control between fetching and writing, and the order of calls; fetching
(`rpl.fetch`), the checks of a picture and the writing are ours, put in where it lets them be replaced. Its own
`download()` is not used: it hides failed shards, guards nothing and hangs when a worker is killed. Knows nothing of
categories and ranks. A verdict depends on the address alone, not on threads, neighbours or order.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import inspect
import io
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import imagehash
import pyarrow as pa
from PIL import Image, ImageOps

from rpl.config import Download
from rpl.errors import BadInput
from rpl.fetch import Fetcher
from rpl.images import ImageRefused, decode_image, encode_jpeg, image_format
from rpl.reasons import BY_WORD, Reason, Refused

_KEY_LENGTH = 24
_MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp"}
_SHRINK = Image.Resampling.BICUBIC

# The seam of img2dataset 1.47: what it is called with, and the global by which a thread fetches.
_DOWNLOADER_TAKES = (
    "self", "sample_writer_class", "resizer", "thread_count", "save_caption", "extract_exif", "output_folder",
    "column_list", "timeout", "number_sample_per_shard", "oom_shard_count", "compute_hash", "verify_hash_type",
    "encode_format", "retries", "user_agent_token", "disallowed_header_directives", "blurring_bbox_col",
)  # fmt: skip
_FETCH_TAKES = ("row", "timeout", "retries", "user_agent_token", "disallowed_header_directives")
_patched = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """A good picture as it is stored. `sha256` is of the bytes as fetched, `phash` of the pixels as decoded (64 bits in
    hex), `mime` by its first bytes; width and height are the stored JPEG's."""

    data: bytes
    sha256: str
    phash: str
    width: int
    height: int
    mime: str

    @property
    def key(self) -> str:
        return self.sha256[:_KEY_LENGTH]


class Verdict(NamedTuple):
    """What an address gave: `status` "ok" with the picture's facts, or "failed"/"refused" with a reason."""

    status: str
    reason: str | None
    fetched_at: str
    key: str | None = None
    sha256: str | None = None
    phash: str | None = None
    width: int | None = None
    height: int | None = None
    mime: str | None = None


def examine(data: bytes, settings: Download) -> Picture:
    """The picture in `data`, checked, turned upright, freed of metadata, resized and re-encoded.

    Raises:
        Refused: with one of the reasons of the stage "picture".
    """
    try:
        image = decode_image(data, max_pixels=settings.max_pixels)
    except ImageRefused as refusal:
        raise Refused(BY_WORD[refusal.reason], refusal.detail) from None
    short, long = sorted(image.size)
    if short < settings.min_side:
        raise Refused(Reason.TOO_SMALL, f"{image.width} x {image.height} pixels")
    if long > short * settings.max_aspect:
        raise Refused(Reason.TOO_ELONGATED, f"{image.width} x {image.height} pixels")
    stored = resize(image, settings)
    name = image_format(data)
    assert name is not None  # it was decoded
    sha256 = hashlib.sha256(data).hexdigest()
    return Picture(encode_jpeg(stored), sha256, str(imagehash.phash(image)), *stored.size, _MIME[name])


def resize(image: Image.Image, settings: Download) -> Image.Image:
    """`keep`: shrunk to `max_side` where larger; `reference`: a square padded with white, as PromptDet has it made."""
    side = settings.max_side
    if settings.resize == "reference":
        return ImageOps.pad(image, (side, side), _SHRINK, color="white")
    return ImageOps.contain(image, (side, side), _SHRINK) if max(image.size) > side else image


def interleaved(urls: Sequence[str]) -> list[str]:
    """The same addresses, the hosts taking turns, so that a slow host cannot hold all threads at its gate."""
    turn: Counter[str] = Counter()
    turns: list[int] = []
    for url in urls:
        host = _host(url)
        turns.append(turn[host])
        turn[host] += 1
    return [urls[index] for index in sorted(range(len(urls)), key=lambda index: (turns[index], index))]


class WaveDownloader:
    """Downloads waves of addresses, keeping good pictures in a file of `folder`; used as a context manager.

    Args:
        threads: addresses under way at once. Pictures are decoded in the same threads, one per processor at a time.
        folder: an empty folder of its own.
        on_url: called after each address, from one thread.

    Raises:
        BadInput: img2dataset is another version than the one that this is fitted to.
    """

    def __init__(
        self, fetcher: Fetcher, settings: Download, threads: int, folder: Path, on_url: Callable[[], None]
    ) -> None:
        self._fetcher = fetcher
        self._settings = settings
        self._threads = threads
        self._folder = folder
        self._on_url = on_url
        self._module = load_img2dataset()
        self._decoders = threading.BoundedSemaphore(os.cpu_count() or 1)
        self._spool = (folder / "pictures").open("w+b")
        self._places: dict[str, tuple[int, int]] = {}
        self._failure: BaseException | None = None

    def __enter__(self) -> WaveDownloader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()

    def __call__(self, urls: Sequence[str]) -> dict[str, Verdict]:
        """A verdict for each of `urls` (at least one, each once)."""
        verdicts: dict[str, Verdict] = {}
        # In a thread of its own: a signal that arrives meanwhile interrupts this one's join, while img2dataset's pool,
        # left by an exception, would wait for its feeder for ever.
        work = threading.Thread(target=self._run, args=(interleaved(urls), verdicts), daemon=True)
        work.start()
        try:
            work.join()
        except BaseException as error:
            self._failure = error  # the threads that are left fetch nothing more
            raise
        if self._failure is not None:
            raise self._failure
        missing = [url for url in urls if url not in verdicts]
        assert not missing, f"img2dataset gave no answer for {len(missing)} addresses"
        return verdicts

    def keep(self, key: str, data: bytes) -> None:
        """Store the JPEG of a good picture, once; also of one that was fetched elsewhere. Not while a wave is on."""
        if key not in self._places:
            start = self._spool.seek(0, io.SEEK_END)
            self._spool.write(data)
            self._places[key] = (start, len(data))

    def read(self, key: str) -> bytes:
        """The stored JPEG of a good picture."""
        start, length = self._places[key]
        self._spool.seek(start)
        return self._spool.read(length)

    def _run(self, urls: list[str], verdicts: dict[str, Verdict]) -> None:
        wave = self._folder / "wave.arrow"
        table = pa.table({"url": urls})
        try:
            with pa.OSFile(str(wave), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            with _replaced(self._module, self._fetch):
                self._module.Downloader(
                    sample_writer_class=lambda *_: _Writer(self._take, verdicts), resizer=_unwrap,
                    thread_count=self._threads, save_caption=False, extract_exif=False,
                    output_folder=str(self._folder), column_list=["url"], timeout=self._settings.timeout_s,
                    number_sample_per_shard=len(urls), oom_shard_count=1, compute_hash=None, verify_hash_type=None,
                    encode_format="jpg", retries=0, user_agent_token=None, disallowed_header_directives=None,
                ).download_shard((0, str(wave)))  # fmt: skip
        except BaseException as error:  # handed to the thread that waits
            self._failure = self._failure or error

    def _fetch(self, row: tuple[int, str], **_: Any) -> tuple[int, io.BytesIO | None, str | None]:
        """What img2dataset's threads call, instead of its own fetching. Never raises: its pool would hang."""
        number, url = row
        if self._failure is not None:
            return number, None, Reason.NO_CONNECTION.value
        try:
            fetched = self._fetcher.fetch(url)
            with self._decoders:
                return number, _Wrapped(examine(fetched.data, self._settings)), None
        except Refused as refusal:
            return number, None, refusal.reason.value
        except Exception as error:  # a bug or a full memory: it ends the stage, after the wave
            self._failure = error
            return number, None, Reason.NO_CONNECTION.value

    def _take(self, picture: Picture | None, reason: str) -> Verdict:
        """Keep a picture and say what is recorded; called from one thread."""
        self._on_url()
        if picture is None:
            why = BY_WORD[reason]
            return Verdict(why.kind, why.value, now())
        self.keep(picture.key, picture.data)
        return Verdict(
            "ok", None, now(), picture.key, picture.sha256, picture.phash, picture.width, picture.height, picture.mime
        )


class _Wrapped(io.BytesIO):
    """An examined picture, in the shape of the stream that img2dataset hands from fetching to resizing."""

    def __init__(self, picture: Picture) -> None:
        super().__init__()
        self.picture = picture


def _unwrap(stream: _Wrapped, _boxes: None) -> tuple[Picture, int, int, int, int, None]:
    """img2dataset's resizer: the picture, width, height, original width and height, error."""
    width, height = stream.picture.width, stream.picture.height
    return stream.picture, width, height, width, height, None


class _Writer:
    """img2dataset's sample writer: collects verdicts instead of writing a shard."""

    def __init__(self, take: Callable[[Picture | None, str], Verdict], verdicts: dict[str, Verdict]) -> None:
        self._take = take
        self._verdicts = verdicts
        self._failure: BaseException | None = None

    def write(self, picture: Picture | None, _key: str, _caption: None, meta: dict[str, Any]) -> None:
        if self._failure is not None:
            return
        try:
            self._verdicts[meta["url"]] = self._take(picture, meta["error_message"])
        except Exception as error:  # img2dataset would print it and go on
            self._failure = error

    def close(self) -> None:
        if self._failure is not None:
            raise self._failure


def load_img2dataset() -> ModuleType:
    """Its module `downloader`, imported without its look for updates on the network.

    Raises:
        BadInput: it takes other arguments than this is fitted to.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own use of what Python is about to drop
        from img2dataset import downloader
    takes = tuple(inspect.signature(downloader.Downloader.__init__).parameters)
    fetch_takes = tuple(inspect.signature(downloader.download_image_with_retry).parameters)
    if (takes, fetch_takes) != (_DOWNLOADER_TAKES, _FETCH_TAKES):
        version = importlib.metadata.version("img2dataset")
        raise BadInput(
            f"img2dataset {version}: its Downloader takes other arguments than that of 1.47.0 on PyPI, which this is "
            "fitted to; install img2dataset==1.47.0."
        )
    module: ModuleType = downloader
    return module


def now() -> str:
    """ISO 8601 in UTC, whole seconds; SOURCE_DATE_EPOCH (reproducible-builds.org) stands in for the clock if set.

    Raises:
        BadInput: the variable holds no number of seconds.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        seconds = int(text) if text else int(time.time())
        moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise BadInput(f"SOURCE_DATE_EPOCH: {text!r} is not a number of seconds since 1970; correct it.") from None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@contextlib.contextmanager
def _replaced(module: ModuleType, fetch: Callable[..., Any]) -> Iterator[None]:
    """Let img2dataset fetch with `fetch`. One wave at a time in a process, since it is a global of the module."""
    with _patched:
        original = module.download_image_with_retry
        module.download_image_with_retry = fetch  # type: ignore[attr-defined]
        try:
            yield
        finally:
            module.download_image_with_retry = original  # type: ignore[attr-defined]


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""  # no address at all; refused when its turn comes
