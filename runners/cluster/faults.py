"""What a model died of, in one line, and whether another attempt can help: with what changed."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deadbench.runners.cluster.processes import Ended
from deadbench.runners.jobs.events import GroupBrokenError
from deadbench.runners.jobs.job import ModelJob, ReadJob
from deadbench.suite.errors import message, one_line
from deadbench.suite.secrets import scrubbed

Kind = Literal["crash", "memory", "silence", "node", "unplaced", "broken"]

# Neither is the read's own fault, so neither uses up its retries; but there is an end to patience.
_NODES_LOST = 5
_PLACES_LOST = 20


@dataclass(frozen=True)
class Death:
    """Why a model's processes ended before their reads were over.

    `crash`: a process failed or was killed; `memory`: by want of memory; `silence`: no progress; `node`: lost with its
    node; `unplaced`: it never began; `broken`: ranks out of step, after a read that has its row. Where the cause is not
    `told`, what the process wrote last is worth a look.
    """

    kind: Kind
    cause: str
    told: bool = True

    def explained(self, ended: Ended) -> "Death":
        """The same with what was found where it died."""
        if self.kind != "crash":
            return self
        if ended.signal is not None:
            return replace(self, cause=f"{self.cause} ({ended.signal})")
        if ended.out_of_memory:
            return Death("memory", f"{self.cause} (the kernel's out-of-memory killer)")
        if ended.last_line is not None and not self.told:
            return replace(self, cause=f"{self.cause}; the last line that it wrote: {scrubbed(ended.last_line)[:300]}")
        return self


def death_of(ray: Any, error: Exception) -> Death:
    """What Ray says of a process that has gone."""
    errors, text = ray.exceptions, message(error, None)
    if isinstance(error, errors.OutOfMemoryError):
        return Death("memory", "the process was killed: the machine ran out of memory")
    if isinstance(error, errors.RayTaskError):
        if isinstance(error.cause, GroupBrokenError):
            return Death("broken", "the ranks are out of step")
        return Death("crash", f"the worker failed: {one_line(error.cause, 300)}")
    if isinstance(error, errors.ActorDiedError) and error.actor_init_failed:
        last = str(error).strip().splitlines()[-1:]  # of Python's traceback, which names the exception there
        return Death("crash", f"its process could not begin: {scrubbed(''.join(last))[:300]}")
    if isinstance(error, errors.ActorUnschedulableError) or "never ran" in text:
        return Death("unplaced", "its node was gone before it began")
    lost = (
        isinstance(error, errors.ActorUnavailableError | errors.NodeDiedError | errors.ObjectLostError)
        or "node has died" in text
    )
    if lost or getattr(error, "preempted", False):
        return Death("node", "its node was lost")
    if isinstance(error, errors.ActorDiedError):
        _, _, code = text.partition("Worker exits with an exit code ")
        how = f"it ended with exit code {code.split('.')[0]}" if code else "killed, or crashed"
        return Death("crash", f"the process of this model died: {how}", told=False)
    return Death("crash", one_line(error, 300))


@dataclass
class Attempts:
    """How often each read has been tried, and what it was charged with. Reads run in order: the first one left died."""

    max_retries: int
    tried: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    charged: Counter[tuple[tuple[Any, ...], str]] = field(default_factory=Counter)

    def number(self, read: ReadJob) -> int:
        """The number of the attempt that would start now."""
        return self.tried[read.identity()] + 1

    def after(self, death: Death, left: ModelJob) -> tuple[ModelJob, ReadJob | None]:
        """(what to queue again, the read that is given up) of the reads that are `left` of a model."""
        first = left.reads[0]
        who, kind = first.identity(), death.kind
        if kind == "broken":
            return left, None
        if kind != "unplaced":
            self.tried[who] += 1
        charge = kind if kind in ("node", "unplaced") else "read"
        self.charged[who, charge] += 1
        allowed = {"node": _NODES_LOST, "unplaced": _PLACES_LOST, "read": self.max_retries}[charge]
        if self.charged[who, charge] > allowed:
            return left.without([who]), first
        if kind == "memory":
            first = replace(first, half_batch=True)
        return replace(left, reads=(first, *left.reads[1:])), None
