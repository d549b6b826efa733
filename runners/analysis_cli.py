"""The commands that read result sets: leaderboard, families, compare, trend, report, publish."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from runners.console import (
    EXIT_FALSE,
    FORMATS,
    Debug,
    Format,
    Json,
    Results,
    UserError,
    one_of,
    print_frames,
)  # fmt: skip

app = typer.Typer()

GateFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Gate file (YAML): what may not get worse.")]


@app.command()
def leaderboard(
    results: Results,
    format: Format = "table",
    sort: Annotated[str, typer.Option(help="Column to rank by.")] = "depth",
    family: Annotated[str | None, typer.Option(help="Only this normalisation family.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Models ranked by the depth of their dead direction, like protocols together.

    Example: [bold]deadbench leaderboard results/quick --format md[/bold]
    """
    from analysis.leaderboard import leaderboard as rank
    from analysis.results import scan

    print_frames({"leaderboard": rank(scan(results), sort=sort, family=family)}, "json" if as_json else format)


@app.command()
def families(results: Results, format: Format = "table", as_json: Json = False, debug: Debug = False) -> None:
    """Each claim about the normalisation families as a row, with how many models hold it.

    Then what the parameters alone say of each family, how many parameter directions are dead, and every block of the
    residual stream that collapsed.

    Example: [bold]deadbench families results/quick[/bold]
    """
    from analysis.families import collapsed_blocks, confusion, dead_parameters
    from analysis.families import families as judge
    from analysis.results import scan

    reads = scan(results)
    frames = {"families": judge(reads, scan(results, "functional")), "confusion": confusion(reads)}
    frames["dead_parameters"] = dead_parameters(reads)
    frames["collapsed_blocks"] = collapsed_blocks(reads, scan(results, "blocks"))
    format = "json" if as_json else format
    print_frames({t: f for t, f in frames.items() if t == "families" or format == "json" or len(f)}, format)


@app.command()
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
    from analysis.dead import VERDICTS, dead_directions
    from analysis.results import scan

    one_of("--verdict", verdict, VERDICTS)
    tables = (scan(results, name) for name in ("reads", "norms", "spectra", "blocks"))
    found = dead_directions(*tables, every=every)
    known = scan(results).select("model").unique().collect()["model"].to_list()
    if model is not None and model not in known:
        raise UserError(f"--model {model!r} has no read here; choose {', '.join(sorted(known)[:20])}")
    found = found.filter(**{name: value for name, value in (("model", model), ("verdict", verdict)) if value})
    print_frames({"dead_directions": found}, "json" if as_json else format)


@app.command()
def compare(
    baseline: Annotated[str, typer.Argument(metavar="BASELINE", help="RESULTS, or RESULTS@REVISION.")],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="RESULTS, or RESULTS@REVISION.")],
    gate: GateFile = None,
    show_all: Annotated[bool, typer.Option("--all", help="Also list what did not change, or passed.")] = False,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="With --gate: write JUnit XML.")] = None,
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}, github.")] = "table",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What changed from one result set, or one checkpoint, to another, read by read. With a gate: exit 1 if it breaks.

    In GitHub Actions the gate's summary also goes to the job's page ($GITHUB_STEP_SUMMARY).

    Example: [bold]deadbench compare results/main results/branch --gate gate.yaml --junit gate.xml[/bold]

    Example: [bold]deadbench compare results/quick@step16 results/quick@step4096[/bold]
    """
    from analysis.compare import METRICS, open_side
    from analysis.compare import compare as differences
    from analysis.gate import broken, github_summary, headline, judge, load_gate, unjudged
    from analysis.gate import junit as junit_xml

    format = "json" if as_json else format
    one_of("--format", format, (*FORMATS, "github"))
    if gate is None and (junit is not None or format == "github"):
        raise UserError(f"{'--junit' if junit else '--format github'} reports a gate; give one with --gate FILE")
    _check_folder("--junit", junit)
    rules = load_gate(gate) if gate is not None else None
    asked = rules.scales() if rules else METRICS
    rows = differences(open_side(baseline), open_side(candidate), asked)
    if rules is None:
        print_frames({"compare": rows if show_all else rows.filter(rows["verdict"] != "same")}, format)
        return
    judged = judge(rows, rules)
    failures = broken(judged)
    if junit is not None:
        junit.write_text(junit_xml(judged), encoding="utf-8")
    if page := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(page, "a", encoding="utf-8") as file:
            file.write(github_summary(judged))
    shown = judged if show_all else failures
    if format == "github":
        print(github_summary(judged), end="")
    elif format == "json":
        from analysis.formats import plain_rows

        verdict = {"passed": failures.is_empty(), "num_checks": len(judged), "num_broken": len(failures)}
        print(json.dumps({"compare": plain_rows(shown), "gate": verdict}, indent=2))
    elif format != "table" or len(shown):
        print_frames({"compare": shown}, format)
    _say(headline(judged))
    for metric in unjudged(judged, rules):
        _say(f"{gate}: no read of the baseline has {metric}; it judged nothing")
    if len(failures):
        raise typer.Exit(EXIT_FALSE)


@app.command()
def trend(
    results: Results,
    model: Annotated[str, typer.Option(help="Model of the result set, or of the registry with --bisect.")],
    metric: Annotated[list[str] | None, typer.Option(help="Column of reads; may be repeated.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a plot: .svg or .png.")] = None,
    bisect: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Find the first checkpoint at which METRIC's gate breaks.")
    ] = None,
    gate: GateFile = None,
    registry: Annotated[Path | None, typer.Option(metavar="FILE", help="With --bisect. [default: models.yaml]")] = None,
    suite: Annotated[str | None, typer.Option(metavar="NAME", help="With --bisect: its protocol and input.")] = None,
    address: Annotated[str | None, typer.Option(help="With --bisect: Ray to join. [default: local]")] = None,
    format: Format = "table",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """A model's reads over its checkpoints in training order, with the change-point of each metric.

    Then its dead directions: how far v turned from one checkpoint to the next, and which directions opened when.

    --bisect takes the series from the registry and reads only the checkpoints it needs, log2 of their number, into
    RESULTS; the first checkpoint is the baseline. Exit code 1 when a checkpoint breaks the gate.

    Example: [bold]deadbench trend results/quick --model twin-layernorm --plot trend.svg[/bold]

    Example: [bold]deadbench trend results/bisect --model twin-layernorm --bisect depth --suite quick[/bold]
    """
    from analysis.dead import dead_directions
    from analysis.results import scan
    from analysis.trajectory import trajectory
    from analysis.trend import METRICS, checkpoints, summary

    _check_folder("--plot", plot)
    if bisect is not None:
        from runners.bisect import bisect_series

        found = bisect_series(results, model, bisect, gate, registry, suite, address, _say)
        if as_json or format == "json":
            print(json.dumps({"bisect": found._asdict()}, indent=2))
        else:
            print(found.sentence())
        raise typer.Exit(EXIT_FALSE if found.first_failing is not None else 0)
    metrics = metric or METRICS
    series = checkpoints(scan(results), model, metrics)
    sparks = summary(series, metrics)
    reads, norms, spectra, blocks = (scan(results, name) for name in ("reads", "norms", "spectra", "blocks"))
    dead = dead_directions(reads, norms, spectra, blocks, every=True)
    turns = trajectory(series, model, reads, norms, dead)
    if plot is not None:
        from analysis.export import save_plot
        from analysis.training_plots import trend_plot

        turned = series.with_columns(turns["angle"])
        save_plot(trend_plot(turned, sparks, [*metrics, "angle"]), plot)
        _say(f"wrote {plot}")
    if metric and format == "table" and not as_json:
        series = series.select("checkpoint_step", "revision", *metric, "protocol", "dtype")
        print_frames({"checkpoints": series, "metrics": sparks, "directions": turns}, format)
    else:
        print_frames({"trend": series, "metrics": sparks, "directions": turns}, "json" if as_json else format)


@app.command()
def report(
    results: Results,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.html", help="Page to write.")] = Path("report.html"),
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write each plot here, as files.")] = None,
    plot_format: Annotated[str, typer.Option(help="svg or png.")] = "svg",
    debug: Debug = False,
) -> None:
    """One self-contained page: leaderboard, claims and plots; no network needed to view it.

    Example: [bold]deadbench report results/quick -o report.html --plots plots[/bold]
    """
    from analysis.report import write_report

    one_of("--plot-format", plot_format, ("svg", "png"))
    _check_folder("--out", out)
    _check_folder("--plots", plots)
    specs = write_report(results, out)
    print(out)
    if plots is not None:
        from analysis.export import save_plots

        for path in save_plots(specs, plots, plot_format):
            print(path)


@app.command()
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
    from analysis.publish import publish as write

    print(write(results, target, title=title, license=data_license, private=private))


def _check_folder(option: str, path: Path | None) -> None:
    if path is not None and not path.resolve().parent.is_dir():
        raise UserError(f"{option} {path}: no such directory")


def _say(words: Any) -> None:
    """One line on stderr."""
    typer.echo(words, err=True)
