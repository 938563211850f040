"""One web address to the bytes of a picture, or a refusal with its reason. Trusts neither the address nor the answer.

Redirects are followed by hand and each hop is checked as the first; bodies are read and unpacked in pieces under a
limit; opt-outs (X-Robots-Tag) are honoured at every hop. `rpl.connections` guards where connections lead and how long
they last. No cookies, no proxies, no log of what was received. Knows nothing of pixels, ranks or categories.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import quote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, ProtocolError, SSLError
from urllib3.exceptions import TimeoutError as PoolTimeoutError

from rpl.config import Download
from rpl.connections import Dialer, Guard, HostSlots, connection_pools
from rpl.errors import BadInput
from rpl.reasons import Reason, Refused

_PIECE_BYTES = 64 * 1024
_BACK_OFF_S = 0.1
"""Before the second try; doubled for each one after."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}
_ACCEPT = "image/jpeg, image/png, image/webp, image/gif, image/bmp, */*;q=0.1"
_UNDECLARED = frozenset({"", "application/octet-stream", "binary/octet-stream", "application/binary"})
"""Types by which servers say that they do not know; the picture's own first bytes then decide."""
_PAGES = frozenset({"text/html", "application/xhtml+xml"})
_DIRECTIVES_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_AGENT = re.compile(r"\*|[a-z][a-z0-9_.-]*")
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
_LONGEST_URL = 8192


@dataclass(frozen=True)
class Fetched:
    """A whole answer. `mime` is the declared content type in lower case, "" if none; `final_url` after redirects."""

    data: bytes
    mime: str
    final_url: str


@dataclass(frozen=True)
class WebAddress:
    """The parts of an address that go on the wire: host in ASCII, target percent-encoded."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"


class Fetcher:
    """Fetches addresses for many threads at once; one per process, used as a context manager.

    Args:
        settings: time, bytes, redirects, tries, opt-out words, user agent, connections per host.
        resolve: `runtime.resolve`: hosts that connect to a fixed address, which may be private.
        dialer: opens the sockets; by default one that obeys `resolve`.

    Raises:
        BadInput: a setting that cannot be sent or a pin that is no address.
    """

    def __init__(self, settings: Download, resolve: Mapping[str, str], *, dialer: Dialer | None = None) -> None:
        self._settings = settings
        self._dialer = dialer or Dialer(resolve)
        self._pools = connection_pools(settings.connections_per_host)
        self._slots = HostSlots(settings.connections_per_host)
        agent = settings.user_agent
        if not (agent.isascii() and agent.isprintable()):
            raise BadInput(f"download.user_agent: {agent!r} is not one line of ASCII; correct it.")
        self._headers = {"User-Agent": agent, "Accept": _ACCEPT, "Accept-Encoding": "identity"}
        self._agent = re.split(r"[/\s]", agent.strip(), maxsplit=1)[0].lower()

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pools.clear()

    def fetch(self, url: str) -> Fetched:
        """The answer at `url`, within `timeout_s` for everything: names, tries, redirects, body.

        Raises:
            Refused: with one of the reasons of the stage "fetch", or not_an_image where a page is declared.
        """
        guard = Guard(self._dialer, self._settings.timeout_s, self._settings.max_bytes)
        address = parse_url(url)
        with guard.applied():
            for retry in range(self._settings.retries + 1):
                try:
                    return self._follow(address, guard)
                except Refused as refusal:
                    last = refusal
                    back_off_s = _BACK_OFF_S * 2**retry
                    if not refusal.may_pass or retry == self._settings.retries or _over(guard, back_off_s):
                        break
                    time.sleep(back_off_s)
        raise last

    def _follow(self, address: WebAddress, guard: Guard) -> Fetched:
        for _ in range(self._settings.max_redirects + 1):
            answer = self._hop(address, guard)
            if isinstance(answer, Fetched):
                return answer
            address = answer
        raise Refused(Reason.TOO_MANY_REDIRECTS, f"more than {self._settings.max_redirects}")

    def _hop(self, address: WebAddress, guard: Guard) -> Fetched | WebAddress:
        """One request: a whole answer, or where it redirects to."""
        with self._slots.taken(address.host, guard), _translated():
            guard.new_answer()
            pool = self._pools.connection_from_host(address.host, address.port, address.scheme)
            response = pool.urlopen(
                "GET", address.target, headers=self._headers, retries=False, redirect=False, assert_same_host=False,
                timeout=guard.remaining_s(), preload_content=False, decode_content=False,
            )  # fmt: skip
            assert isinstance(response, urllib3.HTTPResponse)
            try:
                return self._read(response, address)
            finally:
                _let_go(response)

    def _read(self, response: urllib3.HTTPResponse, address: WebAddress) -> Fetched | WebAddress:
        if opted_out(response.headers.getlist("X-Robots-Tag"), self._agent, self._settings.opt_out):
            raise Refused(Reason.OPTED_OUT, f"{address.host}: X-Robots-Tag")
        if response.status in _REDIRECTS:
            return _redirect(address, response.headers.get("Location"))
        _check_status(response.status)
        mime = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        _check_type(mime)
        return Fetched(_body(response, self._settings.max_bytes), mime, address.url)


def parse_url(text: str) -> WebAddress:
    """The address as it goes on the wire; spaces and letters beyond ASCII are encoded as browsers do.

    Raises:
        Refused: bad_url: another scheme than http and https, no host, credentials, control characters, no such port.
    """
    text = text.strip()
    if len(text) > _LONGEST_URL or re.search(r"[\x00-\x1f\x7f]", text):
        raise Refused(Reason.BAD_URL, "too long, or holds control characters")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise Refused(Reason.BAD_URL, str(error)) from None
    if parts.scheme not in _PORTS:
        raise Refused(Reason.BAD_URL, f"the scheme {parts.scheme[:20]!r} is neither http nor https")
    if "@" in parts.netloc:
        raise Refused(Reason.BAD_URL, "holds credentials")
    if port == 0:
        raise Refused(Reason.BAD_URL, "there is no port 0")
    target = _quoted(parts.path or "/", "/") + (f"?{_quoted(parts.query, '/?')}" if parts.query else "")
    return WebAddress(parts.scheme, _ascii_host(parts.hostname or ""), port or _PORTS[parts.scheme], target)


def opted_out(headers: Iterable[str], agent: str, words: Iterable[str]) -> bool:
    """Whether X-Robots-Tag headers hold one of `words` for everybody or for `agent` (lower case).

    A header is `[AGENT:] WORD, WORD …`; an agent's name governs the words that follow it.
    """
    unwanted = {word.lower() for word in words}
    for header in headers:
        for_us = True
        for part in header.lower().split(","):
            name, colon, rest = part.partition(":")
            if name.strip() in _DIRECTIVES_WITH_VALUE:
                continue
            if colon and _AGENT.fullmatch(name.strip()):
                # img2dataset's token is honoured too: sites name it, and it runs inside this program.
                for_us = name.strip() in (agent, "*", "img2dataset")
                part = rest
            if for_us and unwanted.intersection(part.split()):
                return True
    return False


def _over(guard: Guard, wait_s: float) -> bool:
    try:
        return guard.remaining_s() <= wait_s
    except Refused:
        return True


def _ascii_host(host: str) -> str:
    """Raises Refused (bad_url) where `host` is no name and no address."""
    try:
        if ":" in host:
            # An IPv6 literal; urlsplit has checked that it is one. A zone names one of our own network cards.
            if "%" in host:
                raise ValueError("an address with a zone")
            return host
        name = host if host.isascii() else host.encode("idna").decode()
    except ValueError as error:
        raise Refused(Reason.BAD_URL, f"the host: {error}") from None
    if not _HOST.fullmatch(name):
        raise Refused(Reason.BAD_URL, f"{name[:80]!r} is not a host")
    return name


def _quoted(text: str, also: str) -> str:
    """Percent-encoded where needed; what is encoded already stays, a bare % becomes %25."""
    text = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", text)
    return quote(text, safe=f"{also}%:@!$&'()*+,;=~-._", encoding="utf-8", errors="replace")


def _redirect(address: WebAddress, location: str | None) -> WebAddress:
    if not location:
        raise Refused(Reason.BAD_RESPONSE, "a redirect to nowhere")
    raw = location.encode("latin-1", "replace")  # as http.client decoded it
    with contextlib.suppress(UnicodeDecodeError):
        location = raw.decode("utf-8")
    try:
        return parse_url(urljoin(address.url, location.strip()))
    except ValueError as error:
        raise Refused(Reason.BAD_URL, f"a redirect: {error}") from None


def _check_status(status: int) -> None:
    if status in (200, 203):
        return
    if status in (404, 410):
        raise Refused(Reason.NOT_FOUND, f"status {status}")
    if status == 429 or 500 <= status < 600:
        raise Refused(Reason.SERVER_ERROR, f"status {status}", may_pass=True)
    if 400 <= status < 500:
        raise Refused(Reason.DENIED, f"status {status}")
    raise Refused(Reason.BAD_RESPONSE, f"status {status}")


def _check_type(mime: str) -> None:
    if mime in _PAGES:
        raise Refused(Reason.NOT_AN_IMAGE, f"declared as {mime}")
    if not mime.startswith("image/") and mime not in _UNDECLARED:
        raise Refused(Reason.WRONG_TYPE, f"declared as {mime[:80]}")


def _body(response: urllib3.HTTPResponse, max_bytes: int) -> bytes:
    """The body, unpacked; never more than `max_bytes` and a piece in memory."""
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise Refused(Reason.BAD_RESPONSE, f"content coding {coding[:20]!r} was not asked for")
    length = response.headers.get("Content-Length", "")
    if length.isascii() and length.isdigit() and int(length) > max_bytes:
        raise Refused(Reason.TOO_LARGE, f"declared as {int(length)} bytes, more than {max_bytes}")
    unpack = None if coding in ("", "identity") else zlib.decompressobj(wbits=47)  # 47: zlib or gzip, told by its head
    body = bytearray()
    while piece := response.read(_PIECE_BYTES, decode_content=False):
        if unpack is not None:
            try:
                piece = unpack.decompress(piece, max_bytes - len(body) + 1)
            except zlib.error as error:
                raise Refused(Reason.BAD_RESPONSE, f"not {coding}: {error}") from None
        body += piece
        if len(body) > max_bytes:
            raise Refused(Reason.TOO_LARGE, f"more than {max_bytes} bytes")
    if unpack is not None and not unpack.eof:
        raise Refused(Reason.BAD_RESPONSE, f"{coding} that breaks off")
    return bytes(body)


def _let_go(response: urllib3.HTTPResponse) -> None:
    """Give the connection back for reuse if the answer is over, or nearly; close it otherwise."""
    left = response.length_remaining
    with contextlib.suppress(Refused, HTTPError, OSError, http.client.HTTPException):
        if not response.closed and left is not None and left <= _PIECE_BYTES:
            response.read(decode_content=False)
    response.close()  # no longer has the connection, where the answer was read to its end
    response.release_conn()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """What urllib3 raises, as a refusal. Messages are its own, never a piece of a body."""
    try:
        yield
    except (PoolTimeoutError, TimeoutError):
        raise Refused(Reason.TIMED_OUT, "no answer in time", may_pass=True) from None
    except SSLError as error:
        raise Refused(Reason.TLS_FAILED, str(error)[:200]) from None
    except ProtocolError as error:
        cause = error.args[1] if len(error.args) > 1 else None
        if isinstance(cause, TimeoutError):
            raise Refused(Reason.TIMED_OUT, "no answer in time", may_pass=True) from None
        if isinstance(cause, OSError | http.client.IncompleteRead):
            raise Refused(Reason.NO_CONNECTION, "broke off before the end", may_pass=True) from None
        raise Refused(Reason.BAD_RESPONSE, f"not HTTP: {type(cause).__name__}") from None
    except OSError as error:
        raise Refused(Reason.NO_CONNECTION, f"broke off: {error.strerror}", may_pass=True) from None
    except (HTTPError, http.client.HTTPException, ValueError) as error:
        raise Refused(Reason.BAD_RESPONSE, f"not HTTP: {type(error).__name__}") from None
