"""The body of one S3 object as a stream that survives broken connections.

botocore retries requests, never a body that breaks off in the middle: here the rest is asked for again (Range) from
the very same object (If-Match). Knows nothing of stores.
"""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING, Any

from botocore import exceptions as aws

from rpl.errors import BadInput, TryAgain
from rpl.store.s3_client import explained, http_status

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

_TRIES_WITHOUT_PROGRESS = 3
_BROKEN = (aws.ResponseStreamingError, aws.IncompleteReadError, aws.ReadTimeoutError, aws.HTTPClientError, OSError)


class S3Stream(io.RawIOBase):
    """Bytes `start` to `end` (exclusive; None: to the last) of the object at `key`. The first request is made at once.

    Raises:
        BadInput: the object is absent, or the keys may not read it.
        TryAgain: the server stays away, or the object was replaced while it was read.
    """

    def __init__(
        self, client: S3Client, bucket: str, key: str, *, start: int, end: int | None, uri: str, endpoint: str
    ) -> None:
        super().__init__()
        self._client, self._bucket, self._key = client, bucket, key
        self._uri, self._endpoint = uri, endpoint
        self._at, self._end = start, end
        self._etag: str | None = None
        self._body: StreamingBody | None = None
        try:
            self._connect()
        except BaseException:
            self._drop()
            raise

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        with explained(self._uri, self._endpoint):
            block = self._read(len(view))
        view[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        failures = 0
        while self._end is None or self._at < self._end:
            try:
                if self._body is None:
                    self._connect()
                    continue  # the answer may have told that the end is here
                block: bytes = self._body.read(size if self._end is None else min(size, self._end - self._at))
                if block:
                    self._at += len(block)
                    return block
                failure: Exception | None = None  # the body ended early without a word
            except _BROKEN as error:
                failure = error
            self._drop()
            failures += 1
            if failures == _TRIES_WITHOUT_PROGRESS:
                raise TryAgain(
                    f"{self._uri}: {self._endpoint} broke off {failures} times at byte {self._at}; try again."
                ) from failure
            time.sleep(0.1 * 2**failures)
        return b""

    def _connect(self) -> None:
        """Ask for what is still to come."""
        request: dict[str, Any] = {"Bucket": self._bucket, "Key": self._key}
        if self._at or self._end is not None:
            last = "" if self._end is None else self._end - 1
            request["Range"] = f"bytes={self._at}-{last}"
        if self._etag is not None:
            request["IfMatch"] = self._etag
        try:
            answer = self._client.get_object(**request)
        except aws.ClientError as error:
            if http_status(error) == 416:  # the range begins at or after the object's end
                self._end = self._at
                return
            if http_status(error) == 412:
                raise TryAgain(f"{self._uri}: was replaced while it was read; try again.") from error
            raise
        self._body = answer["Body"]
        if self._at and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
            raise BadInput(f"{self._uri}: {self._endpoint} does not answer requests for a range; use another server.")
        end = self._at + answer["ContentLength"]
        self._end = end if self._end is None else min(end, self._end)
        self._etag = answer["ETag"]

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
