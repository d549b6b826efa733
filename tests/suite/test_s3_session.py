"""An S3 endpoint that is silent, trickles, fails for ever or never ends: one error after a few attempts."""

import itertools
import socket
import threading

import fsspec
import pytest

from deadbench.suite import http_session, s3_session
from deadbench.suite.patience import Patience
from deadbench.suite.storage import open_place, refusal

pytest.importorskip("s3fs")
HEAD = b'HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nETag: "a"\r\n\r\n'
FILE = HEAD.replace(b"\r\n\r\n", b"\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n\r\n") % 50
PAGE = (
    b"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>%d</NextContinuationToken><KeyCount>1"
    b"</KeyCount><Contents><Key>run/%d</Key><Size>5</Size></Contents></ListBucketResult>"
)


def failing(status):
    body = b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"
    return [b"HTTP/1.1 %d Later\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)]


@pytest.fixture
def endpoint(monkeypatch):
    """What answers each request, by its number, with pieces; how many came is counted."""
    monkeypatch.setattr(s3_session, "PATIENCE", Patience(0.5, 0.5, 1.0, 0.01, None))
    monkeypatch.setattr(s3_session, "_LEAST_SECONDS", 0.05)
    monkeypatch.setattr(s3_session, "_FAILED", {})
    monkeypatch.setattr(s3_session, "_MOST_PAGES", 5)
    monkeypatch.setattr(s3_session, "_ANSWER_BYTES", 2**16)
    monkeypatch.setattr(http_session, "_IDLE_SECONDS", 0.3)
    monkeypatch.setattr(http_session, "_LOOK_SECONDS", 0.1)
    over, asked = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        answers = {}
        for name in ("KEY_ID", "KEY"):
            monkeypatch.setenv(f"AWS_{'ACCESS' if name == 'KEY_ID' else 'SECRET_ACCESS'}_{name}", "x")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        threading.Thread(target=_accept, args=(server, answers, asked, over), daemon=True).start()
        _clear()
        yield answers, asked
        over.set()
    _clear()


def _clear():
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def _accept(server, answers, asked, over):
    while not over.is_set():
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(connection, answers, asked, over), daemon=True).start()


def _serve(connection, answers, asked, over):
    with connection:
        try:
            while request := connection.recv(65536):
                asked.append(request.split()[0])
                for piece in answers[asked[-1]](len(asked)):
                    connection.sendall(piece)
                    if piece is answers.get("slowly") and over.wait(0.02):
                        return
                if not answers.get("goes on"):
                    over.wait()
        except OSError:
            pass


@pytest.mark.parametrize(
    ("head", "get"),
    [
        ([], []),
        ([b"H"], [b"H"]),
        ([FILE], []),
        ([FILE], [HEAD % 10**6]),
        ([FILE], itertools.chain([HEAD % 10**6], itertools.repeat(b"<"))),
    ],
    ids=["silent", "begins a head", "silent of its bytes", "a head alone", "trickles"],
)
def test_silence_is_waited_for_once(endpoint, head, get):
    answers, asked = endpoint
    answers |= {b"HEAD": lambda _: head, b"GET": lambda _: get, "slowly": b"<"}
    fs, path = open_place("s3://bucket/run")
    with pytest.raises((ValueError, OSError)) as raised:
        fs.cat_file(path)
    assert len(asked) <= 3
    assert len(refusal(raised.value)) < 200


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_failing_server_is_asked_a_few_times(endpoint, status):
    answers, asked = endpoint
    answers |= {b"GET": lambda _: failing(status), "goes on": True}
    fs, path = open_place("s3://bucket/run")
    with pytest.raises((ValueError, OSError)) as raised:
        fs.ls(path)
    assert len(asked) < 10
    assert "cannot be reached" in refusal(raised.value) or f"HTTP {status}" in refusal(raised.value)


def test_a_listing_without_end(endpoint):
    answers, asked = endpoint
    answers |= {b"GET": lambda n: [(HEAD % len(PAGE % (n, n))) + PAGE % (n, n)], "goes on": True}
    fs, path = open_place("s3://bucket/run")
    with pytest.raises(ValueError, match="a listing of more than 5 pages"):
        fs.ls(path)
    assert len(asked) == 6


def test_an_answer_without_end(endpoint):
    answers, _ = endpoint
    answers |= {b"GET": lambda _: itertools.chain([HEAD % 10**12], itertools.repeat(b"<a></a>" * 1000))}
    fs, path = open_place("s3://bucket/run")
    with pytest.raises(ValueError, match="more than 65,536 bytes"):
        fs.ls(path)


def test_a_pause_is_charged_and_another_request_much_later_is_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(s3_session.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(s3_session, "PATIENCE", Patience(15.0, 15.0, 120.0, 0.5, None))
    monkeypatch.setattr(s3_session, "_FAILED", {})
    for gap, left in ((4.0, 10.0), (30.0, 9.0)):
        s3_session._failed("host", now[0] - 1.0, "HTTP 503")
        now[0] += gap
        s3_session._count_pause("host")
        assert s3_session.PATIENCE.left("host") == pytest.approx(left)
        now[0] += 1.0


def test_fsspecs_own_configuration_stays(monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 77}})
    assert s3_session.s3_options()["config_kwargs"]["read_timeout"] == 77
    assert s3_session.s3_options()["config_kwargs"]["connect_timeout"] == 15
