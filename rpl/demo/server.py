"""The demo's web: a server on loopback that answers for many hosts, and misbehaves as its table of routes says.

    python -m rpl.demo.server FOLDER --port 8000        FOLDER holds routes.json and the files it names

`routes.json` is {URL: {"kind": KIND, "file": PATH, "location": URL}}: KIND is a key of `KINDS`, "file" counts from
FOLDER, "location" is a redirect's target; a kind reads what it needs of them. The Host header and the path pick the
route, so one port serves every host of the table. Knows nothing of pools or categories. Requests are counted by kind
and remembered, for tests to compare.
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import signal
import socket
import socketserver
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

_HANG_S = 120.0
_REMEMBERED = 20_000
_PAGE = b"<!doctype html><title>Sorry</title>Something is wrong here."

Route = Mapping[str, Any]


class Request(NamedTuple):
    """One request as it arrived. `number` counts those of its URL, from 1."""

    host: str
    target: str
    headers: dict[str, str]
    number: int


class Exchange:
    """A request and the means to answer it well or badly; what a kind is handed.

    Attributes:
        route: the table's entry.
        closing: set when the server shuts down; whoever waits, waits on it.
    """

    def __init__(self, handler: BaseHTTPRequestHandler, request: Request, route: Route, server: WebServer) -> None:
        self.request = request
        self.route = route
        self.closing = server.closing
        self._handler = handler
        self._folder = server.folder

    def file(self) -> bytes:
        return (self._folder / str(self.route["file"])).read_bytes()

    @property
    def mime(self) -> str:
        return mimetypes.guess_type(self.route["file"])[0] or "application/octet-stream"

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """A well-formed answer; `headers` may overrule its Content-Length."""
        fields = {"Content-Length": str(len(body)), **(headers or {})}
        head = f"HTTP/1.1 {status} Status\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.send(head.encode("utf-8") + b"\r\n" + body)

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self._handler.wfile.write(data)

    def hang_up(self) -> None:
        """No further request on this connection."""
        self._handler.close_connection = True


Kind = Callable[[Exchange], None]


def _ok(exchange: Exchange) -> None:
    exchange.reply(200, exchange.file(), {"Content-Type": exchange.mime})


def _not_found(exchange: Exchange) -> None:
    exchange.reply(404, _PAGE, {"Content-Type": "text/html"})


def _flaky(exchange: Exchange) -> None:
    if exchange.request.number == 1:
        exchange.reply(500, _PAGE, {"Content-Type": "text/html"})
    else:
        _ok(exchange)


def _redirect(exchange: Exchange) -> None:
    exchange.reply(302, b"", {"Location": exchange.route["location"]})


def _hang(exchange: Exchange) -> None:
    exchange.closing.wait(_HANG_S)
    exchange.hang_up()


def _truncated(exchange: Exchange) -> None:
    data = exchange.file()
    exchange.reply(200, data[: len(data) // 2], {"Content-Type": exchange.mime})


def _wrong_type(exchange: Exchange) -> None:
    exchange.reply(200, exchange.file(), {"Content-Type": "text/plain"})


def _noai(exchange: Exchange) -> None:
    exchange.reply(200, exchange.file(), {"Content-Type": exchange.mime, "X-Robots-Tag": "noai"})


KINDS: dict[str, Kind] = {
    "ok": _ok,
    "not_found": _not_found,
    "flaky": _flaky,
    "redirect": _redirect,
    "redirect_private": _redirect,
    "hang": _hang,
    "truncated": _truncated,
    "html": _ok,  # this and the next two lie in their files alone
    "placeholder": _ok,
    "bomb": _ok,
    "wrong_type": _wrong_type,
    "noai": _noai,
}


class WebServer:
    """Serves a table of routes while it is entered as a context manager.

    Args:
        folder: where the routes' files are, and `routes.json` unless `routes` is given.
        routes: URL → route, http or https (served as plain http all the same: TLS ends before it).
        kinds: further kinds, or other ways of known ones.
        port: 0 takes a free one.
    """

    def __init__(
        self, folder: Path, routes: Mapping[str, Route] | None = None, *, kinds: Mapping[str, Kind] | None = None,
        host: str = "127.0.0.1", port: int = 0,
    ) -> None:  # fmt: skip
        if routes is None:
            routes = json.loads((folder / "routes.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.closing = threading.Event()
        self.counts: Counter[str] = Counter()
        """Requests by kind; "unknown" for addresses that the table does not have."""
        self.requests: deque[Request] = deque(maxlen=_REMEMBERED)
        self._kinds = {**KINDS, **(kinds or {})}
        self._routes = {_key(url): route for url, route in routes.items()}
        self._hosts = sorted({_key(url)[0].partition(":")[0] for url in routes})
        self._asked: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._server = _Server((host, port), _Handler)
        self._server.web = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def address(self) -> str:
        """ "127.0.0.1:PORT", as `runtime.resolve` takes it."""
        return "{}:{}".format(*self._server.server_address[:2])

    @property
    def resolve(self) -> dict[str, str]:
        """`runtime.resolve` for the hosts of the table."""
        return dict.fromkeys(self._hosts, self.address)

    @property
    def accepted(self) -> int:
        """Connections so far."""
        return self._server.accepted

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()
        self._thread.join()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        host, target = handler.headers.get("Host", ""), handler.path
        route = self._routes.get((host.lower(), target))
        kind = "unknown" if route is None else route["kind"]
        with self._lock:
            self._asked[host, target] += 1
            request = Request(host, target, dict(handler.headers.items()), self._asked[host, target])
            self.counts[kind] += 1
            self.requests.append(request)
        respond = _not_found if route is None else self._kinds[kind]
        respond(Exchange(handler, request, route or {}, self))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        self.server.web.answer(self)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (named so by the base class)
        """Nothing: the demo's own lines say what matters."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    web: WebServer

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self.accepted = 0
        self._open: set[socket.socket] = set()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the name server for this machine's name
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        self.accepted += 1
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End the connections that are still open, so that their threads end too."""
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it ended by itself

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave in the middle of an answer are what this server is for."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _key(url: str) -> tuple[str, str]:
    """Host and target as a client sends them for `url`: spaces and letters beyond ASCII encoded."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return parts.netloc.lower().encode("idna").decode(), quote(target, safe="/?%:@!$&'()*+,;=~")


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m rpl.demo.server", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with routes.json and the files it names")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 in a container")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with WebServer(options.folder, host=options.host, port=options.port) as server:
        print(f"serving on http://{server.address}", file=sys.stderr, flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
