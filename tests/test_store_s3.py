"""What a store on S3 says of keys, buckets, settings and servers that are none. The S3 server is a real one."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from rpl.demo import s3 as s3_server
from rpl.demo.s3 import S3Server
from rpl.errors import BadInput, TryAgain
from rpl.store import open_store, s3_client, stat_uri

# ---- refusals of a real server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.bucket


def _sentences(uri: str, tmp_path: Path) -> set[str]:
    """What every kind of call says when none can succeed."""
    store = open_store(uri)
    (tmp_path / "local").write_bytes(b"x")
    actions: list[Callable[[], Any]] = [
        lambda: store.stat("a"),
        lambda: store.read("a"),
        lambda: store.write("a", b"x"),
        lambda: store.put_if_absent("a", b"x"),
        lambda: store.upload("a", tmp_path / "local"),
        lambda: store.list("a"),
        lambda: stat_uri(f"{uri}/a"),
    ]
    said = set()
    for action in actions:
        with pytest.raises(BadInput) as caught:
            action()
        said.add(str(caught.value))
    return said


def test_unknown_key_id(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOSUCHKEYID")
    assert _sentences(f"s3://{bucket}/p", tmp_path) == {
        f"s3://{bucket}/p/a: the server does not know this key id; "
        "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile."
    }


def test_wrong_secret(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert _sentences(f"s3://{bucket}/p", tmp_path) == {
        f"s3://{bucket}/p/a: the secret key does not fit the key id; "
        "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile."
    }


def test_bucket_that_is_not_there(s3: S3Server, tmp_path: Path) -> None:
    assert _sentences("s3://no-such-bucket/p", tmp_path) == {
        f"s3://no-such-bucket/p/a: there is no bucket 'no-such-bucket' at {s3.endpoint}; create it or correct the URI."
    }


def test_no_keys_at_all(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    assert _sentences(f"s3://{bucket}/p", tmp_path) == {
        f"s3://{bucket}/p/a: no S3 keys were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
    }


def test_keys_that_may_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = s3_server.identities

    def and_a_reader(access_key: str, secret_key: str) -> dict[str, Any]:
        identities = everything(access_key, secret_key)
        keys = [{"accessKey": "READER", "secretKey": "reader's secret"}]
        identities["identities"].append({"name": "reader", "credentials": keys, "actions": ["Read", "List"]})
        return identities

    monkeypatch.setattr(s3_server, "identities", and_a_reader)
    with S3Server(tmp_path / "server", bucket="shared") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        open_store("s3://shared").write("a", b"x")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "READER")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "reader's secret")
        store = open_store("s3://shared")
        assert store.read("a") == b"x"
        refused = "these keys are not allowed to do that; give them read, write, list and delete on the bucket."
        actions: list[tuple[Callable[[], Any], str]] = [
            (lambda: store.write("a", b"y"), f"s3://shared/a: {refused}"),
            (lambda: store.put_if_absent("b", b"y"), f"s3://shared/b: {refused}"),
            (lambda: store.delete(["a"]), f"s3://shared/a: {refused}"),
        ]
        for action, sentence in actions:
            with pytest.raises(BadInput) as caught:
                action()
            assert str(caught.value) == sentence
        assert store.read("a") == b"x"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_ENDPOINT_URL_S3", "no address", "Invalid endpoint: no address"),
        ("AWS_PROFILE", "nobody", "The config profile (nobody) could not be found"),
    ],
)
def test_settings_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadInput) as caught:
        open_store("s3://bucket/p").read("a")
    assert str(caught.value) == f"s3://bucket/p/a: the S3 settings cannot be used ({words}); correct them."


# ---- clients


def test_clients_are_made_once_per_process_and_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    first = s3_client.clients("s3://x")
    assert s3_client.clients("s3://y") is first
    assert (first.endpoint, first.is_aws) == (s3.endpoint, False)
    assert first.usual.meta.config.s3 == {"addressing_style": "path"}
    assert first.usual.meta.config.request_checksum_calculation == "when_required"
    assert first.once.meta.config.retries["total_max_attempts"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        assert s3_client.clients("s3://x") is not first
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OTHER")
    assert s3_client.clients("s3://x") is not first


def test_without_an_endpoint_it_is_amazon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    made = s3_client.clients("s3://x")
    assert made.is_aws
    assert made.usual.meta.region_name == "eu-central-1"
    assert made.usual.meta.config.request_checksum_calculation == "when_supported"


def test_an_endpoint_from_a_profile_is_another_vendors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text("[profile there]\nendpoint_url = http://127.0.0.1:9\nregion = there-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "there")
    made = s3_client.clients("s3://x")
    assert (made.endpoint, made.is_aws, made.usual.meta.region_name) == ("http://127.0.0.1:9", False, "there-1")
    assert made.once.meta.config.request_checksum_calculation == "when_required"
    assert made.usual.meta.config.s3 == {"addressing_style": "path"}


# ---- other servers


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        for action in (lambda store: store.read("a"), lambda store: store.put_if_absent("a", b"")):
            with pytest.raises(TryAgain) as caught:
                action(open_store("s3://bucket/p"))
            assert str(caught.value) == (
                f"s3://bucket/p/a: {endpoint} does not answer (EndpointConnectionError); "
                "check AWS_ENDPOINT_URL and that the server runs, then try again."
            )


def test_a_server_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    monkeypatch.setattr(s3_client, "READ_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        with pytest.raises(TryAgain) as caught:
            open_store("s3://bucket/p").read("a")
    assert str(caught.value) == (
        f"s3://bucket/p/a: {endpoint} does not answer (ReadTimeoutError); "
        "check AWS_ENDPOINT_URL and that the server runs, then try again."
    )


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked: list[tuple[str, str]] = self.server.asked  # type: ignore[attr-defined]
        asked.append((self.command, self.path))
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # one thread serves two clients in turn
        self.end_headers()
        self.wfile.write(body)


class Overwriting(Answering):
    """A store that takes every put, as some do: enough of S3 to be probed."""

    def do_HEAD(self) -> None:
        self._answer(404)

    def do_GET(self) -> None:
        self._answer(200, b"<ListBucketResult/>")

    def do_PUT(self) -> None:
        self._answer(200)

    def do_DELETE(self) -> None:
        self._answer(204)


class WebSite(Answering):
    """No S3 at all, as behind a wrong port."""

    def _page(self) -> None:
        self._answer(200, b"" if self.command == "HEAD" else b"<!doctype html><p>It works!")

    do_HEAD = do_GET = _page


class WholeOnly(Answering):
    """Passes over Range, and breaks its answers off after four bytes."""

    def do_GET(self) -> None:
        self.send_response_only(200)
        self.send_header("Content-Length", "10")
        self.send_header("ETag", '"same"')
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"0123")


@contextmanager
def served(handler: type[Answering]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Endpoint of a server that answers so, and the list of what it was asked."""
    asked: list[tuple[str, str]] = []
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = asked  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_is_no_s3_is_told(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    with served(WebSite) as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = open_store("s3://bucket/p")
        for action in (lambda: store.stat("a"), lambda: store.read("a")):
            with pytest.raises(BadInput) as caught:
                action()
            assert str(caught.value) == (
                f"s3://bucket/p/a: {endpoint} does not answer as an S3 server does; correct AWS_ENDPOINT_URL."
            )


def test_a_server_that_passes_over_ranges_cannot_garble_a_body(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    with served(WholeOnly) as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = open_store("s3://bucket/p")
        assert store.read_range("a", 0, 3) == b"012"
        with store.open("a") as stream, pytest.raises(BadInput) as caught:
            stream.read(4)
            stream.read()
    assert str(caught.value) == f"s3://bucket/p/a: {endpoint} does not answer requests for a range; use another server."


def test_a_store_that_overwrites_is_refused(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    with served(Overwriting) as (endpoint, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        with pytest.raises(BadInput) as caught:
            open_store("s3://bucket/p").put_if_absent("a", b"precious")
    assert str(caught.value) == (
        f"s3://bucket: {endpoint} overwrites objects although it is asked not to (If-None-Match: *); "
        "use a server that honours conditional puts, or a file:// folder."
    )
    put = [path for method, path in asked if method == "PUT"]
    deleted = [path for method, path in asked if method == "DELETE"]
    assert put == [deleted[0]] * 2, "the probe is put twice and taken away; the object itself is never put"
    assert put[0].startswith("/bucket/p/.probe/")
