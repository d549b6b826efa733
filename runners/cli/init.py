"""`deadbench init`, and what a command without a model offers: the checkpoints that lie here."""

import contextlib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deadbench.runners.cli.console import EXIT_USAGE, Debug, UserError, say
from deadbench.suite.secrets import shown_place

if TYPE_CHECKING:
    from deadbench.suite.checkpoints.series import Series

DEFAULT_REGISTRY = "models.yaml"  # as the registry's own module has it, which takes long to import
_DEEP = 2  # folders below the one that is looked at
_MOST_FOLDERS = 2000
_SHOWN = 6


@dataclass(frozen=True)
class Found:
    """A checkpoint or a series that lies here; `source` as a user would type it."""

    source: str
    series: "Series | None"

    def what(self) -> str:
        """For people, in a few words."""
        if self.series is None:
            return "a checkpoint"
        names = self.series.names
        return f"{len(names)} checkpoints, {names[0]} to {names[-1]}" if len(names) > 1 else f"{names[0]} alone"


def init(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="[SOURCE]...", help="What to list. \\[default: what lies here]")
    ] = None,
    registry: Annotated[Path, typer.Option(metavar="FILE", help="Registry to write.")] = Path(DEFAULT_REGISTRY),
    debug: Debug = False,
) -> None:
    """Write a registry of your own: a line or two a model, folders of checkpoints as series.

    Without SOURCE it lists the checkpoints in this folder and two below it. A file that is there is left alone.

    Example: [bold]deadbench init[/bold]

    Example: [bold]deadbench init run0 openai-community/gpt2[/bold]
    """
    from deadbench.suite.storage import write_whole

    if registry.exists():
        raise UserError(f"{registry}: is there already, and is left as it is; --registry FILE writes another")
    if not registry.resolve().parent.is_dir():
        raise UserError(f"--registry {registry}: no such directory")
    found = _named(sources) if sources else found_below(Path())
    if not found:
        raise UserError("no checkpoint lies in this folder or below it; name some: deadbench init SOURCE...")
    write_whole(registry, _as_registry(found, registry).encode())
    for each in found:
        say(f"{shown_place(each.source)}: {each.what()}")
    print(registry)
    given = "" if registry == Path(DEFAULT_REGISTRY) else f" --registry {shlex.quote(str(registry))}"
    say(f"next: deadbench run{given} --out results")


def check_named(models: list[str] | None, suite: str | None, registry: Path | None) -> None:
    """Where no model, suite or registry is named, nor a registry here: offer what lies here, and end; exit code 2."""
    if models or suite is not None or registry is not None or Path(DEFAULT_REGISTRY).exists():
        return
    found = found_below(Path())
    if not found:
        return
    lines = [
        f"deadbench run {shlex.quote(shown_place(each.source))} --out results # {each.what()}"
        for each in found[:_SHOWN]
    ]
    more = [f"  … and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    rest = [
        "deadbench init # lists them in models.yaml: deadbench run then reads them all",
        "deadbench run --suite quick --out results # the models that come with deadbench",
    ]
    for line in ("deadbench: no model is named, and here are checkpoints. One of", *lines, *more, *rest):
        say(line)
    raise typer.Exit(EXIT_USAGE)


def found_below(folder: Path) -> list[Found]:
    """The checkpoints and series in `folder` and two below it, in the order of their names."""
    from deadbench.suite.checkpoints.series import series_in
    from deadbench.suite.storage import is_hidden

    found: list[Found] = []
    left = [(folder, 0)]
    for place, depth in left:
        series = series_in(str(place))
        if series is not None or (place / "config.json").is_file():
            found.append(Found(str(place), series))
        elif depth < _DEEP:
            with contextlib.suppress(OSError):  # a folder that is not ours to look into
                inside = sorted(each for each in place.iterdir() if each.is_dir() and not is_hidden(each.name))
                left += [(each, depth + 1) for each in inside[: max(0, _MOST_FOLDERS - len(left))]]
    return found


def _named(sources: list[str]) -> list[Found]:
    from deadbench.suite.checkpoints.series import Series, gathered
    from deadbench.suite.checkpoints.sources import is_source

    for source in sources:
        if not is_source(source):
            raise UserError(f"{shown_place(source)}: no such directory, and neither a Hub id (org/name) nor a URL")
    named = gathered(sources)
    return [Found(each.source, each) if isinstance(each, Series) else Found(each, None) for each in named]


def _as_registry(found: list[Found], registry: Path) -> str:
    import yaml

    ids: dict[str, str] = {}
    for each in found:
        wanted = each.series.name if each.series else each.source
        wanted = os.path.basename(os.path.abspath(wanted)) if wanted == "." or os.path.isabs(wanted) else wanted
        wanted = shown_place(wanted)  # an id is shown, and stored in every row
        plain = re.sub(r"[^\w.\-/]+", "-", wanted.partition("://")[2] or wanted).strip("-./") or "model"
        ids[each.source] = plain if plain not in ids.values() else f"{plain}-{len(ids)}"
    folder = registry.resolve().parent
    models = [{"id": ids[each.source], "source": _from(folder, each.source)} for each in found]
    head = (
        f"# What deadbench reads: `deadbench run` everything, `deadbench run {models[0]['id']}` one model.\n"
        "# A folder of checkpoints is read as a series, with those that come later. docs/registry.md has every key.\n"
    )
    return head + yaml.safe_dump({"models": models}, sort_keys=False, allow_unicode=True)


def _from(folder: Path, source: str) -> str:
    """A local source as a registry in `folder` names it."""
    from deadbench.suite.checkpoints.sources import locate

    place = locate(source)
    if os.path.isabs(source) or not os.path.isabs(place):
        return source
    below = os.path.relpath(place, folder)
    return f"../{folder.name}" if below == "." else below  # a bare dot would be any folder that deadbench is called in
