"""One self-contained page: leaderboard, claims, plots. It loads nothing from a network and escapes all user strings."""

import contextlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from deadbench.analysis.cells import told
from deadbench.analysis.dead import dead_directions
from deadbench.analysis.families import collapsed_blocks, confusion, dead_parameters, families
from deadbench.analysis.formats import environment, html_rows
from deadbench.analysis.glossary import TERMS
from deadbench.analysis.leaderboard import leaderboard
from deadbench.analysis.lines import failed_reads
from deadbench.analysis.pages.plots import Plot, report_plots
from deadbench.analysis.plots.axes import Spec, row_anchor
from deadbench.analysis.results import collected, latest, scan
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import write_whole

_MAX_FACT = 2000  # letters
MAX_ROWS = 500  # of a table on the page; the commands list everything
CLAIM_COLUMNS = [
    "holds", "statement", "num_hold", "num_models", "failing", "threshold", "value_median", "value_low", "value_high",
    "value_min", "value_max", "value_margin", "value_seed_spread", "value_token_error", "unit",
]  # fmt: skip
DEAD_COLUMNS = [
    "model", "revision", "read", "site", "coordinates", "weights", "depth", "at_random", "opened_step",
    "in_checkpoints", "num_checkpoints", "in_runs", "num_runs",
]  # fmt: skip
FAILED_COLUMNS = ["model", "revision", "read", "protocol", "attempt", "finished_at", "error"]


def write_report(locations: str | Sequence[str], out: Path) -> list[tuple[str, Spec]]:
    """Write the report of the result sets at `locations` to `out`, whole or not at all; returns its plots by title.

    A plot of one family has its name in the title.

    Raises:
        ResultsError: no readable result set.
        OSError: `out` cannot be written.
    """
    page, plots = report_page(locations)
    write_whole(out, page.encode())
    return [(f"{title} {name}".strip(), spec) for title, _, panels in plots for name, spec in panels]


def report_page(locations: str | Sequence[str]) -> tuple[str, list[Plot]]:
    """The page as text, and its plots."""
    reads = collected(scan(locations)).lazy()
    blocks = collected(scan(locations, "blocks")).lazy()
    spectra, norms, functional = (scan(locations, name) for name in ("spectra", "norms", "functional"))
    board, claims = leaderboard(reads), families(reads, functional)
    dead = dead_directions(reads, norms, spectra, blocks)
    # Errors have a table of their own.
    unsaid = {"error"} if board["status"].ne_missing("ok").any() else {"error", "status"}
    unsaid |= {name for name in board.columns if _is_empty(board[name])}
    unsaid |= {name for name in ("num_seeds", "num_replicates") if (board[name].fill_null(1) == 1).all()}
    plots = report_plots(reads, blocks, spectra, norms, functional)
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            library=vega(),
            facts=provenance(locations, reads),
            tiles=_tiles(board, claims),
            leaderboard=_table(board.drop(name for name in board.columns if name in unsaid))
            | {"anchors": _anchors(board)},
            claims=_table(claims.select(CLAIM_COLUMNS)),
            confusion=_table(confusion(reads)),
            dead_parameters=_table(dead_parameters(reads)),
            dead=_table(dead.filter(pl.col("verdict") == "learned").select(DEAD_COLUMNS)),
            collapsed=_table(collapsed_blocks(reads, blocks).drop("state", "sigma_min", "num_blocks")),
            failed=_table(collected(failed_reads(reads).select(FAILED_COLUMNS))),
            plots=plots,
            glossary=TERMS,
            specs=script_json([spec for _, _, panels in plots for _, spec in panels]),
        )
    )
    return page, plots


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no `<` could end the element or open a comment."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def provenance(locations: str | Sequence[str], reads: pl.LazyFrame) -> dict[str, str]:
    """Where the numbers come from: result set, number of reads, runs, dates, devices, versions."""
    places = [locations] if isinstance(locations, str) else locations
    frame = collected(latest(reads))
    ok = frame.filter(pl.col("status") == "ok")
    first, final = frame["started_at"].min(), frame["finished_at"].max()
    runs = frame["run_id"].drop_nulls().unique().sort().to_list()
    dates = [f"{moment:%Y-%m-%d %H:%M} UTC" for moment in (first, final) if moment is not None]  # type: ignore[str-bytes-safe]
    facts = {
        "results": ", ".join(map(shown_place, places)),  # a URI may carry a password, and the page may be published
        "reads": f"{len(ok)} ok, {len(frame) - len(ok)} failed, of {frame['model'].n_unique()} models",
        "runs": f"{len(runs)}: {', '.join(runs[:5])}{', …' if len(runs) > 5 else ''}",
        "dates": " to ".join(dict.fromkeys(dates)) or "-",
        "protocols": _listed(frame, ["protocol", "dtype"]),
        "inputs": _listed(ok, ["input"]),
        "tokens": _range(ok["num_tokens"]),
        "devices": ", ".join(ok["device"].drop_nulls().unique().sort()) or "-",
        "versions": _versions(ok["versions"].drop_nulls().unique().sort().to_list()) or "-",
    }
    return {name: told(value, _MAX_FACT) for name, value in facts.items()}


def _listed(frame: pl.DataFrame, names: list[str], limit: int = 8) -> str:
    joined = pl.concat_str(names, separator=" ", ignore_nulls=True).alias("text")
    found = frame.select(joined.replace("", None).drop_nulls().unique().sort())["text"].to_list()
    return ", ".join(found[:limit]) + (", …" if len(found) > limit else "") or "-"


def _range(counts: pl.Series) -> str:
    if (counts := counts.drop_nulls()).is_empty():
        return "-"
    return " to ".join(dict.fromkeys(f"{value:,}" for value in counts.sort().gather([0, -1]).to_list()))


def _tiles(board: pl.DataFrame, claims: pl.DataFrame) -> list[tuple[str, str]]:
    """The page in four numbers."""
    tested = claims.filter(pl.col("num_models") > 0)
    depths = board.filter(pl.col("kernel").ne_missing("learned"))["depth"].drop_nulls().to_list()
    return [
        (str(board["model"].n_unique()), "models"),
        (f"{tested['holds'].sum()} of {len(tested)}", "claims hold on all models tested"),
        (f"{max(depths):.1f}" if depths else "-", "decades, the deepest kernel"),
        (str(int((board["num_learned"].fill_null(0) > 0).sum())), "models with learned dead directions"),
    ]


@cache
def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, of the version that Altair writes for."""
    import altair as alt
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)).replace(
        "</script", "<\\/script"
    )


def _versions(stored: list[str]) -> str:
    """`torch 2.13.0, ray 2.60.0`; where the reads differ, all versions of a package."""
    found: dict[str, set[str]] = {}
    for text in stored:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            for package, version in json.loads(text).items():
                found.setdefault(str(package), set()).add(str(version))
    return ", ".join(f"{package} {' and '.join(sorted(versions))}" for package, versions in found.items())


def _table(frame: pl.DataFrame) -> dict[str, Any]:
    return html_rows(frame.head(MAX_ROWS)) | {"left_out": max(0, len(frame) - MAX_ROWS)}


def _anchors(board: pl.DataFrame) -> list[str | None]:
    """The anchor of each row; of two names that are one without their signs, the first has it."""
    anchor = row_anchor()
    return board.head(MAX_ROWS).select(pl.when(anchor.is_first_distinct()).then(anchor)).to_series().to_list()


def _is_empty(column: pl.Series) -> bool:
    return len(column) > 0 and column.null_count() == len(column)
