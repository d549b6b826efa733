"""A frame for people and for programs: table, json, csv, md, html, latex.

json and csv keep full precision; the others round to what a reader can use (`analysis/cells.py`). Whatever a user could
have written (model names, errors) is escaped for where it goes.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from deadbench.analysis.cells import cells, header, shown, text, told, without_secrets
from deadbench.analysis.colours import FAMILY_COLOURS, STATE_COLOURS
from deadbench.analysis.footnotes import footnotes
from deadbench.analysis.layouts import LAYOUTS
from deadbench.analysis.meanings import meaning
from deadbench.analysis.results import ResultsError
from deadbench.analysis.terminal import Column, Layout, fit, table
from deadbench.suite.plain_text import MAX_VALUE, printable

if TYPE_CHECKING:
    from great_tables import GT
    from rich.console import Group


# A page of paper has no room for these.
SCREEN_ONLY = {
    "objective", "depth_predicted", "precision_slope", "containment", "num_algebraic", "num_rounding",
    "num_zero_scales", "dead_parameters", "hidden_size", "num_blocks", "blocks_preserved", "worst_block", "num_seeds",
    "depth_as_executed", "blocks_nondecreasing", "input", "dtype",
    "value_low", "value_high", "value_seed_spread", "value_token_error", "threshold",
}  # fmt: skip
_PAGE_LETTERS = 110  # of a table across a page of paper, in small print
PINNED = ("model", "holds")
# Only rows that are equal here are compared: groups stand apart.
GROUP = ("protocol", "dtype")
# What is said once below a terminal's table where all rows have the same.
SAID_ONCE = (*GROUP, "seed")
# What the lines below a table are made of: of a table without a layout of its own no column.
_SAID_BELOW = ("num_replicates",)
_MARKDOWN = str.maketrans(
    {"\\": "\\\\", "|": "\\|", "*": "\\*", "`": "\\`", "[": "\\[", "~": "\\~", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
)
_LIVE = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)  # what makes a link without brackets
_FORMULA = re.compile(r"[\s\0]*[=+\-@\uff1d\uff0b\uff0d\uff20]")
_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
)


def render(frames: Mapping[str, pl.DataFrame], format: str) -> str:
    """Frames by title; json is one document, `{title: [row, …], …}`, csv the first frame only.

    Raises:
        ResultsError: an unknown format.
    """
    formats: dict[str, Callable[[Mapping[str, pl.DataFrame]], str]] = {
        "json": _json, "csv": _csv, "md": _md, "html": _html, "latex": _latex,
    }  # fmt: skip
    if format not in formats:
        raise ResultsError(f"format {format!r} is unknown; choose {', '.join(formats)}")
    return formats[format](frames)


def rich_table(frame: pl.DataFrame, title: str, *, width: int, keep: Sequence[str] = ()) -> "Group":
    """`frame` for a terminal of `width`, with the columns that fit it; columns without any value are left out.

    Columns in `keep` are shown whatever the width. Below the table stand what all rows share, which columns did not
    fit, and the rows' errors.
    """
    columns, shared, layout = _columns(frame, title, keep)
    notes = [shared] if shared else []
    if {"model", "error"} <= set(frame.columns):
        errors = frame.select("model", "error").drop_nulls("error").iter_rows()
        notes += [f"{told(model, MAX_VALUE)}: {told(error)}" for model, error in errors]
    notes += footnotes(frame)
    groups = _groups(frame).to_list() if title == "leaderboard" else []
    apart = [place for place in range(len(groups) - 1) if groups[place] != groups[place + 1]]
    return table(
        columns, layout, width=width, title=header(title), notes=notes, elsewhere="--format json or csv", sections=apart
    )


def _columns(frame: pl.DataFrame, title: str, keep: Sequence[str] = ()) -> tuple[list[Column], str, Layout]:
    """What the layout of `title` shows of `frame`, what all rows share said in one line, and the layout with `keep`."""
    columns_by_default = [name for name in frame.columns if name not in _SAID_BELOW]
    layout = LAYOUTS.get(title, Layout(columns=columns_by_default, keys=frame.columns[:1]))
    layout = layout._replace(columns=[*layout.columns, *keep], keys=[*layout.keys, *keep])
    names = shown(frame)
    wanted = [name for name in dict.fromkeys(layout.columns) if name in names]
    wanted = [name for name in wanted if frame.is_empty() or _has_values(frame[name])]
    shared = [name for name in SAID_ONCE if name in wanted and frame[name].drop_nulls().n_unique() == 1]
    rows = list(cells(frame))
    columns = [
        Column(
            name,
            header(name),
            [row[names.index(name)] for row in rows],
            is_text=isinstance(frame.schema[name], pl.String | pl.List),
            is_number=frame.schema[name].is_numeric(),
        )
        for name in wanted
        if name not in shared
    ]
    return columns, ", ".join(f"{name} {told(str(frame[name].drop_nulls()[0]), MAX_VALUE)}" for name in shared), layout


def html_rows(frame: pl.DataFrame) -> dict[str, Any]:
    """What the table macro of `page.html.j2` takes: headers, what the columns are, each cell as (text, sort key).

    Columns of `SCREEN_ONLY` are left out on paper.
    """
    names = shown(frame)
    values = frame.select(names)
    return {
        "names": [told(name, MAX_VALUE) for name in names],  # of a cross table, too
        "headers": [header(name) for name in names],
        "meanings": [meaning(name) for name in names],
        # What stays in sight when a narrow window is scrolled sideways.
        "pinned": [name == next((n for n in PINNED if n in names), names[0]) for name in names],
        "numeric": [dtype.is_numeric() for dtype in values.dtypes],
        "screen_only": [name in SCREEN_ONLY for name in names],
        "notes": footnotes(frame),
        "judged": [name == "holds" for name in names],
        "families": [name == "family" for name in names],
        "rows": [list(zip(row, keys, strict=True)) for row, keys in zip(cells(frame), values.rows(), strict=True)],
    }


def environment() -> Any:
    """The template environment: escaping on, whatever a template's name."""
    from pathlib import Path

    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["markdown"] = escaped
    made.globals["colours"] = {
        "family": FAMILY_COLOURS,
        "yes": STATE_COLOURS["preserved"],
        "no": STATE_COLOURS["collapsed"],
    }
    return made


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
    if isinstance(value, str):
        return without_secrets(value)
    return value if isinstance(value, int | float | None) else value.isoformat()


def _csv(frames: Mapping[str, pl.DataFrame]) -> str:
    frame = next(iter(frames.values()))
    real = pl.selectors.float()
    lists = [pl.col(n).cast(pl.List(pl.String)).list.join("; ") for n, t in frame.schema.items() if t == pl.List]
    flat = frame.with_columns(pl.when(real.is_finite()).then(real)).with_columns(lists)
    texts = [pl.col(n) for n, t in flat.schema.items() if t in (pl.String, pl.Categorical, pl.Enum)]
    harmless = [each.cast(pl.String).map_elements(_csv_text, return_dtype=pl.String) for each in texts]
    heading = io.StringIO()  # of a cross table they are a row's own words
    csv.writer(heading, lineterminator="\n").writerow([_csv_text(name) for name in flat.columns])
    return (heading.getvalue() + flat.with_columns(harmless).write_csv(include_header=False)).rstrip("\n")


def _csv_text(words: str) -> str:
    """`words` as one printable line, an apostrophe before what a spreadsheet would take for a formula and compute."""
    line = printable(without_secrets(words))
    return f"'{line}" if _FORMULA.match(line) else line


def _md(frames: Mapping[str, pl.DataFrame]) -> str:
    tables = []
    for frame in frames.values():
        names = shown(frame)
        lines = [
            [escaped(header(n)) for n in names],
            ["---:" if frame.schema[n].is_numeric() else "---" for n in names],
        ]
        lines += [[escaped(cell) for cell in row] for row in cells(frame)]
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        tables += [escaped(line) for line in footnotes(frame)]
    return "\n\n".join(tables)


def escaped(words: str) -> str:
    """`words` as plain text in Markdown: no link, no picture, no markup."""
    return _LIVE.sub(lambda found: f"&#{ord(found[0])};", words.translate(_MARKDOWN))


def _html(frames: Mapping[str, pl.DataFrame]) -> str:
    tables = {
        title: (
            _great_table(frame, title, shown(frame))
            .tab_options(table_font_size="13px", table_width="100%", data_row_padding="4px")
            .tab_options(row_group_font_weight="bold")
            .as_raw_html(),
            footnotes(frame),
        )
        for title, frame in frames.items()
    }
    return str(environment().get_template("page.html.j2").module.document(tables))


def _latex(frames: Mapping[str, pl.DataFrame]) -> str:
    """Tables with booktabs' rules and the columns that a page has room for; what all rows share and footnotes below."""
    tables = ["% needs \\usepackage{booktabs}"]
    for title, frame in frames.items():
        columns, shared, layout = _columns(frame, title)
        names = [column.name for column, _ in fit(columns, layout, _PAGE_LETTERS).columns] or list(layout.keys)
        tables.append(str(_great_table(frame, title, names).as_latex()).strip())
        tables += [line.translate(_LATEX) for line in (shared, *footnotes(frame)) if line]
    return "\n\n".join(tables)


def _great_table(frame: pl.DataFrame, title: str, names: Sequence[str]) -> "GT":
    """Columns `names` as a table of great_tables, which escapes cells and headings; groups of protocols stand apart."""
    from great_tables import GT

    rows = pl.DataFrame(list(cells(frame)), schema=dict.fromkeys(shown(frame), pl.String), orient="row").select(names)
    if set(GROUP) <= set(names):
        rows = rows.with_columns(_groups(frame))
    # The page's anchors are made of names: those of a cross table are a row's own words.
    known = {name: name if told(name) == name else f"column {place}" for place, name in enumerate(names)}
    rows = rows.rename({name: known[name] for name in names})
    table = GT(rows, id=title, groupname_col="group" if "group" in rows.columns else None)
    return (
        table.cols_label({known[name]: header(name) for name in names})
        .cols_align("left")
        .cols_align("right", [known[name] for name in names if frame.schema[name].is_numeric()])
    )


def _groups(frame: pl.DataFrame) -> pl.Series:
    """Which group each row stands in: its protocol and dtype, and whether its depth is of learned directions."""
    learned = frame["kernel"].eq_missing("learned") if "kernel" in frame.columns else [False] * len(frame)
    names = [
        ", ".join(f"{n} {text(n, v)}" for n, v in zip(GROUP, row, strict=True))
        + (", learned directions" if is_learned else "")
        for row, is_learned in zip(frame.select(GROUP).rows(), learned, strict=True)
    ]
    return pl.Series("group", names, dtype=pl.String)
