"""`deadbench compare`: what changed, from one result set or checkpoint to another."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deadbench.runners.cli.checkpoint_pair import (
    are_checkpoints,
    compare_checkpoints,
    frames_of_quantised_pair,
)
from deadbench.runners.cli.console import (
    EXIT_FALSE,
    FORMATS,
    Debug,
    Json,
    UserError,
    check_folder,
    one_of,
    print_frames,
    say,
)
from deadbench.runners.cli.options import GateFile

if TYPE_CHECKING:
    import polars as pl

_ONLY_HERE = ("bencher", "github")  # formats of a comparison


def compare(
    baseline: Annotated[str, typer.Argument(metavar="BASELINE", help="RESULTS, RESULTS@REVISION, or a SOURCE.")],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="The same; a SOURCE beside a SOURCE.")],
    gate: GateFile = None,
    show_all: Annotated[bool, typer.Option("--all", help="Also list what did not change, or passed.")] = False,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="With --gate: write JUnit XML.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the depths, candidate over baseline: .svg, .png or .pdf.")
    ] = None,
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join((*FORMATS, *_ONLY_HERE))}.")] = "table",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What changed from one result set, or one checkpoint, to another, read by read. With a gate: exit 1 if it breaks.

    Where both sides read the same sequences, noise is that of their paired difference. A check has three outcomes:
    passed, broken, cannot tell (exit 1 only by `cannot_tell: fail` in gate.yaml); `drift:` there bounds a slope.

    `--format bencher` is the candidate in Bencher's metric format (`bencher run --adapter json`).

    Of two checkpoints (folders, files, hf://ORG/NAME), one of them quantised: whether each norm's scale was moved into
    the maps that it feeds, as AWQ and SmoothQuant do, and into all of them; exit 1 where one was left unscaled. Result
    sets of such a pair show the same table, where the checkpoints are still here.

    In GitHub Actions the gate's summary also goes to the job's page ($GITHUB_STEP_SUMMARY).

    Example: [bold]deadbench compare results/main results/branch --gate gate.yaml --junit gate.xml[/bold]

    Example: [bold]deadbench compare results/quick@step16 results/quick@step4096[/bold]

    Example: [bold]deadbench compare ./model ./model-awq --all[/bold]
    """
    from deadbench.analysis.compare import METRICS
    from deadbench.analysis.compare import compare as differences
    from deadbench.analysis.drift import with_drift
    from deadbench.analysis.gate import broken, judge, load_gate, undecided, unjudged
    from deadbench.analysis.pages.gate_report import github_summary, headline, sides
    from deadbench.analysis.pages.gate_report import junit as junit_xml
    from deadbench.analysis.paired import Samples
    from deadbench.analysis.sides import open_side
    from deadbench.suite.storage import write_whole

    format = "json" if as_json else format
    one_of("--format", format, (*FORMATS, *_ONLY_HERE))
    if are_checkpoints(baseline, candidate):
        if gate is not None or plot is not None:
            raise UserError("--gate and --plot are of result sets, and these are checkpoints; leave them out")
        compare_checkpoints(baseline, candidate, format, show_all=show_all)
        return
    if gate is None and (junit is not None or format == "github"):
        raise UserError(f"{'--junit' if junit else '--format github'} reports a gate; give one with --gate FILE")
    check_folder("--junit", junit)
    check_folder("--plot", plot)
    rules = load_gate(gate) if gate is not None else None
    left, right = open_side(baseline), open_side(candidate)
    asked = rules.scales() if rules else METRICS
    rows = differences(left.reads, right.reads, asked, Samples(left.samples, right.samples))
    if plot is not None:
        _draw(rows, plot)
    if format == "bencher":
        from deadbench.analysis.bencher import bencher

        print(bencher(rows))
    if rules is None:
        if format != "bencher":
            _show(rows, frames_of_quantised_pair(left.reads, right.reads, show_all=show_all), format, show_all)
        return
    judged = with_drift(judge(rows, rules), right.until, rules)
    failures, unclear = broken(judged), undecided(judged)
    fails = len(failures) > 0 or (rules.cannot_tell == "fail" and len(unclear) > 0)
    if junit is not None:
        write_whole(junit, junit_xml(judged).encode())
    if page := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(page, "a", encoding="utf-8") as file:
            file.write(github_summary(judged, baseline, candidate))
    if format == "github":
        print(github_summary(judged, baseline, candidate), end="")
    elif format != "bencher":
        _show_judged(judged, failures, unclear, format, fails=fails, show_all=show_all)
    for line in (headline(judged), *sides(judged, baseline, candidate)):
        say(line)
    for metric in unjudged(judged, rules):
        say(f"{gate}: no read of the baseline has {metric}; it judged nothing")
    if fails:
        raise typer.Exit(EXIT_FALSE)


def _draw(rows: "pl.DataFrame", plot: Path) -> None:
    """Draw the depths.

    Raises:
        UserError: none was compared.
    """
    from deadbench.analysis.compare_seeds import compared_over_seeds
    from deadbench.analysis.plots.comparison import comparison_plot
    from deadbench.analysis.plots.export import save_plot

    spec = comparison_plot(compared_over_seeds(rows))
    if spec is None:
        raise UserError(f"--plot {plot}: no depth was compared; there is nothing to draw")
    save_plot(spec, plot)
    say(f"wrote {plot}")


def _show(rows: "pl.DataFrame", scaling: "dict[str, pl.DataFrame]", format: str, show_all: bool) -> None:
    """Print what changed, and the scaled norms of a quantised pair."""
    from deadbench.analysis.compare import num_reads
    from deadbench.analysis.compare_seeds import compared_over_seeds

    rows = compared_over_seeds(rows)
    shown = rows if show_all else rows.filter(rows["verdict"] != "same")
    if shown.is_empty():
        say(f"no differences: {num_reads(rows)} reads, {rows['metric'].n_unique()} metrics compared")
    if format != "table" or len(shown) or scaling:
        print_frames({"compare": shown} | scaling, format)


def _show_judged(
    judged: "pl.DataFrame",
    failures: "pl.DataFrame",
    unclear: "pl.DataFrame",
    format: str,
    *,
    fails: bool,
    show_all: bool,
) -> None:
    """Print the checks of a gate that did not pass, `failures` and `unclear`, or all."""
    import polars as pl

    from deadbench.analysis.formats import plain_rows

    shown = judged if show_all else pl.concat([failures, unclear])
    if format == "json":
        verdict = {"passed": not fails, "num_checks": len(judged), "num_broken": len(failures)}
        verdict["num_cannot_tell"] = len(unclear)
        print(json.dumps({"compare": plain_rows(shown), "gate": verdict}, indent=2))
    elif format != "table" or len(shown):
        print_frames({"compare": shown}, format)
