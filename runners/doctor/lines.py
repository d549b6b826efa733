"""What the doctor says: a line a check, whatever a check does."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from deadbench.runners.doctor.facts import Facts
from deadbench.runners.doctor.node_checks import NODE_CHECKS, NotHereError, UnwellError
from deadbench.suite.errors import one_line
from deadbench.suite.plain_text import MAX_LINE, plain


@dataclass(frozen=True)
class Line:
    """One check on one node: what came of it, what was found, and how long it took."""

    node: str
    check: str
    verdict: Literal["ok", "wrong", "skipped"]
    told: str
    seconds: float = 0.0


def node_lines(found: Facts, here: dict[str, str | None], names: Iterable[str] = tuple(NODE_CHECKS)) -> Iterator[Line]:
    """A line for each of `NODE_CHECKS`, or those of these `names`; `here` being the driver's versions."""
    for name in names:
        yield line_of(found.node, name, lambda check=NODE_CHECKS[name]: check(found, here))  # type: ignore[misc]


def line_of(node: str, name: str, check: Callable[[], str]) -> Line:
    """What a check says; an error that it did not foresee is one of its findings."""
    started = time.perf_counter()
    verdict: Literal["ok", "wrong", "skipped"] = "ok"
    try:
        told = check()
    except NotHereError as error:
        verdict, told = "skipped", str(error)
    except UnwellError as error:
        verdict, told = "wrong", str(error)
    except Exception as error:
        verdict, told = "wrong", one_line(error)
    return Line(node, name, verdict, plain(told, MAX_LINE), time.perf_counter() - started)
