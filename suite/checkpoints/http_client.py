"""Connections to servers that nobody vouches for: an answer's head has its time, a redirect no way into this machine.

The address that is checked is the one that is connected to, so a name cannot become another one in between. Behind a
proxy of the environment it is the proxy that connects: there only addresses written as such are checked.
"""

import atexit
import contextlib
import functools
import ipaddress
import socket
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any

import httpcore2
import httpx2

HEAD_SECONDS = 30.0  # for an answer's status and headers, however many 1xx come before
HEAD_BYTES = 2**18  # of those, and of what comes with them
IDLE_SECONDS = 30.0  # without a byte
_CONNECTIONS = 64


class InsideError(httpx2.TransportError):
    """A public server sends to an address of this machine or of its network."""


def client(*, public_only: bool = False) -> httpx2.Client:
    """The process's client, which follows no redirects; with `public_only` it connects to public addresses alone."""
    with _MAKING:  # threads that ask at once would make one each
        return _client(public_only)


_MAKING = threading.Lock()


@functools.cache
def _client(public_only: bool) -> httpx2.Client:
    ours = {} if "all" in urllib.request.getproxies() else {"all://": _Transport(public_only)}
    made = httpx2.Client(follow_redirects=False, timeout=httpx2.Timeout(IDLE_SECONDS, pool=None), mounts=ours)
    atexit.register(made.close)  # the connections that it keeps
    return made


def is_inside(host: str) -> bool:
    """Whether a host is, or has, an address that is not public: loopback, link-local, private, reserved."""
    try:
        return any(not _is_public(address) for address in _addresses(host, 0))
    except OSError:  # which a proxy may know
        return False


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """What this thread waits for inside, it waits for no longer than `seconds` in all, nor takes above `HEAD_BYTES`."""
    _WAITING.until, _WAITING.room = time.monotonic() + seconds, HEAD_BYTES
    try:
        yield
    finally:
        _WAITING.until = None


class _Waiting(threading.local):
    until: float | None = None
    room = 0


_WAITING = _Waiting()


class _Transport(httpx2.HTTPTransport):
    """httpx2's own, over connections of ours."""

    def __init__(self, public_only: bool):
        super().__init__()  # for its TLS settings
        self._pool = httpcore2.ConnectionPool(
            ssl_context=httpx2.create_ssl_context(),
            max_connections=_CONNECTIONS,
            max_keepalive_connections=_CONNECTIONS,
            keepalive_expiry=5.0,
            network_backend=_Backend(public_only),
        )


class _Backend(httpcore2.NetworkBackend):
    def __init__(self, public_only: bool):
        self._public_only = public_only
        self._plain = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = [host]
        if self._public_only:
            try:
                addresses = _addresses(host, port)
            except OSError as error:
                raise httpcore2.ConnectError(str(error)) from error
            inside = [address for address in addresses if not _is_public(address)]
            if inside:
                raise InsideError(f"{host} is {inside[0]}, which is not a public address")
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore2.ConnectError, httpcore2.ConnectTimeout):
                return _Stream(self._plain.connect_tcp(address, port, _left(timeout), local_address, socket_options))
        return _Stream(self._plain.connect_tcp(addresses[-1], port, _left(timeout), local_address, socket_options))


def _left(timeout: float | None) -> float | None:
    """Of a wait for `timeout` seconds, as much as `within` allows."""
    if _WAITING.until is None:
        return timeout
    left = _WAITING.until - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout("no answer within the time that its head has")
    return left if timeout is None else min(timeout, left)


class _Stream(httpcore2.NetworkStream):
    """A connection that is read no longer than `within` allows, even a byte at a time."""

    def __init__(self, plain: httpcore2.NetworkStream):
        self._plain = plain

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._plain.read(max_bytes, _left(timeout))
        if _WAITING.until is not None:
            _WAITING.room -= len(data)
            if _WAITING.room < 0:
                raise httpcore2.RemoteProtocolError(f"more than {HEAD_BYTES:,} bytes before an answer's body")
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._plain.write(buffer, timeout)

    def close(self) -> None:
        self._plain.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(self._plain.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._plain.get_extra_info(info)


def _addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, each once, in the order in which they are to be tried."""
    found = socket.getaddrinfo(host, port or None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _is_public(address: str) -> bool:
    """Whether an address is anybody's to reach; one that carries another is what it carries."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        carried = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            carried = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if carried is not None:
            return _is_public(str(carried))
    return ip.is_global and not ip.is_multicast
