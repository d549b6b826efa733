"""Plots as files of their own: svg, png or pdf, by the ending of the name."""

import re
from collections.abc import Iterable
from pathlib import Path

from deadbench.analysis.plots.axes import Spec
from deadbench.analysis.results import ResultsError
from deadbench.suite.storage import write_whole

WIDTH = 860  # pixels; on the page a plot is as wide as the window
FORMATS = ("svg", "png", "pdf")
# As on the page in its light theme.
_CONFIG = {
    "background": "white",
    "view": {"stroke": "#d8dee4"},
    "axis": {
        "gridColor": "#d8dee4",
        "gridOpacity": 0.6,
        "titleFontWeight": "normal",
        "titleFontSize": 15,
        "labelFontSize": 13,
        "labelLimit": 420,
        "titlePadding": 8,
    },
    "legend": {
        "labelLimit": 330,
        "labelFontSize": 14,
        "columns": 3,
        "symbolStrokeWidth": 2,
        "symbolSize": 90,
        "offset": 8,
    },
}


def save_plots(plots: Iterable[tuple[str, Spec]], folder: Path, format: str) -> list[Path]:
    """Each (title, specification) as `folder/spectra-of-the-final-norm.svg`; returns the paths.

    Raises:
        ResultsError: see `save_plot`.
    """
    folder.mkdir(exist_ok=True)
    paths = []
    for title, spec in plots:
        paths.append(folder / f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.{format}")
        save_plot(spec, paths[-1])
    return paths


def save_plot(spec: Spec, path: Path) -> None:
    """One plot, in the format of the file's ending.

    Raises:
        ResultsError: another ending than svg, png or pdf.
    """
    import altair as alt
    import vl_convert

    format = path.suffix.removeprefix(".").lower()
    if format not in FORMATS:
        raise ResultsError(
            f"{path}: a plot is written as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; end the file's name so"
        )
    fixed = {name: value for name, value in spec.items() if name != "autosize"}
    if fixed.get("width") == "container":
        fixed["width"] = WIDTH
    fixed["config"] = fixed.get("config", {}) | _CONFIG
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    if format == "svg":
        data = vl_convert.vegalite_to_svg(fixed, vl_version=version).encode()
    elif format == "pdf":
        data = vl_convert.vegalite_to_pdf(fixed, vl_version=version)
    else:
        data = vl_convert.vegalite_to_png(fixed, vl_version=version, scale=2)
    write_whole(path, data)
