"""Claims where the place does not answer: what was asked was done or not; nothing is claimed for ever, or never."""

import contextlib
import itertools
import uuid
from types import SimpleNamespace

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.runners.results import exclusive
from deadbench.runners.results.claims import Claims

NAMES = ("x", "y", "z")


class Unanswering(MemoryFileSystem):
    """Each request is done and answered, refused, or done without an answer, as `fates` says; then all is well."""

    cachable = False

    def __init__(self):
        super().__init__()
        self.fates = iter(())

    def _asked(self, do):
        fate = next(self.fates, "answered")
        if fate == "refused":
            raise OSError("slow down")
        done = do()
        if fate == "unanswered":
            raise OSError("connection reset")
        return done

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        return self._asked(lambda: super(Unanswering, self).pipe_file(path, value, mode=mode))

    def rm_file(self, path):
        return self._asked(lambda: super(Unanswering, self).rm_file(path))

    def cat_file(self, path, **kwargs):
        return self._asked(lambda: super(Unanswering, self).cat_file(path, **kwargs))


def two_drivers():
    fs = Unanswering()
    root = f"/{uuid.uuid4().hex}"
    store = SimpleNamespace(place=lambda: (fs, root))
    drivers = [Claims(store, name, clock=lambda: 0.0) for name in "ab"]  # no time passes: nobody's claims lapse
    for each in drivers:
        each.begin()
    return fs, root, drivers


FATES = st.lists(st.sampled_from(("answered", "refused", "unanswered")), max_size=4)
WHAT = st.sampled_from(("take", "give back", "beat"))
STEPS = st.lists(
    st.tuples(st.sampled_from((0, 1)), WHAT, st.sets(st.sampled_from(NAMES), min_size=1), FATES), min_size=1
)


@settings(derandomize=True, deadline=None)
@given(STEPS)
def test_whatever_was_not_answered_each_claim_is_one_drivers_and_none_is_left(steps):
    fs, root, drivers = two_drivers()
    for who, step, names, fates in steps:
        fs.fates = iter(fates)
        with contextlib.suppress(OSError):  # the driver tries again later
            if step == "take":
                drivers[who].look()
                drivers[who].take(sorted(names))
            elif step == "give back":
                drivers[who].give_back(sorted(names))
            else:
                drivers[who].beat()
        fs.fates = iter(())
        for name in NAMES:
            assert sum(each.holds(name) for each in drivers) <= 1
    taken = []
    for each in drivers:
        each.look()
        taken.append(each.take(NAMES))
    assert set().union(*taken) == set(NAMES), "both live, and nobody waits for himself"
    assert not set.intersection(*taken)
    for each in drivers:
        each.end()
    assert fs.find(f"{root}/_claims") == []


def test_a_claim_that_was_made_without_an_answer_is_its_makers():
    fs, _, (a, b) = two_drivers()
    a.look()
    fs.fates = itertools.chain(("unanswered", "refused"))  # the claim, and the look at whose it is
    with contextlib.suppress(OSError):
        a.take(["x"])
    b.look()
    assert (b.take(["x"]), b.holder("x")) == (set(), "a")
    a.look()
    assert (a.take(["x"]), a.holds("x")) == ({"x"}, True)


@pytest.mark.parametrize("first", ["unanswered", "refused"])
@pytest.mark.parametrize("overwrites", [False, True])
def test_one_answer_that_does_not_come_decides_nothing_about_a_place(first, overwrites, monkeypatch):
    """A driver that claimed nothing would read what others read."""
    monkeypatch.setattr(exclusive, "_PAUSES", (0.0, 0.0, 0.0))
    fs = Unanswering()
    if overwrites:
        monkeypatch.setattr(fs, "pipe_file", lambda path, value, mode=None: Unanswering.pipe_file(fs, path, value))
    store = SimpleNamespace(place=lambda root=f"/place-{first}-{overwrites}": (fs, root))
    a = Claims(store, "a")
    fs.fates = iter([first])
    a.begin()
    assert a.works is not overwrites
