"""How one value of a frame reads to a person: rounded by its column's name and unit, in one line, null as a dash."""

import functools
import math
import re
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from typing import Any

import polars as pl

from deadbench.suite.plain_text import MAX_LINE, MAX_VALUE, plain
from deadbench.suite.secrets import scrubbed

HEADERS = {
    "rank": "#",
    "depth_random": "random",
    "depth_predicted": "predicted",
    "depth_exact": "float64",
    "depth_as_executed": "executed",
    "deepening_as_executed": "deepening, executed",
    "blocks_nondecreasing": "no fall",
    "kernel_exact": "exact",
    "num_dead_1e6": "dead 1e-6",
    "num_zero_scales": "zeros",
    "num_parameters": "params",
    "hidden_size": "D",
    "worst_block_ratio": "worst block",
    "num_models": "models",
    "num_hold": "hold",
    "value_median": "median",
    "value_min": "min",
    "value_max": "max",
    "value_low": "95 % from",
    "value_high": "to",
    "value_margin": "margin",
    "value_seed_spread": "seed spread",
    "value_token_error": "token error",
    "num_algebraic": "algebraic",
    "num_learned": "learned",
    "num_rounding": "rounding",
    "checkpoint_step": "step",
    "num_blocks": "blocks",
    "bottom_coordinates": "coordinates",
    "bottom_weights": "weights",
    "dead_parameters": "dead params",
    "dead_parameters_share": "of all",
    "dead_parameters_share_min": "share, min",
    "dead_parameters_share_median": "median",
    "dead_parameters_share_max": "max",
    "num_checkpoints": "of",
    "num_runs": "of",
    "angle": "angle, deg",
    "angle_from_first": "from first",
    "at_random": "at init",
    "opened_step": "opened",
}
# Columns that are read beside a value, as `13.98 ± 0.05`; json and csv have them as columns of their own.
# The first that is known stands there: a spread over seeds holds the error of each.
ERRORS = {
    "depth": ("depth_spread", "depth_standard_error"),
    "depth_random": ("depth_random_spread",),
    "baseline": ("baseline_error",),
    "candidate": ("candidate_error",),
}
MAX_LISTED = 8  # of a list's items; json and csv have all
# Of one text, of which a stranger may have a hundred thousand letters: each place in it takes time to be looked at.
_MOST_LETTERS, _MOST_PLACES = 20_000, 50
_PLACE = re.compile(r"[A-Za-z0-9+.-]{0,40}://")
_DECIMALS = {
    "alignment": 4, "containment": 4, "deepening": 2, "worst_block_ratio": 3, "ratio": 3, "bottom_weights": 2,
    "deepening_as_executed": 2, "weights": 2, "precision_slope": 2, "angle": 2, "angle_from_first": 2,
}  # fmt: skip
_DECIMALS_OF_UNIT = {"cosine": 4, "decades": 2, "dimensions": 0, "slope": 2, "ratio": 3, "share": 4}


def header(name: str) -> str:
    """The heading of column `name`."""
    return HEADERS.get(name) or told(name.replace("_", " "), MAX_VALUE)  # of a cross table it is a row's own word


def shown(frame: pl.DataFrame) -> list[str]:
    """The columns of `frame` that a person sees: all but the errors that stand beside their values."""
    beside = [error for name, errors in ERRORS.items() if name in frame.columns for error in errors]
    return [name for name in frame.columns if name not in beside]


def cells(frame: pl.DataFrame) -> Iterator[list[str]]:
    """The rows of `frame`, of each column that is `shown` the value as `text` gives it, with its error where known."""
    names = shown(frame)
    for row in frame.iter_rows(named=True):
        yield [text(name, row[name], row.get("unit")) + _error(name, row) for name in names]


def _error(name: str, row: dict[str, Any]) -> str:
    known = (row.get(error) for error in ERRORS.get(name, ()))
    value = next((each for each in known if each is not None and math.isfinite(each)), None)
    return "" if value is None else f" ± {value:.2g}"


def text(name: str, value: Any, unit: str | None = None) -> str:
    """One value of column `name`; a column `value_…` is rounded by its row's `unit`."""
    if value is None or value == [] or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        left_out = f"; and {len(value) - MAX_LISTED} more" if len(value) > MAX_LISTED else ""
        return "; ".join(text(name, item) for item in value[:MAX_LISTED]) + left_out
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M} UTC"
    if isinstance(value, int):
        return magnitude(value) if name in ("num_parameters", "dead_parameters") else str(value)
    if isinstance(value, float):
        return _real(name, value, unit)
    return told(str(value))


def told(words: str, limit: int | None = MAX_LINE) -> str:
    """What a row says, in one clean line: our own rows hold no secret of a place, those of a stranger may."""
    return plain(without_secrets(words), limit)


@functools.lru_cache(4096)  # a model's name is asked for by each table and each plot
def without_secrets(words: str) -> str:
    """The same as it stands there; only where a URL is can a secret of one be. It ends after `_MOST_PLACES` of them."""
    return scrubbed(_begun(words)) if "://" in words else words


def _begun(words: str) -> str:
    """`words` as far as they are looked through for secrets, which is up to a place and never into one."""
    begun = words[:_MOST_LETTERS]
    starts = [found.start() for found in islice(_PLACE.finditer(begun), _MOST_PLACES + 1)]
    if len(words) == len(begun) and len(starts) <= _MOST_PLACES:
        return words
    return f"{begun[: starts[-1]] if starts else begun}…"


def magnitude(count: int) -> str:
    """A count in three digits: 124M, 1.56B."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit:
            scaled = count / limit
            return f"{scaled:.0f}{suffix}" if abs(scaled) >= 99.95 else f"{scaled:.3g}{suffix}"
    return str(count)


def _real(name: str, value: float, unit: str | None) -> str:
    if name.startswith("lambda_"):
        return f"{value:.2e}"
    decimals = _DECIMALS.get(name, 2 if name.startswith("depth") else None)
    if name.startswith("value_"):
        decimals = _DECIMALS_OF_UNIT.get(unit or "")
    if name.startswith("dead_parameters_share"):
        return f"{100 * value:.3g} %"
    if name in ("first", "last", "min", "max", "baseline", "candidate") and 0 < abs(value) < 1e-4:
        return f"{value:.2e}"
    if decimals is None:
        return f"{value:.4g}"
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: there is no minus zero
