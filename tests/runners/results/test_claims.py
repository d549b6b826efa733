"""Claims without Ray and without waiting: of several one succeeds, a dead owner's lapse, nobody's clock is believed."""

import json
import threading

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from deadbench.runners.results import claims, signs_of_life
from deadbench.runners.results.claims import Claims
from deadbench.runners.results.store import ResultStore
from tests.suite.checkpoints.servers import s3_server

LEASE = 60.0


class Clock:
    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def s3():
    boto3 = pytest.importorskip("boto3", reason="S3 tests need the dev extra")
    with s3_server():
        boto3.client("s3").create_bucket(Bucket="claims")
        yield "s3://claims"


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path):
    """A result set; another one for each test."""
    if request.param == "s3":
        return ResultStore(f"{request.getfixturevalue('s3')}/{tmp_path.name}")
    return ResultStore(str(tmp_path / "out") if request.param == "local" else f"memory://{tmp_path.name}")


@pytest.fixture
def driver(store, monkeypatch):
    """`driver(name, clock)`: one whose machine is its own, so that its death is seen by the lease alone."""
    facts = {"machine": None}
    monkeypatch.setattr(claims, "own_facts", lambda: facts)

    def make(name, clock=None):
        made = Claims(store, name, LEASE, clock or Clock(0.0))
        made.begin()
        return made

    make.facts = facts
    return make


def left(store):
    fs, root = store.place()
    return sorted(path.rsplit("/", 1)[-1] for path in fs.find(f"{root}/_claims"))


def take(driver, *names):
    driver.look()
    return driver.take(names)


def test_what_one_has_another_takes_not_and_nothing_is_left_behind(driver, store):
    a, b = driver("a"), driver("b")
    assert take(a, "x", "y") == {"x", "y"}
    assert take(b, "x", "y", "z") == {"z"}
    assert (b.holder("x"), b.others, a.company, b.company) == ("a", ["a"], {"b"}, {"a"})
    assert take(a, "x", "y", "z") == {"x", "y"}, "its own once more"
    assert a.others == ["b"]
    a.give_back(["x"])
    assert take(b, "x", "y", "z") == {"x", "z"}
    assert left(store) == ["a.beat", "b.beat", "x.1", "y.1", "z.1"]
    a.end()
    assert left(store) == ["b.beat", "x.1", "z.1"]
    b.end()
    assert left(store) == []


def test_of_several_at_once_one_has_it(driver):
    drivers = [driver(name) for name in "abcd"]
    for each in drivers:
        each.look()  # all see it free
    won = [each.take(["x"]) for each in drivers]
    assert sorted(map(len, won)) == [0, 0, 0, 1]


def test_who_stands_still_while_it_looks_at_its_claim_looks_again(driver, monkeypatch):
    here, there = Clock(0.0), Clock(0.0)
    a, b = driver("a", here), driver("b", there)
    a.look()
    a.take(["x"])
    b.look()
    content, seen = a._content, []

    def stands_still(name):
        found = content(name)
        if not seen:  # it has found no successor
            here.now += LEASE + 1
            there.now += LEASE + 1
            b.look()
            assert b.take(["x"]) == {"x"}
        seen.append(name)
        return found

    monkeypatch.setattr(a, "_content", stands_still)
    assert not a.holds("x")
    assert b.holds("x")


def test_a_silent_owners_claims_lapse_by_the_clock_of_who_looks(driver, store):
    here, there = Clock(1e6), Clock(-5.0)  # two machines whose clocks have nothing to do with each other
    a, b, c = driver("a", there), driver("b", here), driver("c", here)
    assert take(a, "x") == {"x"}
    assert take(b, "x") == take(c, "x") == set()
    for _ in range(5):
        here.now += 0.9 * LEASE
        a.beat()
        assert take(b, "x") == set(), "it lives"
    here.now += 1.1 * LEASE
    c.beat()
    c.look()
    assert take(b, "x") == {"x"}
    assert c.take(["x"]) == set(), "both saw it lapse, and one was first"
    assert not a.holds("x")
    assert b.holds("x")
    assert left(store)[3:] == ["x.1", "x.2"]
    b.give_back(["x"])
    assert left(store) == ["a.beat", "b.beat", "c.beat"]
    a.give_back(["x"])
    b.end()
    assert left(store) == ["c.beat"], "of a, which b saw dead, nothing is left either"


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_who_died_between_storing_and_letting_go_leaves_nothing_either(driver, store):
    clock = Clock(0.0)
    a, b, c = driver("a"), driver("b", clock), driver("c")
    take(a, "read", "unread")
    take(c, "read of one that lives")
    b.look()
    clock.now += LEASE + 1
    c.beat()
    b.end({"read", "read of one that lives"})
    assert left(store) == ["a.beat", "c.beat", "read of one that lives.1", "unread.1"], "others may take it"
    clock.now += LEASE + 1
    d = driver("d", clock)
    clock.now += LEASE + 1
    c.beat()
    d.end({"unread"})
    assert left(store) == ["c.beat", "read of one that lives.1"]


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_who_stood_still_and_was_succeeded_by_one_that_has_ended_finds_that(driver):
    clock = Clock(0.0)
    a, b = driver("a"), driver("b", clock)
    take(a, "x")
    take(b, "x")
    clock.now += LEASE + 1
    assert take(b, "x") == {"x"}
    b.end()
    assert not a.holds("x")


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_claim_that_was_cut_off_while_it_was_made_lapses_too(driver, store):
    clock = Clock(0.0)
    b = driver("b", clock)
    fs, root = store.place()
    fs.pipe_file(f"{root}/_claims/x.1", b"")
    assert take(b, "x") == set()
    clock.now += LEASE + 1
    assert take(b, "x") == {"x"}


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_who_comes_later_learns_of_those_that_have_gone(driver):
    a, b = driver("a"), driver("b")
    a.end()
    c = driver("c")
    assert c.company == {"a", "b"}
    b.end()
    assert driver("d").company == {"a", "b", "c"}


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_dead_process_of_this_machine_is_seen_at_once(driver, monkeypatch):
    a, b = driver("a"), driver("b")
    take(a, "x")
    driver.facts |= signs_of_life.own_facts()
    a.beat()
    assert take(b, "x") == set(), "this process lives"
    driver.facts["born"] -= 1.0
    a.beat()
    assert take(b, "x") == {"x"}, "another had its number"
    driver.facts["machine"] = "elsewhere"
    take(b, "y")
    b.beat()
    assert take(driver("c"), "y") == set(), "of another machine nobody knows"


@pytest.mark.parametrize("store", ["local"], indirect=True)
@pytest.mark.parametrize("sign", [b"", b"[", b"[1]", b'{"company": 7, "pid": "x"}', b"\xff", b"[" * 5000])
def test_signs_of_life_that_are_none_are_only_signs(driver, store, sign):
    b = driver("b")
    fs, root = store.place()
    fs.pipe_file(f"{root}/_claims/x.1", b"a")
    fs.pipe_file(f"{root}/_claims/a.beat", sign)
    assert take(b, "x") == set()
    assert b.describe("a") == "run a"


def overwriting(self, path, value, mode="overwrite"):
    self.open(path, mode="wb", data=value)


def refusing(self, path, value, mode="overwrite"):
    if mode == "create":
        raise NotImplementedError(mode)
    self.open(path, mode="wb", data=value)


@pytest.mark.parametrize("pipe_file", [overwriting, refusing])
def test_where_exclusive_creation_does_not_hold_nothing_is_claimed(pipe_file, monkeypatch, tmp_path):
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    store = ResultStore(f"memory://{tmp_path.name}")
    a = Claims(store, "a")
    a.begin()
    a.look()
    assert (a.works, a.take(["x"]), a.holds("x"), a.holds("y")) == (False, {"x"}, True, False)
    a.end()
    assert left(store) == []


def test_signs_of_life_are_given_until_the_end(tmp_path):
    a = Claims(ResultStore(str(tmp_path)), "a")
    a.begin()
    path, seen = tmp_path / "_claims" / "a.beat", threading.Event()
    write = a.beat
    a.beat = lambda: (write(), seen.set())
    thread = a.beat_on(0.01)
    assert seen.wait(20)
    assert json.loads(path.read_text())["beat"] >= 2
    a.end()
    thread.join(20)
    assert not thread.is_alive()
    assert list(tmp_path.iterdir()) == []
