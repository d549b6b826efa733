"""One self-contained page: leaderboard, claims, plots. It loads nothing from a network and escapes all user strings."""

import contextlib
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

import polars as pl

from analysis.families import families
from analysis.formats import environment, html_rows
from analysis.leaderboard import leaderboard
from analysis.lines import failed_reads
from analysis.plots import MAX_MODELS, MAX_SPECTRA, depth_plot, spectra_plot, training_plot
from analysis.results import collected, latest, scan

MAX_ROWS = 500  # of a table on the page; the commands list everything
CLAIM_COLUMNS = [
    "statement", "num_models", "num_hold", "holds", "failing", "threshold", "value_median", "value_min", "value_max",
    "unit",
]  # fmt: skip
FAILED_COLUMNS = ["model", "revision", "read", "protocol", "attempt", "finished_at", "error"]


def write_report(location: str, out: Path) -> None:
    """Write the report of the result set at `location` to `out`, whole or not at all.

    Raises:
        ResultsError: no readable result set.
        OSError: `out` cannot be written.
    """
    page = report_page(location)
    out = out.resolve()  # a link stays a link
    aside = out.parent / f".{out.name}-{uuid.uuid4().hex[:8]}"
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, out)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def report_page(location: str) -> str:
    """The page as text."""
    reads = collected(scan(location)).lazy()
    board = leaderboard(reads)
    # Errors have a table of their own.
    unsaid = {"error"} if board["status"].ne_missing("ok").any() else {"error", "status"}
    failed = collected(failed_reads(reads).select(FAILED_COLUMNS))
    plots = _plots(reads, scan(location, "spectra"))
    return str(
        environment()
        .get_template("report.html.j2")
        .render(
            library=_vega(),
            facts=provenance(location, reads),
            leaderboard=_table(board.drop(name for name in board.columns if name in unsaid or _is_empty(board[name]))),
            claims=_table(families(reads).select(CLAIM_COLUMNS)),
            failed=_table(failed),
            plots=plots,
            specs=script_json([spec for _, _, spec in plots]),
        )
    )


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no `<` could end the element or open a comment."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def provenance(location: str, reads: pl.LazyFrame) -> dict[str, str]:
    """Where the numbers come from: result set, number of reads, runs, dates, devices, versions."""
    frame = collected(latest(reads))
    ok = frame.filter(pl.col("status") == "ok")
    first, final = frame["started_at"].min(), frame["finished_at"].max()
    runs = frame["run_id"].drop_nulls().unique().sort().to_list()
    dates = [f"{moment:%Y-%m-%d %H:%M} UTC" for moment in (first, final) if moment is not None]  # type: ignore[str-bytes-safe]
    return {
        "results": re.sub(r"//[^/@]*@", "//", location),  # a URI may carry a password, the page may be published
        "reads": f"{len(ok)} ok, {len(frame) - len(ok)} failed, of {frame['model'].n_unique()} models",
        "runs": f"{len(runs)}: {', '.join(runs[:5])}{', …' if len(runs) > 5 else ''}",
        "dates": " to ".join(dict.fromkeys(dates)) or "-",
        "devices": ", ".join(ok["device"].drop_nulls().unique().sort()) or "-",
        "versions": _versions(ok["versions"].drop_nulls().unique().sort().to_list()) or "-",
    }


def _vega() -> str:
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
        with contextlib.suppress(ValueError, AttributeError):
            for package, version in json.loads(text).items():
                found.setdefault(str(package), set()).add(str(version))
    return ", ".join(f"{package} {' and '.join(sorted(versions))}" for package, versions in found.items())


def _plots(reads: pl.LazyFrame, spectra: pl.LazyFrame) -> list[tuple[str, str, dict[str, Any]]]:
    """Title, caption and specification of the plots that have something to show."""
    plots = [
        (
            "Spectra of the final norm",
            "Eigenvalues of the output's covariance, the largest left, the bottom one right; a diamond is the variance "
            "along v. A LayerNorm's curve falls into its kernel at the last place. Hover for values, click a name to "
            f"single it out. (The {MAX_SPECTRA} deepest models at most.)",
            spectra_plot(reads, spectra),
        ),
        (
            "Depth",
            "Each model at random initialisation (circle) and after training (diamond). "
            f"(The {MAX_MODELS} deepest at most.)",
            depth_plot(reads),
        ),
        ("Depth over training", "Every checkpoint of the models that have several.", training_plot(reads, "depth")),
        ("Variance along v over training", "The same checkpoints: lambda_v.", training_plot(reads, "lambda_v")),
    ]
    return [(title, caption, spec) for title, caption, spec in plots if spec is not None]


def _table(frame: pl.DataFrame) -> dict[str, Any]:
    return html_rows(frame.head(MAX_ROWS)) | {"left_out": max(0, len(frame) - MAX_ROWS)}


def _is_empty(column: pl.Series) -> bool:
    return len(column) > 0 and column.null_count() == len(column)
