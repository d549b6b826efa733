"""A frame for people and for programs: table, json, csv, md, html.

json and csv keep full precision; the others round to what a reader can use (`analysis/cells.py`). Whatever a user could
have written (model names, errors) is escaped for where it goes.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import polars as pl

from deadbench.analysis.cells import cells, header, one_line, text
from deadbench.analysis.results import ResultsError

if TYPE_CHECKING:
    from rich.table import Table


# What a terminal has room for; every other format has all columns.
TERMINAL_COLUMNS = {
    "leaderboard": [
        "rank", "model", "revision", "family", "objective", "read", "depth", "depth_random", "deepening", "depth_exact",
        "kernel_exact", "alignment", "num_dead_1e6", "num_learned", "dead_parameters",
        "dead_parameters_share", "num_parameters", "worst_block_ratio", "protocol", "dtype",
    ],
    "families": [
        "claim", "family", "num_models", "num_hold", "holds", "value_median", "value_min", "value_max",
        "value_margin", "unit", "failing",
    ],
    "collapsed_blocks": [
        "model", "read", "block", "num_blocks", "ratio", "participation", "bottom_coordinates", "bottom_weights",
    ],
    "dead_directions": [
        "model", "revision", "read", "site", "verdict", "coordinates", "depth", "at_random", "opened_step",
        "in_checkpoints", "num_checkpoints", "in_runs", "num_runs",
    ],
    "compare": [
        "verdict", "model", "revision", "read", "seed", "metric", "baseline", "candidate", "change", "scale", "allowed",
        "noise",
    ],
    "trend": [
        "checkpoint_step", "revision", "depth", "depth_exact", "lambda_v", "alignment", "num_dead_1e6", "num_learned",
        "worst_block_ratio", "protocol", "dtype",
    ],
    "metrics": [
        "metric", "trend", "first", "last", "min", "max", "change_step", "change", "unit", "protocol", "dtype",
    ],
}  # fmt: skip
# Where these do not fit either, the first of `SACRIFICED` go, one by one.
TERMINAL_WIDTH = 140
SACRIFICED = [
    "objective", "num_learned", "worst_block_ratio", "depth_exact", "num_dead_1e6", "num_parameters", "kernel_exact",
    "revision", "depth_random", "alignment", "deepening", "read", "family", "value_min",
    "value_max", "value_margin", "unit", "protocol", "dtype", "bottom_weights", "bottom_coordinates", "participation",
    "noise", "seed",
]  # fmt: skip
# A page of paper has no room for these.
SCREEN_ONLY = {
    "objective", "depth_predicted", "precision_slope", "containment", "num_algebraic", "num_rounding",
    "num_zero_scales", "dead_parameters", "hidden_size", "num_blocks", "blocks_preserved", "worst_block", "num_seeds",
    "input", "dtype", "value_low", "value_high", "value_seed_spread", "value_token_error", "threshold",
}  # fmt: skip
WRAPPED = {"failing": 30, "statement": 30}  # prose, and the width that is enough for it
# Only rows that are equal here are compared: said once below the table where all are, else groups stand apart.
GROUP = ("protocol", "dtype")
_MARKDOWN = str.maketrans(
    {"\\": "\\\\", "|": "\\|", "*": "\\*", "`": "\\`", "[": "\\[", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
)


def render(frames: Mapping[str, pl.DataFrame], format: str) -> str:
    """Frames by title as json, csv, md or html; json is one document, `{title: [row, …], …}`, csv the first frame only.

    Raises:
        ResultsError: an unknown format.
    """
    formats: dict[str, Callable[[Mapping[str, pl.DataFrame]], str]] = {
        "json": _json, "csv": _csv, "md": _md, "html": _html,
    }  # fmt: skip
    if format not in formats:
        raise ResultsError(f"format {format!r} is unknown; choose {', '.join(formats)}")
    return formats[format](frames)


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
    shared = [name for name in GROUP if name in shown.columns and shown[name].drop_nulls().n_unique() == 1]
    below = [", ".join(f"{name} {one_line(shown[name].drop_nulls()[0])}" for name in shared)] if shared else []
    if {"model", "error"} <= set(frame.columns):
        errors = frame.select("model", "error").drop_nulls("error").iter_rows()
        below += [one_line(f"{model}: {error}") for model, error in errors]
    shown = _fitting(shown.drop(shared), width)
    table = Table(
        title=Text(header(title)),
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
    groups = frame.select(GROUP).rows() if title == "leaderboard" else [()] * len(frame)
    for place, row in enumerate(cells(shown)):
        apart = place + 1 < len(groups) and groups[place] != groups[place + 1]
        table.add_row(*map(Text, row), end_section=apart)  # Text, not str: markup in a name stays text
    return table


def html_rows(frame: pl.DataFrame) -> dict[str, Any]:
    """What the table macro of `page.html.j2` takes: headers, what the columns are, each cell as (text, sort key).

    Columns of `SCREEN_ONLY` are left out on paper.
    """
    numeric = [dtype.is_numeric() for dtype in frame.dtypes]
    return {
        "names": frame.columns,
        "headers": [header(name) for name in frame.columns],
        "numeric": numeric,
        "screen_only": [name in SCREEN_ONLY for name in frame.columns],
        "judged": [name == "holds" for name in frame.columns],
        "rows": [list(zip(row, values, strict=True)) for row, values in zip(cells(frame), frame.rows(), strict=True)],
    }


def environment() -> Any:
    """The template environment: escaping on, whatever a template's name."""
    from pathlib import Path

    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
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


def plain_rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """The rows as JSON has them: neither NaN nor dates."""
    return [{name: _plain(value) for name, value in row.items()} for row in frame.iter_rows(named=True)]


def _json(frames: Mapping[str, pl.DataFrame]) -> str:
    document = {title: plain_rows(frame) for title, frame in frames.items()}
    return json.dumps(document, indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else value.isoformat()


def _csv(frames: Mapping[str, pl.DataFrame]) -> str:
    frame = next(iter(frames.values()))
    real = pl.selectors.float()
    lists = [pl.col(n).cast(pl.List(pl.String)).list.join("; ") for n, t in frame.schema.items() if t == pl.List]
    return frame.with_columns(pl.when(real.is_finite()).then(real)).with_columns(lists).write_csv().rstrip("\n")


def _md(frames: Mapping[str, pl.DataFrame]) -> str:
    tables = []
    for frame in frames.values():
        lines = [[header(name) for name in frame.columns], ["---:" if t.is_numeric() else "---" for t in frame.dtypes]]
        lines += [[cell.translate(_MARKDOWN) for cell in row] for row in cells(frame)]
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)


def _html(frames: Mapping[str, pl.DataFrame]) -> str:
    tables = {title: _great_table(frame, title) for title, frame in frames.items()}
    return str(environment().get_template("page.html.j2").module.document(tables))


def _great_table(frame: pl.DataFrame, title: str) -> str:
    """The frame as a table of great_tables, which escapes cells and headings; groups of protocols stand apart."""
    from great_tables import GT

    shown = pl.DataFrame(list(cells(frame)), schema=dict.fromkeys(frame.columns, pl.String), orient="row").with_columns(
        _group(frame) if set(GROUP) <= set(frame.columns) else []
    )
    table = GT(shown, id=title, groupname_col="group" if "group" in shown.columns else None)
    return str(
        table.cols_label({name: header(name) for name in frame.columns})
        .cols_align("left")
        .cols_align("right", [name for name, dtype in frame.schema.items() if dtype.is_numeric()])
        .tab_options(table_font_size="13px", table_width="100%", data_row_padding="4px", row_group_font_weight="bold")
        .as_raw_html()
    )


def _group(frame: pl.DataFrame) -> pl.Series:
    names = [
        ", ".join(f"{n} {text(n, v)}" for n, v in zip(GROUP, row, strict=True)) for row in frame.select(GROUP).rows()
    ]
    return pl.Series("group", names, dtype=pl.String)
