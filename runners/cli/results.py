"""The commands that read result sets: leaderboard, families, dead, report, publish."""

from pathlib import Path
from typing import Annotated

import typer

from deadbench.runners.cli.console import (
    Debug,
    Format,
    Json,
    Results,
    UserError,
    check_folder,
    model_named,
    one_of,
    print_frames,
)


def leaderboard(
    results: Results,
    format: Format = "table",
    sort: Annotated[str, typer.Option(help="Column to rank by.")] = "depth",
    family: Annotated[str | None, typer.Option(help="Only this normalisation family.")] = None,
    beside: Annotated[
        list[str] | None, typer.Option("--with", metavar="RESULTS", help="Further result sets; `reference` is ours.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Models ranked by the depth of their dead direction, like protocols together.

    `reference` is the result set that comes with deadbench: the paper's models at their own size.

    Example: [bold]deadbench leaderboard results/quick --format md[/bold]

    Example: [bold]deadbench leaderboard results/quick --with reference[/bold]
    """
    from deadbench.analysis.leaderboard import leaderboard as rank
    from deadbench.analysis.results import scan

    board = rank(scan([*results, *(beside or [])]), sort=sort, family=family)
    print_frames({"leaderboard": board}, "json" if as_json else format, keep=[sort])


def families(results: Results, format: Format = "table", as_json: Json = False, debug: Debug = False) -> None:
    """Each claim about the normalisation families as a row, with how many models hold it.

    Then what the parameters alone say of each family, how many parameter directions are dead, and every block of the
    residual stream that collapsed.

    Example: [bold]deadbench families results/quick[/bold]
    """
    from deadbench.analysis.families import collapsed_blocks, confusion, dead_parameters
    from deadbench.analysis.families import families as judge
    from deadbench.analysis.results import scan

    reads = scan(results)
    frames = {"families": judge(reads, scan(results, "functional")), "confusion": confusion(reads)}
    frames["dead_parameters"] = dead_parameters(reads)
    frames["collapsed_blocks"] = collapsed_blocks(reads, scan(results, "blocks"))
    format = "json" if as_json else format
    print_frames({t: f for t, f in frames.items() if t == "families" or format == "json" or len(f)}, format)


def dead(
    results: Results,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    verdict: Annotated[
        str | None, typer.Option(help="Only these: learned, algebraic, rounding or collapsed (residual stream).")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint, not the last one alone.")] = False,
    format: Format = "table",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Each dead direction: site, coordinates, depth, verdict, and which checkpoints and other runs have it too.

    Zero scales of every norm, dead directions of the final norm's output, and collapsed ones of the residual stream.

    Example: [bold]deadbench dead results --verdict learned[/bold]
    """
    from deadbench.analysis.dead import VERDICTS, dead_directions
    from deadbench.analysis.lines import distinct
    from deadbench.analysis.results import collected, scan

    one_of("--verdict", verdict, VERDICTS)
    tables = (scan(results, name) for name in ("reads", "norms", "spectra", "blocks"))
    found = dead_directions(*tables, every=every)
    known = distinct(collected(scan(results).select("model"))["model"])
    model = model_named(scan(results), model) if model is not None else None
    if model is not None and model not in known:
        raise UserError(f"--model {model!r} has no read here; choose {', '.join(known[:20])}")
    found = found.filter(**{name: value for name, value in (("model", model), ("verdict", verdict)) if value})
    print_frames({"dead_directions": found}, "json" if as_json else format)


def report(
    results: Results,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.html", help="Page to write.")] = Path("report.html"),
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write each plot here, as files.")] = None,
    plot_format: Annotated[str, typer.Option(help="svg, png or pdf.")] = "svg",
    debug: Debug = False,
) -> None:
    """One self-contained page: leaderboard, claims and plots; no network needed to view it.

    Example: [bold]deadbench report results/quick -o report.html --plots plots[/bold]
    """
    from deadbench.analysis.pages.report import write_report
    from deadbench.analysis.plots.export import FORMATS

    one_of("--plot-format", plot_format, FORMATS)
    check_folder("--out", out)
    check_folder("--plots", plots)
    specs = write_report(results, out)
    print(out)
    if plots is not None:
        from deadbench.analysis.plots.export import save_plots

        for path in save_plots(specs, plots, plot_format):
            print(path)


def publish(
    results: Results,
    target: Annotated[str, typer.Option("--to", metavar="TARGET", help="A new folder, or hf://datasets/OWNER/NAME.")],
    title: Annotated[str, typer.Option(help="Title of the data card.")] = "Dead directions of transformers",
    data_license: Annotated[str, typer.Option("--license", help="Licence of the numbers.")] = "cc-by-4.0",
    private: Annotated[bool, typer.Option("--private", help="A new Hub repository is private.")] = False,
    debug: Debug = False,
) -> None:
    """Leaderboard, claims, report, all results and a data card, in a folder or a dataset of the Hub.

    Example: [bold]deadbench publish results/quick --to published[/bold]
    """
    from deadbench.analysis.pages.publish import publish as write

    print(write(results, target, title=title, license=data_license, private=private))
