"""Fixtures that many tests share: a real S3 server, and a fresh store in each kind of place."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpl.demo.s3 import S3Server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS with a bucket and keys of its own; the environment leads to it for the rest of the session."""
    before = dict(os.environ)
    with S3Server(tmp_path_factory.mktemp("s3"), bucket="rpl-tests") as server:
        os.environ.update(server.environment())
        yield server
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(params=["file", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of a store with nothing in it: once a folder, once a prefix on the real S3 server."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    server: S3Server = request.getfixturevalue("s3")
    return f"s3://{server.bucket}/{secrets.token_hex(8)}"
