"""Gates: `gate.yaml` says which changes of which metric break a build; `judge` applies it to a comparison.

    noise: 2            # a change within so many standard deviations of its noise never breaks
    missing: fail       # a baseline's read that the candidate lacks: fail or ignore
    cannot_tell: pass   # a change whose noise hides whether it is borne: pass or fail
    metrics:
      depth: {worse: lower, decades: 0.5}
      num_learned: {worse: higher, absolute: 0, reads: [trained]}
      worst_block_ratio: {worse: lower, relative: 0.2, models: ["twin-*"]}

A metric is a numeric column of `reads`. `worse` says which way is a regression (lower, higher, changed) and one of
absolute, relative, decades how much of it is borne. `drift` bounds a slope over checkpoints: analysis/drift.py.
"""

import difflib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar, get_args

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deadbench.analysis.compare import Scale, unit_of
from deadbench.analysis.lines import distinct
from deadbench.suite.plain_text import MAX_LINE, plain
from deadbench.suite.registry.entries import ReadName
from deadbench.suite.schema import READS as COLUMNS
from deadbench.suite.yaml_file import YamlError, load_yaml

BROKEN = ("broken", "lost", "missing", "failed")
CANNOT_TELL = "cannot tell"
_TOO_MANY = 1000  # times as many tokens: nobody reads them
_Rule = TypeVar("_Rule")
_Bound = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class GateError(ValueError):
    """A gate file that does not hold; one line."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MetricGate(_Strict):
    """What is borne of one metric: at most one bound, none meaning `absolute: 0`; `models` are shell patterns."""

    worse: Literal["lower", "higher", "changed"]
    absolute: _Bound | None = None
    relative: _Bound | None = None
    decades: _Bound | None = None
    reads: list[ReadName] = list(get_args(ReadName))
    models: list[str] = ["*"]

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if sum(bound is not None for bound in (self.absolute, self.relative, self.decades)) > 1:
            raise ValueError("give one of absolute, relative, decades")
        return self

    @property
    def bound(self) -> tuple[Scale, float]:
        """The scale of the bound, and the bound."""
        if self.relative is not None:
            return "relative", self.relative
        return ("decades", self.decades) if self.decades is not None else ("absolute", self.absolute or 0.0)


class DriftGate(_Strict):
    """What slope of one metric is borne over the `last` checkpoints of a series, per 1 000 steps of training."""

    worse: Literal["lower", "higher", "changed"]
    per_1000_steps: _Bound
    last: Annotated[int, Field(ge=4)] = 8
    reads: list[ReadName] = list(get_args(ReadName))
    models: list[str] = ["*"]


class Gate(_Strict):
    """A whole gate file."""

    noise: _Bound = 2.0
    missing: Literal["fail", "ignore"] = "fail"
    cannot_tell: Literal["pass", "fail"] = "pass"
    metrics: Annotated[dict[str, MetricGate], Field(min_length=1)]
    drift: dict[str, DriftGate] = {}

    @field_validator("metrics", "drift")
    @classmethod
    def _known(cls, metrics: dict[str, _Rule]) -> dict[str, _Rule]:
        names = [column.name for column in COLUMNS if unit_of(column.name) is not None]
        for metric in metrics:
            if metric not in names:
                near = difflib.get_close_matches(metric, names, n=3) or ["depth", "num_dead_1e6", "worst_block_ratio"]
                raise ValueError(f"metric {metric!r} is no numeric column of reads; for example {', '.join(near)}")
        return metrics

    def scales(self) -> dict[str, Scale]:
        """What `compare` is to be asked."""
        return {metric: gate.bound[0] for metric, gate in self.metrics.items()}


# What `trend --bisect` and `watch` hold a metric against where no gate file says otherwise.
DEFAULT = Gate(
    metrics={
        "depth": MetricGate(worse="lower", decades=1.0),
        "depth_predicted": MetricGate(worse="lower", decades=1.0),
        "lambda_v": MetricGate(worse="higher", decades=1.0),
        "scale_harmonic": MetricGate(worse="changed", decades=1.0),
        "kernel_exact": MetricGate(worse="lower"),
        "containment": MetricGate(worse="lower", absolute=0.01),
        "num_algebraic": MetricGate(worse="changed"),
        "num_learned": MetricGate(worse="higher"),
        "num_dead_1e6": MetricGate(worse="higher"),
        "num_zero_scales": MetricGate(worse="higher"),
        "blocks_preserved": MetricGate(worse="lower"),
        "worst_block_ratio": MetricGate(worse="lower", relative=0.5),
    }
)


def load_gate(path: Path) -> Gate:
    """The gate file at `path`.

    Raises:
        GateError: no such file, not YAML, or a key or value that cannot be; the line says which and what is allowed.
    """
    if not path.is_file():
        raise GateError(f"{path}: no such gate file")
    try:
        content = load_yaml(path)
    except YamlError as error:
        raise GateError(str(error)) from error
    if not isinstance(content, dict):
        raise GateError(f"{path}: a gate file is a mapping with the key 'metrics'; see `deadbench compare --help`")
    try:
        return Gate.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        message = first["msg"].removeprefix("Value error, ")
        raise GateError(f"{path}: {plain(f'{where}: {message}{got}', MAX_LINE)}") from error


def judge(comparison: pl.DataFrame, gate: Gate) -> pl.DataFrame:
    """The rows of `compare(…, gate.scales())` that the gate speaks of, with `allowed` and one of three verdicts.

    broken: worse by more than `allowed`, the metric's bound or `gate.noise` times the noise where that is larger.
    cannot tell: not so, but within that noise it may be worse than the bound; `detail` says how many tokens or seeds
    would tell. passed: no worse than the bound, whatever the noise; where nothing is borne (a bound of 0) noise is
    passed, for no number of tokens would tell. lost breaks too; missing and failed reads do unless they are ignored.
    """
    comparison = comparison.with_columns(pl.col("verdict").cast(pl.String))
    judged = [_without_metric(comparison, gate)]
    for metric, each in gate.metrics.items():
        of_metric = comparison.filter((pl.col("metric") == metric) & pl.col("read").cast(pl.String).is_in(each.reads))
        wanted = judged_models(of_metric["model"], each.models)
        worse = {"lower": -pl.col("change"), "higher": pl.col("change"), "changed": pl.col("change").abs()}[each.worse]
        bound, hidden = pl.lit(each.bound[1]), gate.noise * pl.col("noise")
        allowed = pl.max_horizontal(bound, hidden)
        unclear = (pl.col("verdict") != "lost") & (worse <= allowed) & (bound > 0) & (worse + hidden > bound)
        judged.append(
            of_metric.filter(pl.col("model").cast(pl.String).is_in(wanted)).with_columns(
                allowed=allowed,
                verdict=pl.when(pl.col("verdict") == "lost")
                .then("verdict")
                .when(worse > allowed)
                .then(pl.lit("broken"))
                .when(unclear)
                .then(pl.lit(CANNOT_TELL))
                .otherwise(pl.lit("passed")),
                detail=pl.when(unclear).then(_would_tell(worse, bound, hidden)).otherwise("detail"),
            )
        )
    checks = pl.concat(judged, how="diagonal")
    if checks.is_empty():
        raise GateError(
            f"the gate judges nothing: no read here has {', '.join(gate.metrics)} under its reads and models"
        )
    return checks


def limits(metric: str, rule: MetricGate, value: float) -> list[float]:
    """The values beyond which `metric` would break `rule` beside a baseline of `value`, its noise left aside.

    Example:
        >>> limits("depth", MetricGate(worse="lower", decades=0.5), 14.0)
        [13.5]
    """
    scale, bound = rule.bound
    if scale == "decades" and unit_of(metric) != "decades":
        ends = [value * 10**-bound, value * 10**bound]
    else:
        away = bound * abs(value) if scale == "relative" else bound
        ends = [value - away, value + away]
    return {"lower": ends[:1], "higher": ends[1:], "changed": ends}[rule.worse]


def judged_models(names: pl.Series, patterns: list[str]) -> list[str]:
    """Those of `names` that one of the shell patterns fits."""
    return [name for name in distinct(names) if any(fnmatchcase(name, pattern) for pattern in patterns)]


def undecided(judged: pl.DataFrame) -> pl.DataFrame:
    """What neither breaks the gate nor passes it."""
    return judged.filter(pl.col("verdict") == CANNOT_TELL)


def _would_tell(worse: pl.Expr, bound: pl.Expr, hidden: pl.Expr) -> pl.Expr:
    """How many tokens, or seeds, would tell, were the change what it is now; noise falls with their root."""
    distance = pl.when(worse > bound).then(worse).otherwise(bound - worse)
    times = (hidden / distance).pow(2)
    seeds = pl.col("num_noise_seeds")
    needed = (times * pl.coalesce(seeds, "num_tokens")).ceil()
    return (
        pl.when(times.is_finite() & (times <= _TOO_MANY))
        .then(pl.format("about {} {} would tell", needed.cast(pl.Int64, strict=False), _unit(seeds)))
        .otherwise(pl.format("not even {} times as many {} would tell", pl.lit(_TOO_MANY), _unit(seeds)))
    )


def _unit(seeds: pl.Expr) -> pl.Expr:
    return pl.when(seeds.is_null()).then(pl.lit("tokens")).otherwise(pl.lit("seeds"))


def broken(judged: pl.DataFrame) -> pl.DataFrame:
    """What breaks the gate, the worst kind first."""
    order = pl.col("verdict").cast(pl.Enum([*BROKEN, CANNOT_TELL, "passed", "ignored"]))
    return judged.filter(pl.col("verdict").is_in(BROKEN)).sort(order, maintain_order=True)


def unjudged(judged: pl.DataFrame, gate: Gate) -> list[str]:
    """The gate's metrics that no read of the comparison has."""
    return [metric for metric in gate.metrics if metric not in set(judged["metric"])]


def _without_metric(comparison: pl.DataFrame, gate: Gate) -> pl.DataFrame:
    rows = comparison.filter(pl.col("metric").is_null())
    if gate.missing == "ignore":
        rows = rows.with_columns(verdict=pl.lit("ignored"))
    return rows.with_columns(allowed=pl.lit(None, dtype=pl.Float64))
