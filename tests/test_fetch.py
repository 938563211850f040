"""Fetching from the hostile server: each of its routes is one threat, with the refusal it must meet.

Also asserted: what the server did not receive, since a refusal after the request would be too late.
"""

from __future__ import annotations

import gzip
import io
import logging
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rpl.config import Download
from rpl.connections import Dialer, Guard, is_forbidden
from rpl.demo.server import Exchange, Kind, WebServer
from rpl.errors import BadInput
from rpl.fetch import Fetched, Fetcher, opted_out, parse_url
from rpl.reasons import Reason, Refused

TIMEOUT_S = 0.5
OPT_OUT = Download().opt_out


def picture() -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Callable[..., WebServer]]:
    """Starts servers whose routes are all on img.test: name → what to do, a kind's name or a function."""
    (tmp_path / "a.jpg").write_bytes(picture())
    started: list[WebServer] = []

    def start(**routes: str | Kind | tuple[str, str]) -> WebServer:
        table: dict[str, Mapping[str, str]] = {}
        kinds: dict[str, Kind] = {}
        for name, what in routes.items():
            kind, to = what if isinstance(what, tuple) else (what, "")
            if callable(kind):
                kinds[name], kind = kind, name
            table[f"http://img.test/{name}"] = {"kind": kind, "file": "a.jpg", "location": to}
        server = WebServer(tmp_path, table, kinds=kinds)
        server.__enter__()
        started.append(server)
        return server

    yield start
    for server in started:
        server.__exit__(None, None, None)


def fetch(server: WebServer, url: str, **settings: object) -> Fetched:
    given_settings = Download.model_validate({"timeout_s": TIMEOUT_S, **settings})
    with Fetcher(given_settings, {"img.test": server.address}) as fetcher:
        return fetcher.fetch(url)


def refusal(server: WebServer, name: str, **settings: object) -> Reason:
    started = time.monotonic()
    with pytest.raises(Refused) as caught:
        fetch(server, name if ":" in name else f"http://img.test/{name}", **settings)
    assert time.monotonic() - started < TIMEOUT_S + 1.5, "the time for one address is not kept"
    return caught.value.reason


# What is taken


def test_a_picture_arrives_whole_with_its_type(web: Callable[..., WebServer]) -> None:
    server = web(a="ok")
    assert fetch(server, "http://img.test/a") == Fetched(picture(), "image/jpeg", "http://img.test/a")


def test_the_request_names_us_and_gives_nothing_away(web: Callable[..., WebServer]) -> None:
    def with_cookie(exchange: Exchange) -> None:
        exchange.reply(302, b"", {"Location": "/a", "Set-Cookie": "id=1"})

    server = web(a="ok", cookie=with_cookie)
    fetch(server, "http://img.test/cookie", user_agent="museum-bot/1.0 (+mailto:a@b.test)")
    assert [sorted(request.headers) for request in server.requests] == [
        ["Accept", "Accept-Encoding", "Host", "User-Agent"]
    ] * 2
    assert server.requests[0].headers["User-Agent"] == "museum-bot/1.0 (+mailto:a@b.test)"


def test_redirects_are_followed_also_relative_ones_and_ones_with_spaces(web: Callable[..., WebServer]) -> None:
    def to_umlaut(exchange: Exchange) -> None:
        exchange.reply(307, b"", {"Location": "/ein Bild ä.jpg?x=a b"})  # raw UTF-8, as many servers send it

    server = web(**{"first": ("redirect", "umlaut"), "umlaut": to_umlaut, "ein Bild ä.jpg?x=a b": "ok"})
    assert fetch(server, "http://img.test/first").final_url == "http://img.test/ein%20Bild%20%C3%A4.jpg?x=a%20b"


def test_octets_and_no_type_at_all_are_left_to_the_picture_itself(web: Callable[..., WebServer]) -> None:
    def octets(exchange: Exchange) -> None:
        exchange.reply(200, exchange.file(), {"Content-Type": "application/octet-stream"})

    def untyped(exchange: Exchange) -> None:
        exchange.reply(200, exchange.file())

    server = web(octets=octets, untyped=untyped)
    assert fetch(server, "http://img.test/octets").data == picture()
    assert fetch(server, "http://img.test/untyped").mime == ""


@pytest.mark.parametrize("coding", ["gzip", "deflate", "identity"])
def test_a_body_may_come_packed_and_in_chunks(web: Callable[..., WebServer], coding: str) -> None:
    def packed(exchange: Exchange) -> None:
        pack = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}[coding]
        body = pack(exchange.file())
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nTransfer-Encoding: chunked\r\n\r\n"
        halves = (body[:100], body[100:])
        exchange.send(head.encode() + b"".join(b"%x\r\n%s\r\n" % (len(half), half) for half in halves) + b"0\r\n\r\n")

    assert fetch(web(packed=packed), "http://img.test/packed").data == picture()


def test_connections_are_reused_after_pictures_redirects_and_missing_pages(web: Callable[..., WebServer]) -> None:
    server = web(a="ok", b="not_found", c=("redirect", "http://img.test/a"))
    with Fetcher(Download(timeout_s=TIMEOUT_S), server.resolve) as fetcher:
        for name in ("a", "b", "c", "a"):
            if name == "b":
                with pytest.raises(Refused):
                    fetcher.fetch("http://img.test/b")
            else:
                fetcher.fetch(f"http://img.test/{name}")
        assert server.accepted == 1
    assert sum(server.counts.values()) == 5


def test_https_works_with_the_pins_and_checks_the_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("img.test").configure_cert(context)
    with authority.cert_pem.tempfile() as known:
        monkeypatch.setenv("SSL_CERT_FILE", known)
        (tmp_path / "a.jpg").write_bytes(picture())
        hosts = ("img.test", "other.test")
        server = WebServer(tmp_path, {f"https://{host}/a.jpg": {"kind": "ok", "file": "a.jpg"} for host in hosts})
        server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
        with server, Fetcher(Download(timeout_s=2), server.resolve) as fetcher:
            assert fetcher.fetch("https://img.test/a.jpg").data == picture()
            with pytest.raises(Refused) as caught:
                fetcher.fetch("https://other.test/a.jpg")
        assert caught.value.reason == Reason.TLS_FAILED
        assert [request.host for request in server.requests] == ["img.test"]


# Where an address may lead


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "168.63.129.16",
        "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.31.196.1", "192.52.193.1",
        "192.88.99.1", "192.168.0.1", "192.175.48.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
        "239.255.255.250", "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1",
        "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::a00:1", "100::1", "2001::1", "2001:2::1",
        "2001:db8::1", "2002:7f00:1::", "2620:4f:8000::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1",
        "fe80::1%eth0", "fec0::1", "ff02::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_forbidden(address: str) -> None:
    assert is_forbidden(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "172.32.0.1", "192.0.1.1", "2606:4700::1", "2a00:1450::1"])
def test_public_addresses_are_not(address: str) -> None:
    assert not is_forbidden(address)


@given(st.ip_addresses())
def test_nothing_that_python_calls_private_is_allowed(address: object) -> None:
    assert address.is_global or is_forbidden(str(address))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "017700000001", "0x7f000001", "127.1", "0x7f.0.0.1", "0"]
)
def test_no_spelling_of_loopback_is_connected_to(web: Callable[..., WebServer], host: str) -> None:
    server = web(a="ok")
    with pytest.raises(Refused) as caught:
        Dialer({"img.test": server.address}).dial(host, int(server.address[10:]), Guard(Dialer(), 2, 1))
    assert caught.value.reason == Reason.PRIVATE_ADDRESS
    assert server.accepted == 0


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1/", "http://localhost/", "http://2130706433/", "http://0177.0.0.1/", "http://0x7f000001/",
        "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[64:ff9b::7f00:1]/", "http://169.254.169.254/latest/",
        "https://10.0.0.1/", "http://127.0.0.1:1/admin.jpg", "//192.168.1.1/router.jpg", "http://127。0。0。1/", "http://１２７.0.0.1/",
    ],
)  # fmt: skip
def test_redirects_to_private_places_are_refused(web: Callable[..., WebServer], target: str) -> None:
    server = web(r=("redirect", target))
    assert refusal(server, "r") == Reason.PRIVATE_ADDRESS
    assert sum(server.counts.values()) == 1, "asked once: a refusal is not tried again"


def test_a_host_with_one_private_address_among_public_ones_is_refused() -> None:
    def lookup(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, 0, 0, "", (ip, port)) for ip in ("8.8.8.8", "10.0.0.1")]

    dialer = Dialer(lookup=lookup)
    with pytest.raises(Refused, match=r"^private_address: mixed\.test is 10\.0\.0\.1$"):
        dialer.dial("mixed.test", 80, Guard(dialer, 1, 1))


def test_the_checked_address_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that changes its answer (DNS rebinding) is asked once, and its first answer is what is dialled."""
    answers = iter(["8.8.8.8", "127.0.0.1"])
    dialled: list[tuple[str, int]] = []

    def connect(address: str, port: int, _timeout_s: float) -> None:
        dialled.append((address, port))

    monkeypatch.setattr("rpl.connections._connect", connect)
    dialer = Dialer(lookup=lambda host, port, **_: [(socket.AF_INET, 0, 0, "", (next(answers), port))])
    for _ in range(2):
        dialer.dial("rebind.test", 80, Guard(dialer, 1, 1))
    assert dialled == [("8.8.8.8", 80), ("8.8.8.8", 80)]


def test_pins_serve_their_host_alone(web: Callable[..., WebServer]) -> None:
    server = web(a="ok")
    assert refusal(server, "http://127.0.0.1/a") == Reason.PRIVATE_ADDRESS
    assert refusal(server, f"http://{server.address}/a") == Reason.PRIVATE_ADDRESS
    assert refusal(server, "http://img.test:22/a") == Reason.FORBIDDEN_PORT
    assert not server.requests
    assert refusal(server, "http://img.test:443/a") == Reason.NOT_FOUND  # asked: a known port, and pinned
    assert [(request.host, request.target) for request in server.requests] == [("img.test:443", "/a")]


def test_proxies_of_the_environment_are_ignored(web: Callable[..., WebServer], monkeypatch: pytest.MonkeyPatch) -> None:
    server = web(a="ok")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(server, "http://img.test/a").data == picture()


def test_names_that_do_not_exist_and_name_servers_that_hang() -> None:
    def unknown(*_: object, **__: object) -> list[tuple[object, ...]]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    release = threading.Event()

    def hang(*_: object, **__: object) -> list[tuple[object, ...]]:
        release.wait(10)
        return []

    settings = Download(timeout_s=0.2)
    for lookup, reason in ((unknown, Reason.UNKNOWN_HOST), (hang, Reason.TIMED_OUT)):
        started = time.monotonic()
        with Fetcher(settings, {}, dialer=Dialer(lookup=lookup)) as fetcher, pytest.raises(Refused) as caught:
            fetcher.fetch("http://gone.test/a.jpg")
        assert caught.value.reason == reason
        assert time.monotonic() - started < 1
    release.set()


# Which addresses are addresses


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://host/a.jpg", "data:image/png;base64,AAAA", "//host/a.jpg", "a.jpg", "", "http://",
        "http:///a.jpg", "http://user:secret@host/a.jpg", "http://good.test\\@127.0.0.1/", "http://ho st/a.jpg",
        "http://host/a\r\nX: 1", "http://host/\x00", "http://host:0/", "http://host:99999/", "http://host:x/",
        "http://%31%32%37.0.0.1/", "http://[::1", "http://[fe80::1%25eth0]/", "http://-/" + "a" * 9000,
        "http://" + "a" * 64 + ".test/", "http://a..b/",
    ],
)  # fmt: skip
def test_what_is_no_web_address(url: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_url(url)
    assert caught.value.reason == Reason.BAD_URL


@pytest.mark.parametrize(
    ("url", "wire"),
    [
        (" http://Host.test ", "http://host.test/"),
        ("http://host/a b/ä.jpg?q=ü ü#top", "http://host/a%20b/%C3%A4.jpg?q=%C3%BC%20%C3%BC"),
        ("http://host/a%20b%2fc", "http://host/a%20b%2fc"),
        ("http://host/100%.jpg", "http://host/100%25.jpg"),
        ("https://bücher.test:443/", "https://xn--bcher-kva.test/"),
        ("http://host:443/?a=[1|2]", "http://host:443/?a=%5B1%7C2%5D"),
        ("http://[2606:4700::1111]/", "http://[2606:4700::1111]/"),
    ],
)
def test_addresses_are_encoded_as_browsers_do(url: str, wire: str) -> None:
    assert parse_url(url).url == wire


@given(st.one_of(st.text(), st.text().map(lambda text: f"http://host/{text}"), st.text().map("https://{}/".format)))
def test_any_text_is_refused_or_has_one_form_on_the_wire(text: str) -> None:
    try:
        address = parse_url(text)
    except Refused:
        return
    assert address.url.isascii()
    assert not set(address.url) & set(" \r\n\t")
    assert parse_url(address.url) == address


def test_a_redirect_to_a_file_is_no_web_address(web: Callable[..., WebServer]) -> None:
    server = web(f=("redirect", "file:///etc/passwd"), g=("redirect", "http://u:p@img.test/a"), n=("redirect", ""))
    assert refusal(server, "f") == Reason.BAD_URL
    assert refusal(server, "g") == Reason.BAD_URL
    assert refusal(server, "n") == Reason.BAD_RESPONSE
    assert server.counts == {"redirect": 3}


def test_pins_and_user_agents_are_checked_at_the_start() -> None:
    with pytest.raises(BadInput) as caught:
        Fetcher(Download(), {"a.test": "somewhere"})
    assert str(caught.value) == (
        "the configuration's runtime.resolve: a.test: 'somewhere' is not ADDRESS:PORT; write it as 127.0.0.1:8000."
    )
    with pytest.raises(BadInput) as caught:
        Fetcher(Download(user_agent="a\r\nX: 1"), {})
    assert str(caught.value) == "download.user_agent: 'a\\r\\nX: 1' is not one line of ASCII; correct it."


# How an answer may misbehave


def drip_body(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: 1000\r\n\r\n")
    while not exchange.closing.wait(0.05):
        exchange.send(b"x")


def drip_headers(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not exchange.closing.wait(0.05):
        exchange.send(b"x")


def endless_continue(exchange: Exchange) -> None:
    while not exchange.closing.is_set():
        exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)


def endless_body(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")
    exchange.hang_up()
    while not exchange.closing.is_set():
        exchange.send(bytes(10_000))


def endless_chunks(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not exchange.closing.is_set():
        exchange.send(b"2710\r\n" + bytes(10_000) + b"\r\n")


def endless_chunk_size(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;")
    while not exchange.closing.is_set():
        exchange.send(b"x" * 10_000)


def gzip_bomb(exchange: Exchange) -> None:
    exchange.reply(200, gzip.compress(bytes(50_000_000)), {"Content-Encoding": "gzip", "Content-Type": "image/png"})


def cut_gzip(exchange: Exchange) -> None:
    exchange.reply(200, gzip.compress(exchange.file())[:-20], {"Content-Encoding": "gzip"})


def false_gzip(exchange: Exchange) -> None:
    exchange.reply(200, exchange.file(), {"Content-Encoding": "gzip"})


def brotli(exchange: Exchange) -> None:
    exchange.reply(200, exchange.file(), {"Content-Encoding": "br"})


def many_headers(exchange: Exchange) -> None:
    exchange.reply(200, exchange.file(), {f"X-{number}": "1" for number in range(200)})


def huge_header(exchange: Exchange) -> None:
    exchange.reply(200, exchange.file(), {"X-Huge": "x" * 70_000})


def short_body(exchange: Exchange) -> None:
    exchange.reply(200, exchange.file(), {"Content-Type": "image/jpeg", "Content-Length": "999999"})
    exchange.hang_up()


def declared_huge(exchange: Exchange) -> None:
    exchange.reply(200, b"", {"Content-Type": "image/jpeg", "Content-Length": "9" * 30})


def not_http(exchange: Exchange) -> None:
    exchange.send(b"220 smtp.example ready\r\n")
    exchange.hang_up()


def hang_up_at_once(exchange: Exchange) -> None:
    exchange.hang_up()


def no_content(exchange: Exchange) -> None:
    exchange.reply(204)


def forbidden(exchange: Exchange) -> None:
    exchange.reply(403)


@pytest.mark.parametrize(
    ("misbehaviour", "reason", "tries"),
    [
        ("hang", Reason.TIMED_OUT, 1),  # it used the time of all tries
        (drip_body, Reason.TIMED_OUT, 1),
        (drip_headers, Reason.TIMED_OUT, 1),
        (endless_continue, Reason.TOO_LARGE, 1),
        (endless_body, Reason.TOO_LARGE, 1),
        (endless_chunks, Reason.TOO_LARGE, 1),
        (endless_chunk_size, Reason.BAD_RESPONSE, 1),
        (gzip_bomb, Reason.TOO_LARGE, 1),
        (declared_huge, Reason.TOO_LARGE, 1),
        (cut_gzip, Reason.BAD_RESPONSE, 1),
        (false_gzip, Reason.BAD_RESPONSE, 1),
        (brotli, Reason.BAD_RESPONSE, 1),
        (many_headers, Reason.BAD_RESPONSE, 1),
        (huge_header, Reason.BAD_RESPONSE, 1),
        (not_http, Reason.BAD_RESPONSE, 1),
        (no_content, Reason.BAD_RESPONSE, 1),
        (short_body, Reason.NO_CONNECTION, 3),  # broke off, which may pass
        (hang_up_at_once, Reason.NO_CONNECTION, 3),
        (lambda exchange: exchange.reply(500), Reason.SERVER_ERROR, 3),
        (lambda exchange: exchange.reply(429), Reason.SERVER_ERROR, 3),
        (forbidden, Reason.DENIED, 1),
        ("not_found", Reason.NOT_FOUND, 1),
        (lambda exchange: exchange.reply(200, b"<p>", {"Content-Type": "text/html"}), Reason.NOT_AN_IMAGE, 1),
        ("wrong_type", Reason.WRONG_TYPE, 1),
        ("noai", Reason.OPTED_OUT, 1),
    ],
)  # fmt: skip
def test_misbehaving_answers(
    web: Callable[..., WebServer], misbehaviour: str | Kind, reason: Reason, tries: int
) -> None:
    server = web(a=misbehaviour)
    assert refusal(server, "a", max_bytes=1_000_000) == reason
    assert sum(server.counts.values()) == tries


def test_a_gzip_bomb_is_not_unpacked_beyond_the_limit(web: Callable[..., WebServer]) -> None:
    packed = gzip.compress(bytes(50_000_000))
    server = web(a=lambda exchange: exchange.reply(200, packed, {"Content-Encoding": "gzip"}))
    tracemalloc.start()
    try:
        assert refusal(server, "a", max_bytes=1_000_000) == Reason.TOO_LARGE
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_body_of_just_the_limit_is_taken_and_one_byte_more_is_not(web: Callable[..., WebServer]) -> None:
    server = web(a="ok")
    assert fetch(server, "http://img.test/a", max_bytes=len(picture())).data == picture()
    assert refusal(server, "a", max_bytes=len(picture()) - 1) == Reason.TOO_LARGE


def test_one_failure_of_the_server_is_forgiven(web: Callable[..., WebServer]) -> None:
    server = web(a="flaky")
    assert fetch(server, "http://img.test/a").data == picture()
    assert server.counts == {"flaky": 2}
    assert refusal(web(a="flaky"), "a", retries=0) == Reason.SERVER_ERROR


def test_a_redirect_loop_ends_at_the_limit(web: Callable[..., WebServer]) -> None:
    server = web(a=("redirect", "http://img.test/b"), b=("redirect", "/a"))
    assert refusal(server, "a", max_redirects=4) == Reason.TOO_MANY_REDIRECTS
    assert server.counts == {"redirect": 5}


def test_opt_outs_hold_on_redirects_too(web: Callable[..., WebServer]) -> None:
    def noai_redirect(exchange: Exchange) -> None:
        exchange.reply(302, b"", {"Location": "/a", "X-Robots-Tag": "noai"})

    server = web(a="ok", r=noai_redirect)
    assert refusal(server, "r") == Reason.OPTED_OUT
    assert server.counts == {"r": 1}


def test_no_body_is_read_of_what_is_refused_by_its_header(web: Callable[..., WebServer]) -> None:
    sent: list[int] = []

    def page(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 100000000\r\n\r\n")
        exchange.hang_up()
        for _ in range(1000):
            exchange.send(bytes(100_000))
            sent.append(100_000)

    assert refusal(web(a=page), "a") == Reason.NOT_AN_IMAGE
    assert sum(sent) < 20_000_000, "more than the buffers of the sockets hold"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], False),
        (["all"], False),
        (["noai"], True),
        (["NoAI, noimageai"], True),
        (["none"], True),
        (["nofollow", "noindex"], True),
        (["nofollow noindex"], True),
        (["otherbot: noai"], False),
        (["otherbot: nofollow, noai"], False),
        (["noai, otherbot: nofollow"], True),
        (["rpl-image-sourcing: noai"], True),
        (["RPL-Image-Sourcing: nofollow, noai"], True),
        (["img2dataset: noindex"], True),
        (["*: noindex"], True),
        (["unavailable_after: Fri, 25 Jun 2010 15:00:00 PST, noai"], True),
        (["max-snippet: 10, max-image-preview: large"], False),
        (["max-snippet: 10, noimageindex"], True),
    ],
)
def test_opt_out_headers(headers: list[str], expected: bool) -> None:
    assert opted_out(headers, "rpl-image-sourcing", OPT_OUT) is expected


# Many at once


def test_a_host_gets_no_more_connections_than_allowed_and_waiting_costs_no_time(
    web: Callable[..., WebServer],
) -> None:
    lock = threading.Lock()
    under_way: list[int] = []
    most: list[int] = [0]

    def slow(exchange: Exchange) -> None:
        with lock:
            under_way.append(1)
            most[0] = max(most[0], len(under_way))
        exchange.closing.wait(0.2)
        with lock:
            under_way.pop()
        exchange.reply(200, exchange.file(), {"Content-Type": "image/jpeg"})

    server = web(a=slow)
    results: list[object] = []
    with Fetcher(Download(timeout_s=TIMEOUT_S, connections_per_host=2), server.resolve) as fetcher:
        threads = [
            threading.Thread(target=lambda: results.append(fetcher.fetch("http://img.test/a"))) for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 10, "the fifth pair waits 0.8 s for its turn, longer than one address may take"
    assert most == [2]


def test_nothing_of_a_body_is_logged(web: Callable[..., WebServer], caplog: pytest.LogCaptureFixture) -> None:
    def broken_header(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nbroken header\r\n\r\nsecret body")
        exchange.hang_up()

    with caplog.at_level(logging.INFO):
        fetch(web(a=broken_header), "http://img.test/a")
    assert not caplog.records
