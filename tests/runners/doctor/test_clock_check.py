"""Clocks of nodes against the driver's: whose is told as wrong, and what asking took is allowed for."""

import time
from types import SimpleNamespace

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.runners.doctor import clock_check
from deadbench.runners.doctor.clock_check import Clock, clock_lines, clock_of, one_time
from deadbench.runners.doctor.node_checks import NotHereError, UnwellError
from deadbench.runners.results.claims import LEASE_SECONDS


def asked(monkeypatch, ahead, there, back):
    """What is found of a clock that is `ahead`, where the question takes `there` s and the answer `back`, by turns."""
    now, turns = [1000.0], iter(zip(there, back, strict=True))
    monkeypatch.setattr(clock_check, "time", SimpleNamespace(time=lambda: 1e9 + now[0], monotonic=lambda: now[0]))

    def ask():
        question, answer = next(turns)
        now[0] += question
        told = 1e9 + now[0] + ahead
        now[0] += answer
        return told

    return clock_of(ask)


SECONDS = st.floats(0, 30)


@settings(derandomize=True, deadline=None)
@given(st.floats(-1e5, 1e5), st.lists(st.tuples(SECONDS, SECONDS), min_size=3, max_size=3))
def test_a_clock_is_what_it_is_to_half_of_the_quickest_answer(ahead, took):
    with pytest.MonkeyPatch.context() as patch:
        found = asked(patch, ahead, *zip(*took, strict=True))
    assert found.within == pytest.approx(min(sum(each) for each in took) / 2, abs=1e-6)
    assert abs(found.ahead - ahead) <= found.within + 1e-6
    if abs(ahead) <= LEASE_SECONDS - 1e-6:  # whatever asking took, a clock that is near is never wrong
        assert one_time(found)


@pytest.mark.parametrize(("ahead", "told"), [(600.0, "600 s ahead of"), (-3600.0, "3.6e+03 s behind")])
def test_a_clock_that_is_away_is_wrong_with_its_seconds(ahead, told):
    with pytest.raises(UnwellError, match=rf"^{told.replace('+', '.')} the driver's, and 60 s are the most: .* chrony"):
        one_time(Clock(ahead, 0.01))


def test_a_clock_that_nobody_can_tell_is_not_called_wrong():
    with pytest.raises(NotHereError, match="took 200 s to tell its time"):
        one_time(Clock(150.0, 100.0))


def test_each_node_has_its_line_and_a_node_that_does_not_answer_a_red_one(monkeypatch):
    nodes = [
        {"NodeID": name * 28, "NodeManagerHostname": f"host-{name}", "Resources": {}} for name in ("aa", "bb", "cc")
    ]
    ahead, cancelled = {"aa": 0.0, "bb": -600.0}, []
    monkeypatch.setattr("ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy", lambda node, soft: node[:2])
    monkeypatch.setattr(
        ray, "remote", lambda **options: lambda now: SimpleNamespace(remote=lambda: options["scheduling_strategy"])
    )
    monkeypatch.setattr(ray, "cancel", lambda reference, force: cancelled.append(reference))

    def get(reference, timeout):
        if reference not in ahead:
            raise ray.exceptions.GetTimeoutError("x")
        return time.time() + ahead[reference]

    monkeypatch.setattr(ray, "get", get)
    well, away, silent = clock_lines(nodes)
    assert (well.node, well.check, well.verdict) == ("host-aa", "clock", "ok")
    assert (away.node, away.check, away.verdict) == ("host-bb", "clock", "wrong")
    assert away.told.startswith("600 s behind the driver's, ")
    assert (silent.node, silent.verdict, silent.told) == ("host-cc", "wrong", "no answer within 60 s")
    assert cancelled == ["cc"]
