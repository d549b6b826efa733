"""A step that goes on in another thread is waited for; one that is over, or left among its pieces, is not."""

import threading

import polars as pl
import pytest

from deadbench.analysis import results, steps
from deadbench.analysis.results import ResultsError, collected, scan
from deadbench.analysis.steps import Steps


def test_a_step_that_goes_on_is_waited_for():
    made, begun, may_end, ended = Steps(), threading.Event(), threading.Event(), []

    def pieces():
        yield 1
        begun.set()
        may_end.wait(10)
        ended.append(True)
        yield 2

    left = made.each(iter([1, 2]))
    assert next(left) == 1
    thread = threading.Thread(target=lambda: list(made.each(pieces())), daemon=True)
    thread.start()
    assert begun.wait(10)
    threading.Timer(0.1, may_end.set).start()
    made.wait()
    assert ended
    thread.join(10)


def test_not_for_ever(monkeypatch):
    monkeypatch.setattr(steps, "_ENDING_SECONDS", 0.1)
    made, over = Steps(), threading.Event()

    def pieces():
        over.wait(10)
        yield 1

    thread = threading.Thread(target=lambda: list(made.each(pieces())), daemon=True)
    thread.start()
    made.wait()
    assert thread.is_alive()
    over.set()
    thread.join(10)


def test_a_frame_that_fails_waits(monkeypatch):
    waited = []
    monkeypatch.setattr(results.STEPS, "wait", lambda: waited.append(True))
    rows = scan("reference").select(pl.col("model").cast(pl.Int64))
    with pytest.raises(ResultsError, match="cannot be read to its end"):
        collected(rows)
    assert waited
