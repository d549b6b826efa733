"""A web server that takes its time with a result set, or with a list of sources."""

import socket
import threading

import fsspec
import pytest

from deadbench.suite import http_session
from deadbench.suite.storage import open_place
from tests.piecewise import serve

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [[], [bytes([byte]) for byte in HEAD * 9], [b"HTTP/1.1 102 Processing\r\n\r\n"] * 1000, [HEAD], [HEAD, b"x"]],
    ids=["nothing", "a byte at a time", "102 without end", "no body", "half a body"],
)
def test_a_server_that_does_not_answer_is_not_waited_for_long(pieces, monkeypatch):
    monkeypatch.setattr(http_session, "_HEAD_SECONDS", 0.3)
    monkeypatch.setattr(http_session, "_IDLE_SECONDS", 0.3)
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server, pieces, over), daemon=True)
        thread.start()
        fs, path = open_place(f"http://127.0.0.1:{server.getsockname()[1]}/sources.txt")
        fs.clear_instance_cache()
        with pytest.raises((TimeoutError, fsspec.exceptions.FSTimeoutError)):
            fs.cat_file(path)
        over.set()
        thread.join(5)
