"""An HTTP proxy in front of an S3 server that spoils chosen answers, to meet failures that a healthy server never has.

Signatures stay good: S3 signs the Host header, and the proxy passes on the one that it was called by.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Fault:
    """What to do to the first `times` requests with `method` whose address has `within` in it.

    `conditional` picks puts with If-None-Match alone; `before` is called first.
    """

    method: str
    kind: str
    """lose: pass the request on, answer nothing; lie: pass it on, answer 500; refuse: do not pass it on, answer 503;
    cut: answer with the first `bytes` of the body and hang up; conflict: do not pass it on, answer 409."""
    times: int = 1
    bytes: int = 0
    within: str = ""
    conditional: bool = False
    before: Callable[[], object] = lambda: None


class FlakyProxy:
    """Listens on `endpoint`; `faults` may be changed at any time; `seen` has (method, Range header) of each request."""

    def __init__(self, host: str, port: int) -> None:
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str | None]] = []
        self._upstream = (host, port)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _take(self, method: str, address: str, conditional: bool) -> Fault | None:
        for fault in self.faults:
            fits = fault.method == method and fault.within in address and (conditional or not fault.conditional)
            if fault.times and fits:
                fault.times -= 1
                fault.before()
                return fault
        return None

    def _handler(proxy: FlakyProxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # answers "Expect: 100-continue", for which boto3 else waits a second

            def _do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.seen.append((self.command, self.headers.get("Range")))
                fault = proxy._take(self.command, self.path, "If-None-Match" in self.headers)
                kind = fault.kind if fault else None
                self.close_connection = True
                if kind in ("refuse", "conflict"):
                    code, status = ("SlowDown", 503) if kind == "refuse" else ("ConditionalRequestConflict", 409)
                    return self._error(status, code)
                status, headers, content = self._forward(body)
                if kind == "lose":
                    return None
                if kind == "lie":
                    return self._error(500, "InternalError")
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.send_header("Connection", "close")
                self.end_headers()
                if fault is not None:
                    content = content[: fault.bytes]
                if self.command != "HEAD":
                    self.wfile.write(content)
                return None

            def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                connection = http.client.HTTPConnection(*proxy._upstream, timeout=30)
                try:
                    connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        if name.lower() not in ("expect", "connection"):
                            connection.putheader(name, value)
                    connection.endheaders(body)
                    answer = connection.getresponse()
                    return answer.status, answer.getheaders(), answer.read()
                finally:
                    connection.close()

            def _error(self, status: int, code: str) -> None:
                content = f"<Error><Code>{code}</Code><Message>as the test asked</Message></Error>".encode()
                self.send_response_only(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _do

        return Handler


@contextmanager
def flaky_proxy(endpoint: str) -> Iterator[FlakyProxy]:
    """A proxy in front of the server at `endpoint` (http://HOST:PORT)."""
    host, port = endpoint.removeprefix("http://").split(":")
    proxy = FlakyProxy(host, int(port))
    try:
        yield proxy
    finally:
        proxy.close()
