"""A store on S3 whose requests are lost, refused and broken off on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rpl.demo.s3 import S3Server
from rpl.errors import TryAgain
from rpl.store import Store, open_store
from rpl.store import s3 as s3_module
from tests.flaky_s3 import Fault, FlakyProxy, flaky_proxy


@pytest.fixture(scope="module")
def shared_proxy(s3_server: S3Server) -> Iterator[FlakyProxy]:
    """One for all tests, since each new endpoint costs new clients and a probe of conditional puts."""
    with flaky_proxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(s3: S3Server, shared_proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> FlakyProxy:
    shared_proxy.faults = []
    shared_proxy.seen.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", shared_proxy.endpoint)
    return shared_proxy


class Direct:
    """The same prefix without the proxy: what is really there."""

    def __init__(self, server: S3Server, prefix: str) -> None:
        self._client, self._bucket, self._prefix = server.client(), server.bucket, prefix

    def read(self, path: str) -> bytes:
        return self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{path}")["Body"].read()

    def write(self, path: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=f"{self._prefix}/{path}", Body=data)


@pytest.fixture
def direct(s3: S3Server, tmp_path: Path) -> Direct:
    return Direct(s3, tmp_path.name)


@pytest.fixture
def flaky(s3: S3Server, proxy: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store behind the proxy, past the probe of conditional puts, that waits little between its tries."""
    monkeypatch.setattr(s3_module, "_FIRST_WAIT_S", 0.02)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    store = open_store(f"s3://{s3.bucket}/{tmp_path.name}")
    assert store.put_if_absent("first", b"") is True
    proxy.seen.clear()
    return store


@pytest.mark.parametrize("kind", ["lose", "lie", "conflict", "refuse"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_put_whose_answer_is_lost_finds_its_own_success(
    flaky: Store, direct: Direct, proxy: FlakyProxy, kind: str, times: int
) -> None:
    proxy.faults = [Fault("PUT", kind, times, conditional=True)]
    assert flaky.put_if_absent("k", b"mine") is True
    assert proxy.faults[0].times < times
    assert direct.read("k") == b"mine"
    proxy.faults = []
    assert flaky.put_if_absent("k", b"mine") is False, "equal bytes of a later call are not this call's"


@pytest.mark.parametrize("kind", ["lose", "lie", "conflict"])
def test_a_put_whose_answer_is_lost_finds_that_another_won(
    flaky: Store, direct: Direct, proxy: FlakyProxy, kind: str
) -> None:
    proxy.faults = [Fault("PUT", kind, conditional=True, before=lambda: direct.write("k", b"another's"))]
    assert flaky.put_if_absent("k", b"mine") is False
    assert direct.read("k") == b"another's"


def test_while_the_outcome_is_unknown_nothing_is_deleted(
    flaky: Store, direct: Direct, proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "_PUT_BUDGET_S", 0.5)

    def nobody_answers_any_more() -> None:
        proxy.faults.append(Fault("HEAD", "refuse", 99))

    proxy.faults = [Fault("PUT", "lose", 99, conditional=True, before=nobody_answers_any_more)]
    with pytest.raises(TryAgain) as caught:
        flaky.put_if_absent("k", b"mine")
    assert str(caught.value) == (
        f"{flaky.uri}/k: {proxy.endpoint} did not say whether the object was written (ConnectionClosedError); "
        "try again."
    )
    assert direct.read("k") == b"mine"
    assert "DELETE" not in [method for method, _ in proxy.seen]


DATA = bytes(range(256)) * 4096


def test_a_body_that_breaks_off_is_taken_up_again(flaky: Store, direct: Direct, proxy: FlakyProxy) -> None:
    direct.write("k", DATA)
    proxy.faults = [Fault("GET", "cut", 2, bytes=300_000)]
    assert flaky.read("k") == DATA
    first, *resumed = [where for method, where in proxy.seen if method == "GET"]
    assert first is None
    assert len(resumed) == 2
    assert all(where is not None and where.startswith("bytes=") for where in resumed)
    proxy.faults = [Fault("GET", "cut", bytes=100_000)]
    assert flaky.read_range("k", 1000, 500_000) == DATA[1000:501_000]


def test_a_download_that_breaks_off_is_complete_or_not_there(
    flaky: Store, direct: Direct, proxy: FlakyProxy, tmp_path: Path
) -> None:
    direct.write("k", DATA)
    proxy.faults = [Fault("GET", "cut", bytes=777_777)]
    flaky.download("k", tmp_path / "down/k")
    assert (tmp_path / "down/k").read_bytes() == DATA
    proxy.faults = [Fault("GET", "cut", 99)]
    with pytest.raises(TryAgain) as caught:
        flaky.download("k", tmp_path / "down/again")
    assert str(caught.value) == f"{flaky.uri}/k: {proxy.endpoint} broke off 3 times at byte 0; try again."
    assert [file.name for file in (tmp_path / "down").iterdir()] == ["k"]


def test_an_object_replaced_while_it_is_read_is_never_mixed(flaky: Store, direct: Direct, proxy: FlakyProxy) -> None:
    direct.write("k", DATA)
    proxy.faults = [Fault("GET", "cut", bytes=300_000, before=lambda: direct.write("other", b"still the same"))]
    with flaky.open("k") as stream:
        assert stream.read(100_000) == DATA[:100_000]
        direct.write("k", DATA[::-1])
        with pytest.raises(TryAgain) as caught:
            stream.read()
    assert str(caught.value) == f"{flaky.uri}/k: was replaced while it was read; try again."


def test_busy_servers_are_asked_again_and_then_named(flaky: Store, direct: Direct, proxy: FlakyProxy) -> None:
    direct.write("k", b"x")
    proxy.faults = [Fault("GET", "refuse", 2)]
    assert flaky.read("k") == b"x"
    proxy.faults = [Fault("GET", "refuse", 99), Fault("PUT", "refuse", 99)]
    for action in (lambda: flaky.read("k"), lambda: flaky.write("k", b"y")):
        with pytest.raises(TryAgain) as caught:
            action()
        assert str(caught.value) == f"{flaky.uri}/k: {proxy.endpoint} answered SlowDown (HTTP 503); try again."


def test_the_probe_is_made_once_and_leaves_nothing(
    s3: S3Server, proxy: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "_known_conditional", set())
    store = open_store(f"s3://{s3.bucket}/{tmp_path.name}")
    assert store.put_if_absent("a", b"") is True
    assert [method for method, _ in proxy.seen].count("PUT") == 3
    proxy.seen.clear()
    assert open_store(f"s3://{s3.bucket}/{tmp_path.name}-2").put_if_absent("b", b"") is True
    assert [method for method, _ in proxy.seen].count("PUT") == 1
    assert [info.path for info in store.list()] == ["a"]


# ---- uploads in parts


@pytest.fixture
def in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of two and a bit parts of the least size that S3 allows."""
    monkeypatch.setattr(s3_module, "_PART_BYTES", 5 << 20)
    file = tmp_path / "large"
    file.write_bytes(DATA * 11)
    return file


def test_a_completion_whose_answer_is_lost_is_found(
    flaky: Store, direct: Direct, proxy: FlakyProxy, in_parts: Path
) -> None:
    proxy.faults = [Fault("POST", "lose", 2, within="uploadId=")]
    flaky.upload("k", in_parts)
    assert direct.read("k") == in_parts.read_bytes()


def test_an_upload_that_fails_leaves_no_parts(s3: S3Server, flaky: Store, proxy: FlakyProxy, in_parts: Path) -> None:
    proxy.faults = [Fault("PUT", "refuse", 99, within="partNumber=2")]
    with pytest.raises(TryAgain) as caught:
        flaky.upload("k", in_parts)
    assert str(caught.value) == f"{flaky.uri}/k: {proxy.endpoint} answered SlowDown (HTTP 503); try again."
    assert "DELETE" in [method for method, _ in proxy.seen]
    assert flaky.stat("k") is None
    assert flaky.discard_unfinished(-60) == []


def test_a_copy_within_s3_does_not_pass_through_here(
    flaky: Store, direct: Direct, proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "_COPY_BYTES", 5 << 20)
    data = DATA * 11
    direct.write("k", data)
    proxy.seen.clear()
    flaky.copy_from(flaky, "k", "copy")
    assert direct.read("copy") == data
    assert "GET" not in [method for method, _ in proxy.seen], "no body was fetched"
    proxy.faults = [Fault("PUT", "refuse", 99, within="partNumber=2")]
    with pytest.raises(TryAgain, match=r"/torn: .* answered SlowDown \(HTTP 503\); try again"):
        flaky.copy_from(flaky, "k", "torn")
    assert flaky.stat("torn") is None
    assert flaky.discard_unfinished(-60) == []


def test_parts_of_killed_uploads_are_collected_when_old(s3: S3Server, tmp_path: Path) -> None:
    store = open_store(f"s3://{s3.bucket}/{tmp_path.name}")
    client = s3.client()
    upload = client.create_multipart_upload(Bucket=s3.bucket, Key=f"{tmp_path.name}/x/killed")["UploadId"]
    key = {"Bucket": s3.bucket, "Key": f"{tmp_path.name}/x/killed", "UploadId": upload}
    client.upload_part(**key, PartNumber=1, Body=b"half of it")
    assert list(store.list()) == []
    assert store.discard_unfinished(3600) == []
    assert store.discard_unfinished(-60) == ["x/killed"]
    assert "Uploads" not in client.list_multipart_uploads(Bucket=s3.bucket, Prefix=tmp_path.name)
