"""Whether the Hub answers: what any answer, none, a slow one and a refusal come to."""

import http.server
import socket
import threading

import pytest
from huggingface_hub import constants

from deadbench.runners.doctor import hub_check, one_process
from deadbench.runners.doctor.hub_check import hub
from deadbench.runners.doctor.lines import line_of


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_check, "_SECONDS", 0.5)


@pytest.fixture
def answering(online, monkeypatch):
    """`answering(status)`: a Hub that gives that, at an address with a password."""
    servers = []

    def make(status):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://me:hunter2@127.0.0.1:{server.server_port}/mirror")

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [200, 302, 401, 404])
def test_any_answer_is_one(answering, status):
    answering(status)
    line = line_of("n1", "hub", hub)
    assert (line.verdict, line.told.endswith("/mirror answers")) == ("ok", True)
    assert "hunter2" not in line.told


@pytest.mark.parametrize("status", [407, 500, 503])
def test_a_server_that_cannot_is_told(answering, status):
    answering(status)
    line = line_of("n1", "hub", hub)
    assert line.verdict == "skipped"
    assert f"/mirror answers with {status}; only local and cached" in line.told
    assert "hunter2" not in line.told


def test_nobody_at_that_address_is_told(online, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://me:hunter2@127.0.0.1:{free.getsockname()[1]}")
        line = line_of("n1", "hub", hub)
    assert line.verdict == "skipped"
    assert "does not answer (" in line.told
    assert "hunter2" not in line.told
    assert "\n" not in line.told


@pytest.mark.parametrize("silent", ["server", "resolver"])
def test_silence_ends_in_time(online, monkeypatch, silent):
    held = threading.Event()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        if silent == "resolver":
            monkeypatch.setattr(hub_check, "_ask", lambda url, said: held.wait(30))
        line = line_of("n1", "hub", hub)
        held.set()
    assert line.verdict == "skipped"
    assert "does not answer" in line.told


def test_it_is_one_of_the_doctors_lines():
    assert one_process.READ_CHECKS["hub"] is hub


def test_where_the_hub_is_not_wanted_nobody_asks_it(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_check, "_ask", lambda *_: pytest.fail("asked"))
    line = line_of("n1", "hub", hub)
    assert (line.verdict, line.told.startswith("HF_HUB_OFFLINE is set: ")) == ("skipped", True)
