"""Whether the nodes of a cluster have one time: claims compare no clocks, but rows bear times, and stores look."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from deadbench.runners.doctor.lines import Line, line_of
from deadbench.runners.doctor.node_checks import NotHereError, UnwellError
from deadbench.runners.results.claims import LEASE_SECONDS
from deadbench.suite.errors import message, one_line

_MOST_APART = LEASE_SECONDS  # by what goes on sooner than a claim lapses, nobody tells rows apart
_ASKED = 3  # of which the quickest counts: before the first one a process has to start
_SECONDS = 60.0


@dataclass(frozen=True)
class Clock:
    """A node's time less the driver's, and how far that may be wrong: half of what asking took; both in seconds."""

    ahead: float
    within: float


def clock_lines(nodes: list[dict[str, Any]]) -> Iterator[Line]:
    """A line for each of `nodes`, of Ray's own words for them, as a task on it tells the time."""
    for node in nodes:
        yield line_of(node["NodeManagerHostname"], "clock", lambda node=node: one_time(clock_of(_asker(node))))  # type: ignore[misc]


def clock_of(ask: Callable[[], float]) -> Clock:
    """What `ask` gives as seconds since the epoch, against this process's; of several the one that took least."""
    found = []
    for _ in range(_ASKED):
        here, began = time.time(), time.monotonic()
        there = ask()
        half = (time.monotonic() - began) / 2
        found.append(Clock(there - (here + half), half))
    return min(found, key=lambda clock: clock.within)


def one_time(clock: Clock) -> str:
    """Raise UnwellError where a clock is further away than a lease, whatever asking took; NotHereError: not known."""
    how = f"{abs(clock.ahead):.3g} s {'ahead of' if clock.ahead > 0 else 'behind'} the driver's"
    if abs(clock.ahead) - clock.within > _MOST_APART:
        raise UnwellError(
            f"{how}, and {_MOST_APART:g} s are the most: the newest of two rows is told by its time, and S3 refuses "
            "who is 15 min away; start chrony or another NTP client there, and here"
        )
    if clock.within > _MOST_APART:
        raise NotHereError(f"the node took {2 * clock.within:.0f} s to tell its time")
    return f"{how}, within {clock.within:.2g} s"


def _asker(node: dict[str, Any]) -> Callable[[], float]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(_now)

    def ask() -> float:
        reference = task.remote()
        try:
            return float(ray.get(reference, timeout=_SECONDS))
        except ray.exceptions.GetTimeoutError as error:
            ray.cancel(reference, force=True)
            raise UnwellError(f"no answer within {_SECONDS:g} s") from error
        except ray.exceptions.RayTaskError as error:
            raise UnwellError(message(error.cause)) from error
        except ray.exceptions.RayError as error:
            raise UnwellError(one_line(error, 300)) from error

    return ask


def _now() -> float:
    return time.time()
