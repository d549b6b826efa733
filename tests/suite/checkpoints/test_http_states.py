"""A server that limits, fails, cuts off, stalls and sends elsewhere, in any order: the right bytes, or one clear line.

The server is a function in this process, and time passes only in sleep.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from deadbench.runners.census import worker
from deadbench.suite import patience
from deadbench.suite.checkpoints import http_requests, rate_limits
from deadbench.suite.checkpoints.http_folder import HttpFolder
from deadbench.suite.errors import CheckpointError, UnreachableError
from deadbench.suite.patience import Patience

SECRETS = ("hunter2", "abcdef")
PASSING = [
    "503", "429 0", "429 7", "reset", "timeout", "refused", "cut off", "stalled", "dripping", "elsewhere",
    "no ranges",
]  # fmt: skip
LASTING = ["401", "403", "400", "404", "429 900", "other range", "no length", "in circles"]
MOST = http_requests.ATTEMPTS + 4  # requests for one thing, as often as a limit and a broken answer are forgiven


class Body(httpx2.SyncByteStream):
    """The bytes that a server sends, in pieces; what happens between them is `between`."""

    def __init__(self, data, between=lambda: None):
        self.data, self.between = data, between

    def __iter__(self):
        for start in range(0, len(self.data), 4096):
            yield self.data[start : start + 4096]
            self.between()


class Server:
    """Serves one file; `faults` are what becomes of the next requests."""

    def __init__(self, clock):
        self.clock, self.data = clock, b""
        self.faults, self.requests, self.sent_elsewhere = [], 0, 0

    def __call__(self, request):
        self.requests += 1
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "in circles":
            self.faults.insert(0, fault)
        if fault in ("elsewhere", "in circles"):
            self.sent_elsewhere += 1
            return httpx2.Response(302, headers={"Location": f"http://mirror{self.sent_elsewhere}/file"})
        if fault.isdigit():
            return httpx2.Response(int(fault))
        if fault.startswith("429"):
            return httpx2.Response(429, headers={"Retry-After": fault.partition(" ")[2]})
        if fault in ("timeout", "refused"):
            self.clock.sleep(min(request.extensions["timeout"]["read"], 30.0))
        if fault in ("reset", "timeout", "refused"):
            kind = {"reset": httpx2.ReadError, "timeout": httpx2.ReadTimeout, "refused": httpx2.ConnectTimeout}[fault]
            raise kind("no answer\nsecond line")
        start, _, end = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(start), min(int(end) + 1 if end else len(self.data), len(self.data))
        if start >= len(self.data) and "Range" in request.headers:
            return httpx2.Response(416, headers={"Content-Range": f"bytes */{len(self.data)}"})
        if fault == "no length":
            return httpx2.Response(200, stream=Body(self.data))
        if fault == "no ranges":
            told = {"Content-Length": str(len(self.data)), "ETag": '"e"'}
            return httpx2.Response(200, headers=told, stream=Body(self.data))
        data, shift = self.data[start:end], 8 if fault == "other range" else 0
        headers = {"Content-Length": str(len(data)), "ETag": '"e"'}
        status = 206 if "Range" in request.headers else 200
        if status == 206:
            headers["Content-Range"] = f"bytes {start + shift}-{end + shift - 1}/{len(self.data)}"
        body = Body(data[: len(data) // 2] if fault == "cut off" else data)
        if fault == "stalled":
            body.between = lambda: self.stall(request)
        if fault == "dripping":
            body.between = lambda: self.clock.sleep(200.0)
        return httpx2.Response(status, headers=headers, stream=body)

    def stall(self, request):
        self.clock.sleep(request.extensions["timeout"]["read"])
        raise httpx2.ReadTimeout("so long without a byte")


class Client(RuleBasedStateMachine):
    """Reads and downloads of a file whose server does what it likes."""

    def __init__(self, world):
        super().__init__()
        self.server, self.clock = world
        self.server.faults = []
        self.place = tempfile.TemporaryDirectory()

    @initialize(size=st.sampled_from([0, 1, 700, 16_384, 16_385, 50_000]))
    def serve(self, size):
        self.server.data = bytes(n * 31 % 251 for n in range(size))
        self.server.requests = self.server.sent_elsewhere = 0
        self.folder = HttpFolder("http://me:hunter2@host/m?sig=abcdef", "http://me:hunter2@host/m?sig=abcdef")
        self.target = Path(self.place.name) / f"file{size}"
        self.target.unlink(missing_ok=True)

    def asked(self, work, requests=1):
        """What `work` gives, or the kind of its error; in a bounded number of requests, and in one line."""
        server = self.server
        before, began = server.requests - server.sent_elsewhere, self.clock.now
        text = ""
        try:
            return work()
        except FileNotFoundError as error:
            text, kind = str(error), FileNotFoundError
            assert "404" in text
        except CheckpointError as error:
            text, kind = str(error), type(error)
        finally:
            assert server.requests - server.sent_elsewhere - before <= MOST * requests
            assert server.sent_elsewhere <= 21 * MOST * server.requests
            assert self.clock.now - began <= requests * (4 * 30 * 1.1 + 16 * 200 + 60)
        assert "\n" not in text
        assert text.startswith("http://host/m: file: ")
        assert not any(secret in text for secret in SECRETS)
        return kind

    @rule(faults=st.lists(st.sampled_from(PASSING), max_size=3))
    def misbehave(self, faults):
        self.server.faults += faults

    @rule(fault=st.sampled_from([*LASTING, *PASSING]), count=st.sampled_from([1, 5, 20]))
    def misbehave_long(self, fault, count):
        self.server.faults += [fault] * count

    @rule()
    def behave(self):
        self.server.faults.clear()

    @rule(start=st.integers(0, 50_100), length=st.integers(1, 40_000), whole=st.booleans())
    def read(self, start, length, whole):
        start = min(start, len(self.server.data))
        end = None if whole else start + length
        got = self.asked(lambda: self.folder.read("file", start, end), requests=2)
        assert got in (CheckpointError, UnreachableError, FileNotFoundError) or got == self.server.data[start:end]

    @rule()
    def size(self):
        got = self.asked(lambda: self.folder.size("file"))
        assert got in (CheckpointError, UnreachableError, FileNotFoundError, len(self.server.data))

    @rule()
    def download(self):
        got = self.asked(lambda: self.folder.download("file", self.target))
        there = self.target.read_bytes() if self.target.exists() else b""
        if got is None:
            assert there == self.server.data
        assert self.server.data.startswith(there), "what is there is the beginning of the file"

    @rule()
    def mend_and_finish(self):
        self.server.faults.clear()
        self.clock.sleep(1000.0)
        assert self.folder.read("file") == self.server.data
        self.folder.download("file", self.target)
        assert self.target.read_bytes() == self.server.data

    def teardown(self):
        self.place.cleanup()


@pytest.fixture
def world(monkeypatch):
    return make_world(monkeypatch)


def make_world(monkeypatch):
    """A server, and the clock of what asks it."""
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    server = Server(clock)
    client = httpx2.Client(transport=httpx2.MockTransport(server))
    for module in (http_requests, rate_limits, patience):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(http_requests, "LIMITS", rate_limits.HostLimits())
    monkeypatch.setattr(http_requests, "client", lambda public_only=False: client)
    monkeypatch.setattr(http_requests, "is_inside", lambda host: False)
    return server, clock


def test_the_right_bytes_or_one_line_whatever_the_server_does(world):
    run_state_machine_as_test(
        lambda: Client(world), settings=settings(max_examples=60, stateful_step_count=20, deadline=None)
    )


@pytest.mark.parametrize("named", [0, 7, 899])
def test_a_census_asks_a_limiting_server_seldom_and_not_for_days(world, named):
    server, clock = world
    limits = http_requests.LIMITS
    limits.longest_wait, limits.attempts, limits.told = 900.0, 1000, Patience(7200.0, 7200.0, 7200.0, 2.0, None)
    server.data, server.faults = b"x", [f"429 {named}"] * 2000
    with pytest.raises(CheckpointError, match="limits requests"):
        HttpFolder("http://host/m", "http://host/m").size("file")
    assert 7200 / 2 < clock.now <= 7200 * 1.1
    assert server.requests <= 260


def test_all_requests_together_wait_so_long_for_a_host_that_answers_none(world):
    server, clock = world
    limits = http_requests.LIMITS
    limits.longest_wait, limits.attempts, limits.told = 900.0, 1000, Patience(7200.0, 7200.0, 7200.0, 2.0, None)
    server.data, server.faults = b"x", ["429 899"] * 2000
    for _ in range(100):
        with pytest.raises(CheckpointError, match="limits requests"):
            HttpFolder("http://host/m", "http://host/m").size("file")
    assert clock.now <= (7200 + 900) * 1.1  # who waits together does not ask in the same instant
    assert server.requests <= 120
    server.faults = []
    for _ in range(500):
        HttpFolder("http://host/m", "http://host/m").size("file")
    server.faults, before = ["429 7"], clock.now
    assert HttpFolder("http://host/m", "http://host/m").size("file") == 1, "who answers is waited for again"
    assert clock.now > before


@given(st.lists(st.sampled_from(["429 0", "429 1", "429 899", "503", ""]), max_size=40))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_whatever_a_host_says_of_its_limits_the_wait_has_an_end(faults):
    with pytest.MonkeyPatch.context() as patch:
        _, clock = make_world(patch)
        limits = http_requests.LIMITS
        limits.told = Patience(500.0, 1000.0, 1000.0, 2.0, None)
        answers = 0
        for fault in faults * 20:
            _, _, named = fault.partition(" ")
            if not fault:
                limits.told.answered("host")
                answers += 1
            elif named and limits.allow("host", [], float(named)):
                limits.pause("host", float(named))
                limits.wait("host")
        assert clock.now <= (1000.0 + 2 * answers) * 1.1


VAIN = ["503", "429 0", "429 5", "429 14", "429 900", "reset", "timeout", "refused", "cut off", "stalled", "dripping"]


@given(faults=st.lists(st.sampled_from(VAIN), min_size=1, max_size=6), files=st.integers(1, 20))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_server_that_gives_nothing_costs_one_wait_whatever_it_does_and_is_asked(faults, files):
    with pytest.MonkeyPatch.context() as patch:
        server, clock = make_world(patch)
        server.data = bytes(9000)  # three pieces
        server.faults = faults * 200
        for number in range(files):
            folder = HttpFolder("http://host/m", "http://host/m")
            with pytest.raises(CheckpointError) as error:
                folder.size(f"file{number}")
            assert str(error.value).startswith(f"http://host/m: file{number}: ")
        dripped = 200.0 * ("dripping" in faults)  # until a second piece came
        assert clock.now <= 15.0 * 1.1 + dripped
        clock.sleep(100.0)
        server.faults = []
        assert HttpFolder("http://host/m", "http://host/m").size("file") == 9000, "it is not held against it for ever"


def test_a_server_that_gives_is_waited_for_longer(world):
    server, clock = world
    server.data = bytes(40_000_000)
    folder = HttpFolder("http://host/m", "http://host/m")
    assert len(folder.read("file")) == 40_000_000
    server.faults, before = ["timeout"], clock.now
    assert folder.read("file", 20_000, 20_100) == bytes(100)
    assert clock.now - before > 20.0


@pytest.mark.parametrize("answers", [1, 3])
@pytest.mark.parametrize("faults", [["429 30"], ["429 30"] * 3, ["503", "503"], ["429 7"] * 3])
@pytest.mark.parametrize("later", [0.0, 3600.0, 86_400.0])
def test_one_that_has_answered_a_few_times_is_waited_for_at_its_word(world, answers, faults, later):
    server, clock = world
    server.data = bytes(9000)
    for _ in range(3):  # of the polls of a process that lives for days
        server.faults = []
        for number in range(answers):
            HttpFolder("http://host/m", "http://host/m").size(f"file{number}")
        clock.sleep(later)
        server.faults = list(faults)
        assert HttpFolder("http://host/m", "http://host/m").size("file") == 9000
        clock.sleep(max(later, 100.0))


def test_one_that_is_silent_after_its_first_answer_costs_one_wait(world):
    """It may be all that it ever gives; what has given more is asked again."""
    server, clock = world
    server.data = bytes(9000)
    HttpFolder("http://host/m", "http://host/m").size("first")
    server.faults, before = ["timeout"] * 200, clock.now
    for number in range(5):
        with pytest.raises(CheckpointError):
            HttpFolder("http://host/m", "http://host/m").size(f"file{number}")
    assert clock.now - before <= 16.0


@pytest.mark.parametrize("seconds", [1.0, 7.0, 13.0])
def test_those_who_are_told_to_wait_at_the_same_time_all_wait(world, seconds):
    _, clock = world
    limits = http_requests.LIMITS
    for _ in range(8):
        assert limits.allow("host", [], seconds), "they wait for the same"
        limits.pause("host", seconds)
        clock.sleep(0.01)
    assert limits.told.left("host") == pytest.approx(15.0 - seconds - 0.07)
    assert not limits.allow("host", [], 16.0)


def test_a_census_of_many_workers_waits_for_the_hub_for_days(world):
    """Of the Hub's 500 answers in five minutes each of a hundred workers has five."""
    _, clock = world
    limits = http_requests.LIMITS
    limits.longest_wait, limits.attempts = worker._LONGEST_WAIT_SECONDS, worker._REFUSALS
    limits.told = Patience(900.0, worker._WAITED_SECONDS, worker._WAITED_SECONDS, worker._EARNED_SECONDS, None)
    for _ in range(3 * 288):
        for _ in range(5):
            limits.told.answered("host")
        assert limits.allow("host", [], 299.0)
        limits.pause("host", 299.0)
        clock.sleep(300.0)


@given(
    told=st.lists(
        st.sampled_from(
            [
                "Mon,",
                "01",
                "99999999999",
                "-1",
                "Jan",
                "24:00:00",
                "GMT",
                "+9999",
                "-2359",
                "AD",
                "9" * 5000,
                "NaN",
                "\u0663",
            ]
        ),
        max_size=7,
    ),
    header=st.sampled_from(["Retry-After", "RateLimit"]),
)
@settings(max_examples=300, derandomize=True, deadline=None)
@example(told=["+9999", "Dec", "24:00:00", "99999999999", "AD"], header="Retry-After")
@example(told=["9" * 400], header="RateLimit")
def test_what_a_server_says_of_its_limits_is_a_time_or_nothing(told, header):
    words = ("" if header == "Retry-After" else '"api";r=0;t=') + " ".join(told)
    seconds = rate_limits.named_wait({header: words})
    assert seconds is None or 0 <= seconds < 1e18
