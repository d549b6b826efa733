"""A dashboard that is silent, trickles, sends elsewhere or never ends: one error, in bounded time and memory."""

import itertools
import socket
import threading

import pytest

from deadbench.runners.cluster import bounded_client
from deadbench.runners.cluster.joining import JoinError
from deadbench.runners.cluster.submitted import Jobs
from tests.piecewise import serve

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000000\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([], "no answer within|timed out"),
        (itertools.chain([HEAD], itertools.repeat(b"[")), "no answer within"),
        (itertools.chain([HEAD], itertools.repeat(b"[1]" * 10_000)), "an answer of more than 65,536 bytes"),
        ([b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\n\r\n"], "it sends to http://169.254.169.254/"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"[" * 100_000 + b"]" * 100_000], "more than 65,536"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 40000\r\n\r\n" + b"[" * 20_000 + b"]" * 20_000], "RecursionError"),
    ],
    ids=["silent", "trickles", "never ends", "sends inside", "too long", "too deep"],
)
def test_a_dashboard_that_lies_is_one_line(pieces, why, monkeypatch):
    monkeypatch.setattr(bounded_client, "_SECONDS", 0.5)
    monkeypatch.setattr(bounded_client, "_ANSWER_BYTES", 2**16)
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server, pieces, over), daemon=True).start()
        with pytest.raises(JoinError, match=why) as raised:
            Jobs(f"http://127.0.0.1:{server.getsockname()[1]}")
        over.set()
    assert len(str(raised.value)) < 300
