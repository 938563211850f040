"""Connections to strangers' hosts: where they may lead, how long an answer may take, how many bytes it may have.

An address is checked where it is handed to connect(), after the host was resolved, so that no spelling of it (decimal,
octal, mapped, a name that resolves to it, a second answer of the name server) can slip past. Time and bytes are
counted at the socket, so that one byte a second, endless headers or endless chunks meet the same limits as a hang.
Built on urllib3's connections and pools; knows nothing of redirects, opt-outs or pictures. The guard of the address
being fetched travels in a context variable, since urllib3 makes and reuses connections on its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from rpl.errors import BadInput
from rpl.reasons import Reason, Refused

# A malformed header makes urllib3 log what came after it, and a full pool is no news here.
for _name in ("urllib3.connection", "urllib3.connectionpool"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_FORBIDDEN = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",
            "100.64.0.0/10",  # carrier NAT; one cloud's metadata at 100.100.100.200
            "127.0.0.0/8",
            "168.63.129.16/32",  # one cloud's host agent, though the range is public
            "169.254.0.0/16",  # link-local; most clouds' metadata
            "172.16.0.0/12",
            "192.0.0.0/24",  # protocol assignments; one cloud's metadata at 192.0.0.192
            "192.0.2.0/24",  # documentation, as 198.51.100.0/24 and 203.0.113.0/24
            "192.31.196.0/24",  # AS112, as 192.175.48.0/24
            "192.52.193.0/24",  # multicast tunnels
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",
            "192.175.48.0/24",
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, broadcast
            "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks
            "2001:db8::/32",  # documentation, as 3fff::/20
            "2002::/16",  # 6to4: holds an IPv4 address
            "2620:4f:8000::/48",  # AS112
            "3fff::/20",
        ),
    )
)
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
"""All that is assigned for the public. Mapped, NAT64, unique-local, link-local and multicast addresses lie outside."""

_PORTS = (80, 443)
_HEADER_BYTES = 256 * 1024
"""Beside the body's own bytes: status line, headers, chunk sizes."""
_LOOKUP_LIFE_S = 300.0
_POOLS = 100
"""Hosts whose idle connections are kept; the least recently used are closed."""

Lookup = Callable[..., list[tuple[Any, ...]]]
"""As socket.getaddrinfo."""


def is_forbidden(address: str) -> bool:
    """Whether an IP address is anything but a public one. Stricter than `ipaddress`'s is_global, and the same for every
    Python version.

    Raises:
        ValueError: not an IP address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and ip not in _PUBLIC_IPV6:
        return True
    return any(ip.version == network.version and ip in network for network in _FORBIDDEN)


class Dialer:
    """Opens sockets to public addresses, and to the hosts pinned in the configuration.

    Args:
        resolve: host → "address:port"; these hosts, and no others, connect there, and it may be private.

    Raises:
        BadInput: a pin is not of that form.
    """

    def __init__(self, resolve: Mapping[str, str] = {}, *, lookup: Lookup = socket.getaddrinfo) -> None:
        self._pins = {host.lower().rstrip("."): _pin(host, place) for host, place in resolve.items()}
        self._lookup = lookup
        self._known: dict[str, tuple[float, concurrent.futures.Future[list[str]]]] = {}
        self._lock = threading.Lock()

    def dial(self, host: str, port: int, guard: Guard) -> socket.socket:
        """A connected socket.

        Raises:
            Refused: private_address (any address of the host is not public), forbidden_port (another than 80, 443 and
                the pin's own), unknown_host, no_connection, timed_out.
        """
        pin = self._pins.get(host.lower().rstrip("."))
        addresses = [pin[0]] if pin else self._addresses(host, guard)
        for address in addresses:
            if pin is None and is_forbidden(address):
                raise Refused(Reason.PRIVATE_ADDRESS, f"{host} is {address}")
        if port not in _PORTS and (pin is None or port != pin[1]):
            raise Refused(Reason.FORBIDDEN_PORT, f"{host}: port {port}")
        if pin is not None:
            return _connect(*pin, guard.remaining_s())
        for number, address in enumerate(addresses):
            try:
                # The last address may take all the time that is left, one before it a share.
                return _connect(address, port, guard.remaining_s() / (len(addresses) - number))
            except Refused:
                if number == len(addresses) - 1:
                    raise
        raise Refused(Reason.UNKNOWN_HOST, f"{host} has no address")

    def _addresses(self, host: str, guard: Guard) -> list[str]:
        """What the name server says. Asked at most every five minutes, and in a thread: the call knows no time-out."""
        with self._lock:
            expires, answer = self._known.get(host, (0.0, None))
            if answer is None or expires < time.monotonic():
                answer = concurrent.futures.Future()
                self._known[host] = (time.monotonic() + _LOOKUP_LIFE_S, answer)
                threading.Thread(target=self._ask, args=(host, answer), daemon=True).start()
        try:
            return answer.result(guard.remaining_s())
        except concurrent.futures.TimeoutError:
            raise Refused(Reason.TIMED_OUT, f"the name server did not answer for {host}") from None
        except socket.gaierror as error:
            again = error.errno == socket.EAI_AGAIN
            if again:
                with self._lock:
                    self._known.pop(host, None)
            raise Refused(Reason.UNKNOWN_HOST, f"{host}: {error.strerror}", may_pass=again) from None
        except (OSError, ValueError) as error:
            raise Refused(Reason.UNKNOWN_HOST, f"{host}: {error}") from None

    def _ask(self, host: str, answer: concurrent.futures.Future[list[str]]) -> None:
        try:
            found = self._lookup(host, 0, type=socket.SOCK_STREAM)
            answer.set_result(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except Exception as error:  # whatever it is, the threads that wait have to hear of it
            answer.set_exception(error)


class Guard:
    """The limits of one address being fetched: time over all its tries and redirects, bytes of one answer."""

    def __init__(self, dialer: Dialer, timeout_s: float, max_bytes: int) -> None:
        self.dialer = dialer
        self._max_bytes = max_bytes
        self._bytes_left = 0
        self._deadline = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """Seconds left, above 0.

        Raises:
            Refused: timed_out.
        """
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise Refused(Reason.TIMED_OUT, "the time for this address is over")
        return remaining

    def new_answer(self) -> None:
        self._bytes_left = self._max_bytes + _HEADER_BYTES

    def spend(self, received: int) -> None:
        """Raises Refused (too_large) where an answer, with its headers, is larger than allowed."""
        self._bytes_left -= received
        if self._bytes_left < 0:
            raise Refused(Reason.TOO_LARGE, f"the answer has more than {self._max_bytes} bytes")

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Connections of this thread obey this guard."""
        token = _GUARD.set(self)
        try:
            yield
        finally:
            _GUARD.reset(token)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that passes inside, waiting for our own politeness, is not the server's."""
        started = time.monotonic()
        yield
        self._deadline += time.monotonic() - started


_GUARD: ContextVar[Guard] = ContextVar("guard")


class HostSlots:
    """At most `per_host` answers under way from one host."""

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._slots: dict[str, threading.BoundedSemaphore] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def taken(self, host: str, guard: Guard) -> Iterator[None]:
        with self._lock:
            slot = self._slots.setdefault(host, threading.BoundedSemaphore(self._per_host))
        with guard.paused():
            slot.acquire()
        try:
            yield
        finally:
            slot.release()


def connection_pools(per_host: int) -> urllib3.PoolManager:
    """Pools of guarded connections. No proxy is ever used; one TLS context serves all (making one costs 29 ms)."""
    context = ssl.create_default_context()
    context.sslsocket_class = _GuardedTLSSocket
    manager = urllib3.PoolManager(num_pools=_POOLS, maxsize=per_host, ssl_context=context, retries=False)
    manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
    return manager


class _GuardedReads:
    """Counts time and bytes where http.client reads: each of its reads ends in recv_into."""

    __slots__ = ()

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        guard = _GUARD.get()
        self.settimeout(guard.remaining_s())  # type: ignore[attr-defined]
        received: int = super().recv_into(*args, **kwargs)  # type: ignore[misc]
        guard.spend(received)
        return received


class _GuardedSocket(_GuardedReads, socket.socket):
    pass


class _GuardedTLSSocket(_GuardedReads, ssl.SSLSocket):
    pass


class _HTTPConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        guard = _GUARD.get()
        return guard.dialer.dial(self._dns_host, self.port, guard)


class _HTTPSConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        guard = _GUARD.get()
        return guard.dialer.dial(self._dns_host, self.port, guard)


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


def _connect(address: str, port: int, timeout_s: float) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = _GuardedSocket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((address, port))
    except TimeoutError:
        sock.close()
        raise Refused(Reason.TIMED_OUT, f"{address} did not answer", may_pass=True) from None
    except OSError as error:
        sock.close()
        reset = isinstance(error, ConnectionResetError | ConnectionAbortedError)
        raise Refused(Reason.NO_CONNECTION, f"{address}: {error.strerror}", may_pass=reset) from None
    except BaseException:
        sock.close()
        raise
    return sock


def _pin(host: str, place: str) -> tuple[str, int]:
    address, _, port = place.rpartition(":")
    try:
        ip = ipaddress.ip_address(address.strip("[]"))
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError("no port")
    except ValueError:
        raise BadInput(
            f"the configuration's runtime.resolve: {host}: {place!r} is not ADDRESS:PORT; write it as 127.0.0.1:8000."
        ) from None
    return str(ip), int(port)
