"""`deadbench classify` and `deadbench export`: what the parameters alone say."""

import contextlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from deadbench.runners.cli.console import EXIT_FALSE, Debug, Json, UserError, console
from deadbench.runners.cli.options import Config, ModelType, given_config
from deadbench.suite.plain_text import MAX_LINE, plain

_CLASSIFY_THREADS = 8


def classify(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCE]...", help="Folders (of checkpoints too), Hub ids, URLs."),
    ] = None,
    save_direction: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="Write the inverse-scale directions (float64).")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Resolve by the modules' behaviour although the atlas has the architecture."),
    ] = False,
    module: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE:CLASS", help="Your own norm class, imported and put to the kernel test."),
    ] = None,
    config: Config = None,
    model_type: ModelType = None,
    width: Annotated[int, typer.Option(min=2, help="Width that the class of --module is built with.")] = 64,
    allow_undetermined: Annotated[
        bool, typer.Option("--allow-undetermined", help="Exit with 0 although a family is undetermined.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Normalisation family, final norm and dead direction of checkpoints, from their parameters alone.

    Opens only headers, the configuration, the final norm's tensors and, of an RMSNorm, eight rows of its embedding
    (where they sum to zero, 64, and what else writes to the stream). Exit code 1 when a source could not be read,
    or its family stayed undetermined.

    Example: [bold]deadbench classify openai-community/gpt2 ./my-checkpoint --save-direction v.safetensors[/bold]
    """
    if module is not None:
        if sources or save_direction is not None:
            raise UserError("--module tests a class by itself; leave out SOURCE and --save-direction")
        _classify_module(module, width, as_json)
        return
    if not sources:
        raise UserError("Missing argument 'SOURCE...'; give a checkpoint, or --module package:Class")
    from deadbench.suite.checkpoints.series import Series, gathered
    from deadbench.suite.reads.classify import classify as classify_one

    given = given_config(config)
    if save_direction is not None and not save_direction.resolve().parent.is_dir():
        raise UserError(f"--save-direction {save_direction}: no such directory")
    parts = [each.sources() if isinstance(each, Series) else [each] for each in gathered(sources)]
    sources = [source for part in parts for source in part]
    read: list[tuple[dict[str, Any], Any]] = []
    with ThreadPoolExecutor(_CLASSIFY_THREADS) as pool:  # remote sources wait for their servers side by side
        for result in pool.map(lambda s: classify_one(s, verify, given, model_type), sources):
            if len(sources) > 1 and sys.stderr.isatty():
                print(f"{len(read) + 1}/{len(sources)} {result[0]['source']}", file=sys.stderr)
            read.append(result)
    results = [result for result, _ in read]
    if save_direction is not None:
        from deadbench.runners.results.directions_file import save_directions

        save_directions(save_direction, read)
    if as_json:
        print(json.dumps({"sources": results}, indent=2))
    else:
        _print_classified(results)
    undetermined = [result["source"] for result in results if result["family"] == "undetermined"]
    if undetermined and not allow_undetermined:
        told = f"deadbench: undetermined: {', '.join(undetermined)}; --allow-undetermined exits with 0"
        print(plain(told, MAX_LINE), file=sys.stderr)
    if any(result["error"] for result in results) or (undetermined and not allow_undetermined):
        raise typer.Exit(EXIT_FALSE)


def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder, Hub id (org/name\\[@rev]), or URL.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.safetensors", help="File to write.")],
    config: Config = None,
    model_type: ModelType = None,
    debug: Debug = False,
) -> None:
    """Dead directions of every norm of a checkpoint as safetensors, for other programs; from its parameters alone.

    Each norm's inverse-scale direction, predicted dead subspace and shift, in float64; names in the metadata.

    Example: [bold]deadbench export openai-community/gpt2 -o directions.safetensors[/bold]
    """
    from deadbench.runners.results.directions_file import export_directions

    if not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: no such directory")
    count = export_directions(source, out, given_config(config), model_type)
    print(plain(f"{out}: {count} norms", MAX_LINE))


def _print_classified(results: list[dict[str, Any]]) -> None:
    from deadbench.analysis.terminal import NOTHING, Column, Layout, table

    def told(name: str) -> list[str]:
        return [str(result.get(name) or NOTHING) for result in results]

    def number(name: str, form: str) -> list[str]:
        return [NOTHING if result.get(name) is None else format(result[name], form) for result in results]

    families = [NOTHING if result["error"] else result["family"] for result in results]
    read = [NOTHING if r["error"] else f"{r['bytes_read']:,} of {r['bytes_total']:,}" for r in results]
    columns = [
        Column("source", "source", [result["source"] for result in results]),
        Column("family", "family", families),
        Column("final_norm", "final norm", told("final_norm")),
        Column("placement", "placement", told("placement")),
        Column("scale", "scale", told("scale")),
        Column("hidden_size", "D", told("hidden_size"), is_text=False),
        Column("num_zero_scales", "zero", number("num_zero_scales", "d"), is_text=False),
        Column("depth_predicted", "depth", number("depth_predicted", ".2f"), is_text=False),
        Column("bytes_read", "bytes read", read, is_text=False),
    ]
    layout = Layout(
        [column.name for column in columns],
        keys=["source", "family", "depth_predicted"],
        dropped=["bytes_read", "placement", "scale", "hidden_size", "final_norm", "num_zero_scales"],
    )
    terminal = console()
    terminal.print(table(columns, layout, width=terminal.width, notes=_reasons(results), elsewhere="--json"))


def _reasons(results: list[dict[str, Any]]) -> list[str]:
    """Why a source has no final norm, or could not be read; that a depth is of zero scales."""
    reasons = []
    for result in results:
        reason = result["error"] or ("" if result["final_norm"] else "; ".join(result["evidence"]))
        if not reason and result["num_zero_scales"]:
            reason = f"{result['num_zero_scales']} zero scales: the depth is of learned directions, not of a kernel"
        if reason:
            reasons.append(reason if reason.startswith(result["source"]) else f"{result['source']}: {reason}")
    return reasons


def _classify_module(name: str, width: int, as_json: bool) -> None:
    """Print what the kernel test finds in a user's own class; exit code 1 where it is no known normalisation."""
    from deadbench.suite.architectures.kernel_test import kernel_dimension, load_norm_class, probe

    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own folder, as with `python -m`
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no part of the answer
        module = load_norm_class(name, width)
        found, dimension = probe(module, width), kernel_dimension(module, width)
    facts = {
        "module": name,
        "family": found.family,
        "kernel": None if dimension is None else dimension > 0,
        "kernel_dimension": dimension,
        "scale": found.scale,
        "has_bias": None if found.family == "other" else found.shift_parameter is not None,
        "eps": found.eps,
        "evidence": list(found.evidence),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        verdict = "whether it has dead directions cannot be told"
        if dimension is not None:
            verdict = f"{dimension} dead of {width} output directions"
            verdict += ", gamma^-1" if found.family == "layernorm" and dimension == 1 else ""
        print(f"{name}: {found.family}, {verdict} ({'; '.join(found.evidence)})")
    if found.family == "other":
        raise typer.Exit(EXIT_FALSE)
