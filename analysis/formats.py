"""A frame for people and for programs: table, json, csv, md, html.

json and csv keep full precision; the others round to what a reader can use (`analysis/cells.py`). Whatever a user could
have written (model names, errors) is escaped for where it goes.
"""

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import polars as pl

from analysis.cells import cells, header, one_line
from analysis.results import ResultsError

if TYPE_CHECKING:
    from rich.table import Table

# What a terminal has room for; every other format has all columns.
TERMINAL_COLUMNS = {
    "leaderboard": [
        "rank", "model", "revision", "family", "objective", "read", "depth", "depth_random", "deepening", "depth_exact",
        "kernel_exact", "alignment", "num_dead_1e6", "num_learned", "num_parameters", "worst_block_ratio", "protocol",
        "dtype",
    ],
    "families": [
        "claim", "family", "num_models", "num_hold", "holds", "value_median", "value_low", "value_high", "value_min",
        "value_max", "value_margin", "unit", "failing",
    ],
    "collapsed blocks": [
        "model", "read", "block", "num_blocks", "ratio", "participation", "bottom_coordinates", "bottom_weights",
    ],
    "compare": [
        "verdict", "model", "revision", "read", "seed", "metric", "baseline", "candidate", "change", "scale", "allowed",
        "noise",
    ],
    "trend": [
        "checkpoint_step", "revision", "depth", "depth_exact", "lambda_v", "alignment", "num_dead_1e6", "num_learned",
        "worst_block_ratio", "protocol", "dtype",
    ],
}  # fmt: skip
# Where these do not fit either, the first of `SACRIFICED` go, one by one.
TERMINAL_WIDTH = 140
SACRIFICED = [
    "objective", "num_learned", "worst_block_ratio", "num_parameters", "depth_exact", "num_dead_1e6", "kernel_exact",
    "revision", "depth_random", "alignment", "deepening", "read", "family", "value_low", "value_high", "value_min",
    "value_max", "value_margin", "unit", "protocol", "dtype", "bottom_weights", "bottom_coordinates", "participation",
    "noise", "seed",
]  # fmt: skip
WRAPPED = {"failing": 30, "statement": 30}  # prose, and the width that is enough for it
# A column of these with one value only is said once, below the table.
CAPTION_COLUMNS = ("protocol", "dtype")
_MARKDOWN = str.maketrans(
    {"\\": "\\\\", "|": "\\|", "*": "\\*", "`": "\\`", "[": "\\[", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
)


def render(frame: pl.DataFrame, format: str, *, title: str) -> str:
    """`frame` as json, csv, md or html; json is one document, `{title: [row, …]}`.

    Raises:
        ResultsError: an unknown format.
    """
    formats: dict[str, Callable[[pl.DataFrame, str], str]] = {"json": _json, "csv": _csv, "md": _md, "html": _html}
    if format not in formats:
        raise ResultsError(f"format {format!r} is unknown; choose {', '.join(formats)}")
    return formats[format](frame, title)


def rich_table(frame: pl.DataFrame, title: str, *, width: int = TERMINAL_WIDTH) -> "Table":
    """`frame` for a terminal of `width`, with the columns that fit it; columns without any value are left out.

    Below it stand what all rows share and the rows' errors. Names are never cut off: on a terminal that is narrower
    still they wrap.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    wanted = [name for name in TERMINAL_COLUMNS.get(title, frame.columns) if name in frame.columns]
    shown = frame.select(name for name in wanted if frame.is_empty() or _has_values(frame[name]))
    shared = [name for name in CAPTION_COLUMNS if name in shown.columns and shown[name].drop_nulls().n_unique() == 1]
    below = [", ".join(f"{name} {one_line(shown[name].drop_nulls()[0])}" for name in shared)] if shared else []
    if {"model", "error"} <= set(frame.columns):
        errors = frame.select("model", "error").drop_nulls("error").iter_rows()
        below += [one_line(f"{model}: {error}") for model, error in errors]
    shown = _fitting(shown.drop(shared), width)
    table = Table(
        title=Text(title),
        title_justify="left",
        caption=Text("\n".join(below)) if below else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name, dtype in shown.schema.items():
        short = not isinstance(dtype, pl.String | pl.List)
        table.add_column(
            header(name), justify="right" if dtype.is_numeric() else "left", overflow="fold", no_wrap=short
        )
    for row in cells(shown):
        table.add_row(*map(Text, row))  # Text, not str: markup in a name stays text
    return table


def html_rows(frame: pl.DataFrame) -> dict[str, Any]:
    """What the table macro of `page.html.j2` takes: headers, what the columns are, the cells as text."""
    return {
        "headers": [header(name) for name in frame.columns],
        "numeric": [dtype.is_numeric() for dtype in frame.dtypes],
        "judged": [name == "holds" for name in frame.columns],
        "rows": list(cells(frame)),
    }


def environment() -> Any:
    """The template environment: escaping on, whatever a template's name."""
    from pathlib import Path

    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _fitting(frame: pl.DataFrame, width: int) -> pl.DataFrame:
    """`frame` without as many of the `SACRIFICED` columns as it takes to fit `width`."""
    from rich.cells import cell_len

    rows = [[header(name) for name in frame.columns], *cells(frame)]
    needed = {
        name: min(max(map(cell_len, column)), WRAPPED.get(name, width)) + 2  # a space on either side
        for name, column in zip(frame.columns, zip(*rows, strict=True), strict=True)
    }
    kept = frame.columns
    for name in SACRIFICED:
        if sum(needed[each] for each in kept) + 2 <= width:
            break
        kept = [each for each in kept if each != name]
    return frame.select(kept)


def _has_values(column: pl.Series) -> bool:
    if column.dtype == pl.List:
        return bool((column.list.len().fill_null(0) > 0).any())
    return column.null_count() < len(column)


def _json(frame: pl.DataFrame, title: str) -> str:
    rows = [{name: _plain(value) for name, value in row.items()} for row in frame.iter_rows(named=True)]
    return json.dumps({title: rows}, indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor dates."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else value.isoformat()


def _csv(frame: pl.DataFrame, title: str) -> str:
    real = pl.selectors.float()
    lists = [pl.col(n).cast(pl.List(pl.String)).list.join("; ") for n, t in frame.schema.items() if t == pl.List]
    return frame.with_columns(pl.when(real.is_finite()).then(real)).with_columns(lists).write_csv().rstrip("\n")


def _md(frame: pl.DataFrame, title: str) -> str:
    lines = [[header(name) for name in frame.columns], ["---:" if t.is_numeric() else "---" for t in frame.dtypes]]
    lines += [[cell.translate(_MARKDOWN) for cell in row] for row in cells(frame)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _html(frame: pl.DataFrame, title: str) -> str:
    return str(environment().get_template("page.html.j2").module.document(title, html_rows(frame)))
