"""Servers that send elsewhere, and servers that take their time."""

import contextlib
import socket
import threading
import time

import pytest

from deadbench.suite.checkpoints import http_client, http_requests
from deadbench.suite.checkpoints.http_client import is_inside
from deadbench.suite.checkpoints.http_folder import HttpFolder
from deadbench.suite.checkpoints.http_requests import Requests
from deadbench.suite.checkpoints.rate_limits import HostLimits
from deadbench.suite.errors import CheckpointError, UnreachableError

INSIDE = [
    "127.0.0.1", "127.1.2.3", "10.0.0.7", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "::1",
    "fe80::1", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "224.0.0.1",
    "0.0.0.0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_clients(monkeypatch):
    clients = []

    def client(*, public_only=False):
        clients.append(http_client._client.__wrapped__(public_only))
        return clients[-1]

    monkeypatch.setattr(http_requests, "client", client)
    monkeypatch.setattr(http_requests, "FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(http_requests, "LIMITS", HostLimits())  # a port may have been another server's
    yield
    for each in clients:
        each.close()


@pytest.fixture
def names(monkeypatch):
    """Addresses of names; every connection goes to this machine, whatever its address."""
    known, connected, resolve = {}, [], socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        found = known[host].pop(0) if len(known.get(host, ())) > 1 else known.get(host, [host])[0]
        return resolve(found, port, *args, **kwargs)

    def connect(self, host, port, *rest):
        connected.append((host, port))
        return plain(self, "127.0.0.1", port, *rest)

    plain = http_client.httpcore2.SyncBackend.connect_tcp
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(http_client.httpcore2.SyncBackend, "connect_tcp", connect)
    return known, connected


@contextlib.contextmanager
def answering(*answers):
    """A port that gives one answer a connection, the last one again and again; and what it was asked."""
    asked = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    asked.append(connection.recv(65536).decode())
                    answer = answers[min(len(asked), len(answers)) - 1]
                    if callable(answer):
                        answer(connection)
                    else:
                        connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1], asked
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def to(location):
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


FILE = b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-1/2\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


@pytest.mark.parametrize("address", INSIDE)
def test_what_is_inside(address):
    assert is_inside(address)


def test_what_is_public():
    assert not any(map(is_inside, ["1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"]))


@pytest.mark.parametrize("target", ["127.0.0.1", "169.254.169.254", "[::1]", "10.0.0.7", "internal.example"])
def test_a_public_server_sends_nobody_into_this_network(names, target):
    known, connected = names
    known.update({"public.example": ["1.1.1.1"], "internal.example": ["10.1.2.3"]})
    with answering(FILE) as (inner, asked_inside), answering(to(f"http://{target}:{inner}/secret")) as (port, _):
        folder = HttpFolder("m", f"http://public.example:{port}/m")
        with pytest.raises(CheckpointError, match=r"m: file: cannot be reached \(.* which is not a public address\)"):
            folder.size("file")
        assert asked_inside == []
        assert connected == [("public.example", port)]


def test_a_name_that_becomes_another_address_is_connected_to_as_it_was_checked(names):
    known, connected = names
    known.update({"public.example": ["1.1.1.1"], "turning.example": ["8.8.8.8", "127.0.0.1"]})
    with answering(FILE) as (second, _), answering(to(f"http://turning.example:{second}/x")) as (port, _):
        assert HttpFolder("m", f"http://public.example:{port}/m").read("file") == b"ok"
    assert connected[-1] == ("8.8.8.8", second)


def test_a_server_of_this_network_may_send_within_it():
    with answering(FILE) as (inner, _), answering(to(f"http://localhost:{inner}/file")) as (port, _):
        assert HttpFolder("m", f"http://127.0.0.1:{port}/m").read("file") == b"ok"


def test_no_credential_goes_to_another_host(names):
    names[0].update({"public.example": ["1.1.1.1"], "mirror.example": ["8.8.8.8"]})
    with answering(FILE) as (mirror, at_mirror), answering(to(f"http://mirror.example:{mirror}/x")) as (port, at_first):
        url = f"http://me:hunter2@public.example:{port}/m?sig=abcdef"
        folder = HttpFolder(url, url, Requests(url, {"authorization": "Bearer hf_secret"}))
        assert folder.read("file") == b"ok"
    assert "Authorization" in at_first[0] or "authorization" in at_first[0]
    (request,) = at_mirror
    assert not any(secret in request for secret in ("hunter2", "hf_secret", "abcdef", "uthorization"))


def test_redirects_in_circles_end():
    with answering(lambda connection: connection.sendall(to("/again"))) as (port, asked):
        with pytest.raises(CheckpointError, match="TooManyRedirects"):
            HttpFolder("m", f"http://127.0.0.1:{port}/m").size("file")
        assert len(asked) == 11


def trickled(*pieces, told=lambda: None):
    """Sends pieces one after another, slowly; `told` when all have gone."""

    def send(connection):
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.02)
        told()

    return send


@pytest.mark.parametrize(
    "pieces",
    [[bytes([byte]) for byte in FILE], [b"HTTP/1.1 102 Processing\r\n\r\n"] * 100 + [FILE]],
    ids=["a byte at a time", "102 a hundred times"],
)
def test_an_answers_head_has_its_time(pieces, monkeypatch):
    monkeypatch.setattr(http_requests, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(http_requests, "ATTEMPTS", 2)
    sent = []
    with answering(trickled(*pieces, told=lambda: sent.append(True))) as (port, asked):
        with pytest.raises(UnreachableError, match=r"m: file: cannot be reached \(.*\) in 2 attempts"):
            HttpFolder("m", f"http://127.0.0.1:{port}/m").size("file")
        assert sent == []
        assert 1 <= len(asked) <= 2


def test_an_answers_head_has_its_length(monkeypatch):
    monkeypatch.setattr(http_requests, "FIRST_WAIT_SECONDS", 0.01)

    def without_end(connection):
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(b"HTTP/1.1 102 Processing\r\n\r\n" * 1000)

    told = r"is cut off \(more than 262,144 bytes before an answer's body"
    with answering(without_end) as (port, _), pytest.raises(CheckpointError, match=told):
        HttpFolder("m", f"http://127.0.0.1:{port}/m").size("file")


def test_a_body_that_trickles_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(http_requests, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(http_requests, "ATTEMPTS", 2)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\nConnection: close\r\n\r\n"

    def slow(connection):
        connection.sendall(head)
        trickled(*[b"x"] * 400)(connection)

    whole = (
        b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-399/400\r\nContent-Length: 400\r\nConnection: close\r\n\r\n"
    )
    with answering(whole + bytes(400), slow) as (port, _):
        folder = HttpFolder("m", f"http://127.0.0.1:{port}/m")
        assert folder.size("file") == 400
        with pytest.raises(CheckpointError, match="the answer is cut off .*at least 1000 a second"):
            folder.download("file", tmp_path / "file")
