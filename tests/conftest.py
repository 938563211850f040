"""Fixtures that many tests share: a real S3 server, and a fresh store in each kind of place."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from rpl.demo.s3 import S3Server

# No test fails because the machine is busy: hypothesis' default is a deadline of 200 ms for each example.
hypothesis.settings.register_profile("rpl", deadline=None)
hypothesis.settings.load_profile("rpl")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS with a bucket and keys of its own, one for all tests."""
    with S3Server(tmp_path_factory.mktemp("s3"), bucket="rpl-tests") as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server; for the length of one test the environment leads to it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(params=["file", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of a store with nothing in it: once a folder, once a prefix on the real S3 server."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    server: S3Server = request.getfixturevalue("s3")
    return f"s3://{server.bucket}/{secrets.token_hex(8)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
