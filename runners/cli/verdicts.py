"""What a gate says of one checkpoint of a run: against the one before it, and against a baseline."""

from dataclasses import dataclass, field
from typing import Any

import polars as pl

from deadbench.analysis.compare import compare
from deadbench.analysis.dead import dead_directions
from deadbench.analysis.drift import with_drift
from deadbench.analysis.formats import plain_rows
from deadbench.analysis.gate import CANNOT_TELL, DEFAULT, Gate, broken, judge, undecided
from deadbench.analysis.lines import natural, ok_reads
from deadbench.analysis.paired import Samples
from deadbench.analysis.results import ResultsError, collected, latest, scan
from deadbench.analysis.sides import Side
from deadbench.analysis.trajectory import trajectory
from deadbench.analysis.trend import checkpoints
from deadbench.suite.plain_text import MAX_LINE, plain
from deadbench.suite.secrets import scrubbed

_BREAK = ["verdict", "read", "metric", "baseline", "candidate", "change", "allowed", "detail"]
OPENED = "opened"  # the metric of a check that no gate file has


@dataclass(frozen=True)
class Comparison:
    """The checks against one other checkpoint: how many, and those that broke, as `deadbench compare` has them."""

    against: str
    num_checks: int
    num_cannot_tell: int
    broken: list[dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a checkpoint.

    Attributes:
        status: passed, broken, cannot tell, failed (nothing of it could be read) or first (there is no other).
        opened: the learned and collapsed directions that the checkpoint before did not have, by site and coordinates.
        error: of a read that failed.
        deleted: it failed because the checkpoint is gone, which is no fault of the training's.
    """

    model: str
    revision: str
    step: int | None
    status: str
    comparisons: list[Comparison] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    error: str | None = None
    deleted: bool = False

    @classmethod
    def stored(cls, document: dict[str, Any]) -> "Verdict":
        """Of what `dataclasses.asdict` made of one."""
        return cls(**document | {"comparisons": [Comparison(**each) for each in document["comparisons"]]})

    def alarms(self) -> set[tuple[str, str, str | None]]:
        """What is wrong with it, to be told where it is new: checks that broke, and that it cannot be read."""
        broke = {(side.against, row["read"], row["metric"]) for side in self.comparisons for row in side.broken}
        return broke | ({("", "failed", None)} if self.error is not None and not self.deleted else set())

    def line(self) -> str:
        """For people: `checkpoint-60: broken against checkpoint-50: num_zero_scales 0 -> 1; opened ln_f: 5`."""
        parts = ["the first, nothing to compare with" if self.status == "first" else self.status]
        for each in self.comparisons:
            changes = [_change(row) for row in each.broken if row["metric"] != OPENED]  # which are told below
            parts += [f"against {each.against}: {', '.join(changes)}"] if changes else []
        if len(self.comparisons) and self.status != "broken":
            parts[0] += f" against {' and '.join(each.against for each in self.comparisons)}"
        parts += [f"opened {place}" for place in self.opened]
        parts += [f"failed: {self.error}" if self.status != "failed" else str(self.error)] if self.error else []
        return plain(scrubbed(f"{self.revision}: {'; '.join(parts)}"), MAX_LINE)


def _change(row: dict[str, Any]) -> str:
    if row["metric"] is None:
        return f"{row['read']} read {row['verdict']}"
    before, after = ("nothing" if row[side] is None else f"{row[side]:.4g}" for side in ("baseline", "candidate"))
    return f"{row['read']} {row['metric']} {before} -> {after}"


def verdict_of(
    out: str,
    model: str,
    revision: str,
    reads: list[str],
    gate: Gate | None,
    baseline: tuple[str, Side] | None,
    *,
    deleted: bool = False,
) -> Verdict:
    """The verdict on a checkpoint that is in the result set at `out`, by `gate` (None: the default).

    Without a gate of the user's, a direction that opened since the checkpoint before is a break too. The one before is
    the last that has all reads that this one has; what one lacks that was `deleted` while it was read breaks nothing.

    Raises:
        GateError: the gate judges nothing here.
        ResultsError: the baseline was read under another protocol, or has nothing that could be compared.
    """
    rules = (gate or DEFAULT).model_copy(update={"missing": "ignore"} if deleted else {})
    table = scan(out).filter(pl.col("model") == model, pl.col("read").is_in(reads))
    rows = collected(latest(table).select("revision", "checkpoint_step", "status", "read", "error"))
    ours = rows.filter(revision=revision)
    step, errors = next(iter(ours["checkpoint_step"].drop_nulls()), None), ours["error"].drop_nulls().to_list()
    error = errors[0] if errors else None
    read_of: dict[str, set[str]] = {}
    for name, read in rows.filter(pl.col("revision").is_not_null(), status="ok").select("revision", "read").iter_rows():
        read_of.setdefault(name, set()).add(read)
    known = {name: s for name, s in rows.select("revision", "checkpoint_step").iter_rows() if name in read_of}
    if revision not in known:
        return Verdict(model, revision, step, "failed", error=error, deleted=deleted)
    order = sorted(known, key=lambda name: (known[name] is None, known[name] or 0, natural(name)))
    until = order[: order.index(revision) + 1]
    samples = scan(out, "samples").filter(pl.col("model") == model)
    here = pl.col("revision") == revision
    mine = Side(table.filter(here), samples.filter(here), table.filter(pl.col("revision").is_in(until)))
    sides, opened = [], []
    if len(until) > 1:
        alike = [name for name in until[:-1] if read_of[revision] <= read_of[name]]
        previous = (alike or until[:-1])[-1]
        before = pl.col("revision") == previous
        sides.append((previous, Side(table.filter(before), samples.filter(before), table)))
        opened = _opened(out, model, mine.until, revision)
    if baseline is not None and (fitting := _fitting(baseline[1], model, revision, reads)) is not None:
        sides.append((baseline[0], fitting))
    comparisons = [_compared(name, side, mine, rules) for name, side in sides]
    if gate is None and opened:
        first = comparisons[0]
        broke = [*first.broken, *(_opening(place) for place in opened)]
        comparisons[0] = Comparison(first.against, first.num_checks + len(opened), first.num_cannot_tell, broke)
    unclear = any(each.num_cannot_tell for each in comparisons)
    status = "first" if not comparisons else CANNOT_TELL if unclear else "passed"
    if any(each.broken for each in comparisons) or (unclear and rules.cannot_tell == "fail"):
        status = "broken"
    return Verdict(model, revision, step, status, comparisons, opened, error, deleted)


def _compared(name: str, left: Side, right: Side, gate: Gate) -> Comparison:
    rows = compare(left.reads, right.reads, gate.scales(), Samples(left.samples, right.samples))
    judged = with_drift(judge(rows, gate), right.until, gate)
    told = [{key: row[key] for key in _BREAK} for row in plain_rows(broken(judged))]
    return Comparison(name, len(judged), len(undecided(judged)), told)


def _fitting(side: Side, model: str, revision: str, reads: list[str]) -> Side | None:
    """What of a baseline a checkpoint is compared with: of several checkpoints that of its name, None without one."""
    mine = side.reads.filter(pl.col("read").is_in(reads))
    known = collected(ok_reads(mine).select("model", "revision").unique())
    if known["model"].n_unique() > 1:
        mine, known = mine.filter(pl.col("model") == model), known.filter(model=model)
    if known.is_empty():
        raise ResultsError(f"--baseline: has no {' or '.join(reads)} read of {model}; name one with RESULTS@REVISION")
    if known["revision"].n_unique() > 1:
        if revision not in known["revision"]:
            return None
        mine = mine.filter(pl.col("revision") == revision)
    return Side(mine, side.samples, side.until)


def _opened(out: str, model: str, reads: pl.LazyFrame, revision: str) -> list[str]:
    """What opened at `revision`, the last of `reads`."""
    norms, spectra, blocks = (scan(out, t).filter(pl.col("model") == model) for t in ("norms", "spectra", "blocks"))
    dead = dead_directions(reads, norms, spectra, blocks, every=True)
    turned = trajectory(checkpoints(reads, model), model, reads, norms, dead).filter(revision=revision)
    return list(dict.fromkeys(place for places in turned["opened"].drop_nulls() for place in places))


def _opening(place: str) -> dict[str, Any]:
    return dict.fromkeys(_BREAK) | {"verdict": "broken", "read": "", "metric": OPENED, "detail": place}
