"""A store in an S3 bucket, under a prefix.

Knows nothing of keys and time-outs (`s3_client`). The conditional put follows SlateDB: each put carries an attempt
id, and whatever leaves its outcome open (412 after a retry, 5xx, a time-out) is settled by reading that id back.
"""

from __future__ import annotations

import io
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from botocore import exceptions as aws

from rpl.errors import BadInput, RplError, TryAgain
from rpl.store.base import ObjectInfo, Store, check_path, check_prefix
from rpl.store.files import explained_file, write_atomically
from rpl.store.s3_client import NOT_ALLOWED, Clients, clients, explained, http_status, is_transient
from rpl.store.s3_stream import S3Stream

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, CopySourceTypeDef, ObjectIdentifierTypeDef

PROBES = ".probe"
_ATTEMPT = "rpl-attempt"
_PART_BYTES = 32 << 20
_COPY_BYTES = 128 << 20  # copied by one request, which some servers answer only when all is copied
_PUT_BUDGET_S = 30.0
_FIRST_WAIT_S = 0.2
_DELETE_AT_ONCE = 1000  # S3's limit

_known_buckets: set[tuple[str, str]] = set()
"""(endpoint, bucket) that have answered; a plain 404 does not say whether the object or its bucket is absent."""
_known_conditional: set[tuple[str, str]] = set()
"""(endpoint, bucket) that have proved to honour If-None-Match."""


class S3Store:
    """Objects under `s3://BUCKET/PREFIX`. Promises: `rpl.store.base.Store`."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._prefix = check_path(prefix, self.uri) + "/" if prefix else ""

    def stat(self, path: str) -> ObjectInfo | None:
        with self._explained(path) as s3:
            try:
                head = s3.usual.head_object(Bucket=self._bucket, Key=self._key(path))
            except aws.ClientError as error:
                self._explain_head(s3, error)
                return None
            modified = head["LastModified"].timestamp()
            return ObjectInfo(path, head["ContentLength"], head["ETag"].strip('"'), modified)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix, self.uri)
        found = []
        with self._explained(prefix) as s3:
            pages = s3.usual.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for entry in page.get("Contents", []):
                    path = entry["Key"].removeprefix(self._prefix)
                    if path and not path.endswith("/"):  # some tools mark folders by objects named so
                        info = (path, entry["Size"], entry["ETag"].strip('"'), entry["LastModified"].timestamp())
                        found.append(ObjectInfo(*info))
        # AWS sorts by whole key, SeaweedFS folder by folder.
        return iter(sorted(found))

    def read(self, path: str) -> bytes:
        with self.open(path) as stream:
            return stream.read()

    def read_range(self, path: str, start: int, length: int) -> bytes:
        if length <= 0:
            return b""
        with self._stream(path, start, start + length) as stream:
            return stream.read()

    def open(self, path: str) -> BinaryIO:
        return self._stream(path, 0, None)

    def write(self, path: str, data: bytes) -> None:
        with self._explained(path) as s3:
            s3.usual.put_object(Bucket=self._bucket, Key=self._key(path), Body=data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        # A look says plainly what is wrong with keys, bucket or network while no outcome can be unknown yet.
        if self.stat(path) is not None:
            return False
        with self._explained(path) as s3:
            self._require_conditional_puts(s3)
            return self._put_once(s3, self._key(path), data)

    def upload(self, path: str, file: Path) -> None:
        with self._explained(path) as s3, file.open("rb") as stream:
            if file.stat().st_size <= _PART_BYTES:
                s3.usual.put_object(Bucket=self._bucket, Key=self._key(path), Body=stream)
            else:
                self._upload_parts(s3, self._key(path), stream)

    def download(self, path: str, file: Path) -> None:
        with explained_file(file), self.open(path) as stream:
            write_atomically(file, lambda target: shutil.copyfileobj(stream, target, 1 << 20))

    def copy_from(self, other: Store, source: str, path: str) -> None:
        if not isinstance(other, S3Store):
            with other.open(source) as stream, self._explained(path) as s3:
                self._upload_parts(s3, self._key(path), stream)
            return
        info = other.stat(source)  # a copy's own answer would not say which of the two is absent
        if info is None:
            raise BadInput(f"{other.uri}/{source}: does not exist; correct the path.")
        place: CopySourceTypeDef = {"Bucket": other._bucket, "Key": other._key(source)}
        with self._explained(path) as s3:
            if info.size <= _COPY_BYTES:
                s3.usual.copy_object(Bucket=self._bucket, Key=self._key(path), CopySource=place)
            else:
                self._copy_parts(s3, self._key(path), place, info.size)

    def delete(self, paths: Iterable[str]) -> None:
        keys: list[ObjectIdentifierTypeDef] = [{"Key": self._key(path)} for path in paths]
        with self._explained("") as s3:
            for first in range(0, len(keys), _DELETE_AT_ONCE):
                batch = keys[first : first + _DELETE_AT_ONCE]
                answer = s3.usual.delete_objects(Bucket=self._bucket, Delete={"Objects": batch, "Quiet": True})
                for failure in answer.get("Errors", []):
                    if failure.get("Code") != "NoSuchKey":
                        raise _failed_delete(self._bucket, failure.get("Key", ""), failure.get("Code", ""))

    def discard_unfinished(self, older_than_s: float) -> Sequence[str]:
        limit = time.time() - older_than_s
        removed = []
        with self._explained("") as s3:
            pages = s3.usual.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                for upload in page.get("Uploads", []):
                    if upload["Initiated"].timestamp() < limit:
                        key, name = upload["Key"], upload["UploadId"]
                        s3.usual.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=name)
                        removed.append(key.removeprefix(self._prefix))
        return sorted(removed)

    def local(self, path: str) -> Path | None:
        check_path(path, self.uri)
        return None

    def _key(self, path: str) -> str:
        return self._prefix + check_path(path, self.uri)

    @contextmanager
    def _explained(self, path: str) -> Iterator[Clients]:
        uri = f"{self.uri}/{path}".rstrip("/")
        s3 = clients(uri)
        with explained(uri, s3.endpoint):
            yield s3

    def _stream(self, path: str, start: int, end: int | None) -> BinaryIO:
        key = self._key(path)
        with self._explained(path) as s3:
            raw = S3Stream(
                s3.usual, self._bucket, key, start=start, end=end, uri=f"{self.uri}/{path}", endpoint=s3.endpoint
            )
        return io.BufferedReader(raw, 1 << 18)

    def _explain_head(self, s3: Clients, error: aws.ClientError) -> None:
        """Return if `error` means that the object is absent; raise otherwise, with the code that HEAD cannot carry."""
        status = http_status(error)
        if status == 404 and (s3.endpoint, self._bucket) in _known_buckets:
            return
        if status not in (400, 403, 404):
            raise error
        # The answer to a HEAD has no body, hence no code: ask again in a way that has one.
        s3.usual.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        if status != 404:
            raise error
        _known_buckets.add((s3.endpoint, self._bucket))

    def _upload_parts(self, s3: Clients, key: str, stream: BinaryIO) -> None:
        def send(upload: str) -> Iterator[CompletedPartTypeDef]:
            for number, block in enumerate(_blocks(stream), start=1):
                answer = s3.usual.upload_part(
                    Bucket=self._bucket, Key=key, UploadId=upload, PartNumber=number, Body=block
                )
                yield {"ETag": answer["ETag"], "PartNumber": number}

        self._in_parts(s3, key, send)

    def _copy_parts(self, s3: Clients, key: str, source: CopySourceTypeDef, size: int) -> None:
        def copy(upload: str) -> Iterator[CompletedPartTypeDef]:
            for number, start in enumerate(range(0, size, _COPY_BYTES), start=1):
                last = min(start + _COPY_BYTES, size) - 1
                answer = s3.usual.upload_part_copy(
                    Bucket=self._bucket, Key=key, UploadId=upload, PartNumber=number, CopySource=source,
                    CopySourceRange=f"bytes={start}-{last}",
                )  # fmt: skip
                yield {"ETag": answer["CopyPartResult"]["ETag"], "PartNumber": number}

        self._in_parts(s3, key, copy)

    def _in_parts(self, s3: Clients, key: str, send: Callable[[str], Iterator[CompletedPartTypeDef]]) -> None:
        """Multipart upload in this thread, so that SIGTERM stops it at once; boto3's own waits for its threads.

        Args:
            send: sends all parts of the upload with the given id, in order.
        """
        attempt = secrets.token_hex(16)
        upload = s3.usual.create_multipart_upload(Bucket=self._bucket, Key=key, Metadata={_ATTEMPT: attempt})[
            "UploadId"
        ]
        try:
            parts = list(send(upload))
            s3.usual.complete_multipart_upload(
                Bucket=self._bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except BaseException as error:
            # The answer to a completion may be lost: a repeated one finds no such upload, and all is well.
            if isinstance(error, aws.ClientError | aws.BotoCoreError) and self._attempt_at(s3, key) == attempt:
                return
            with suppress(aws.ClientError, aws.BotoCoreError):
                s3.once.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload)
            raise

    def _put_once(self, s3: Clients, key: str, data: bytes) -> bool:
        """Put `data` at `key` if that is absent; whether this call's put is what is there."""
        attempt = secrets.token_hex(16)
        give_up = time.monotonic() + _PUT_BUDGET_S
        wait = _FIRST_WAIT_S
        while True:
            try:
                s3.once.put_object(
                    Bucket=self._bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={_ATTEMPT: attempt}
                )
                return True
            except aws.ClientError as error:
                if http_status(error) != 412 and not is_transient(error):
                    raise
                failure: Exception = error
            except (aws.HTTPClientError, aws.ConnectionError) as error:
                failure = error
            winner = self._attempt_at(s3, key)
            if winner is not None:
                return winner == attempt
            # Absent, or no answer: an earlier try may still land, but it carries the same id.
            if time.monotonic() + wait > give_up:
                raise TryAgain(
                    f"s3://{self._bucket}/{key}: {s3.endpoint} did not say whether the object was written "
                    f"({type(failure).__name__}); try again."
                ) from failure
            time.sleep(wait)
            wait = min(2 * wait, 5.0)

    def _attempt_at(self, s3: Clients, key: str) -> str | None:
        """The attempt id of the object at `key` ("" if it has none); None if it is absent or nobody answers."""
        try:
            return s3.usual.head_object(Bucket=self._bucket, Key=key)["Metadata"].get(_ATTEMPT, "")
        except aws.ClientError as error:
            if http_status(error) == 404 or is_transient(error):
                return None
            raise
        except (aws.HTTPClientError, aws.ConnectionError):
            return None

    def _require_conditional_puts(self, s3: Clients) -> None:
        """Some servers ignore If-None-Match and overwrite: find out once per process and bucket. AWS honours it."""
        if s3.is_aws or (s3.endpoint, self._bucket) in _known_conditional:
            return
        key = f"{self._prefix}{PROBES}/{secrets.token_hex(8)}"  # its own: threads and processes probe at once
        try:
            first, second = self._put_once(s3, key, b""), self._put_once(s3, key, b"")
        finally:
            s3.usual.delete_object(Bucket=self._bucket, Key=key)
        if not first or second:
            raise BadInput(
                f"s3://{self._bucket}: {s3.endpoint} overwrites objects although it is asked not to "
                "(If-None-Match: *); use a server that honours conditional puts, or a file:// folder."
            )
        _known_conditional.add((s3.endpoint, self._bucket))


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    """The stream in parts; a single empty one where it holds nothing."""
    block = stream.read(_PART_BYTES)
    yield block
    while block := stream.read(_PART_BYTES):
        yield block


def _failed_delete(bucket: str, key: str, code: str) -> RplError:
    uri = f"s3://{bucket}/{key}"
    if code == "AccessDenied":
        return BadInput(f"{uri}: {NOT_ALLOWED}.")
    return TryAgain(f"{uri}: was not deleted ({code}); try again.")
