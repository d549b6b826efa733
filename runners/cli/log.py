"""`deadbench log`: the reads of a result set as curves in a tracker."""

import importlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deadbench.runners.cli.console import Debug, Json, Results, UserError, model_named
from deadbench.suite.errors import message
from deadbench.suite.secrets import shown_place

if TYPE_CHECKING:
    from deadbench.analysis.trackers.curves import Series

# What may stand before the colon of --to: the package that it needs, and what stands behind.
TRACKERS = {
    "tensorboard": ("tensorboard", "DIR"),
    "wandb": ("wandb", "PROJECT"),
    "mlflow": ("mlflow", "URI"),
}


def log(
    results: Results,
    to: Annotated[
        list[str], typer.Option("--to", metavar="TRACKER:PLACE", help="tensorboard:DIR, wandb:PROJECT or mlflow:URI.")
    ],
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The reads of a result set as curves over training step and tokens seen. Again: only what is new.

    A model, a kind of read, a protocol, a dtype and a seed together are one run of the tracker. Each tracker is an
    extra: pip install 'deadbench\\[tensorboard]'.

    Example: [bold]deadbench log results --to tensorboard:runs[/bold]

    Example: [bold]deadbench log results --to wandb:my-project --to mlflow:sqlite:///mlflow.db --model run0[/bold]
    """
    from deadbench.analysis.results import scan
    from deadbench.analysis.trackers.curves import series

    targets = [_parsed(each) for each in to]
    reads = scan(results)
    curves = series(reads, model_named(reads, model) if model is not None else None)
    values = sum(len(point.values) for each in curves for point in each.points)
    logged = []
    for tracker, place in targets:
        new = _logged(tracker, place, curves, results)
        shown = f"{tracker}:{shown_place(place)}"
        logged.append({"to": shown, "series": len(curves), "new": new})
        if not as_json:
            print(f"{shown}: {new} new values" + (" (all others were there)" if new < values else ""))
    if as_json:
        print(json.dumps({"log": logged}, indent=2))


def _parsed(target: str) -> tuple[str, str]:
    tracker, colon, place = target.partition(":")
    if tracker not in TRACKERS or not colon or (not place and tracker != "mlflow"):
        known = ", ".join(f"{name}:{place}" for name, (_, place) in TRACKERS.items())
        raise UserError(f"--to {shown_place(target)!r}: no such tracker and place; give {known}")
    return tracker, place


def _logged(tracker: str, place: str, curves: "Sequence[Series]", results: Sequence[str]) -> int:
    package, _ = TRACKERS[tracker]
    try:
        module: Any = importlib.import_module(f"deadbench.analysis.trackers.{tracker}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise UserError(f"--to {tracker}: needs {package}; pip install 'deadbench[{tracker}]'") from error
    try:
        return int(module.log(curves, place, results[0]) if tracker == "wandb" else module.log(curves, place))
    except Exception as error:  # each tracker raises classes of its own
        raise UserError(f"--to {tracker}:{shown_place(place)}: {message(error)}") from error
