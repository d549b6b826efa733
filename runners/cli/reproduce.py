"""`deadbench reproduce`: the command that made a row, run again, and the two rows beside each other."""

import contextlib
import difflib
import json
import math
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deadbench.runners.cli import options
from deadbench.runners.cli.console import (
    EXIT_FALSE,
    Debug,
    Format,
    Json,
    UserError,
    model_named,
    one_of,
    print_frames,
    say,
)
from deadbench.runners.cli.run import execute_jobs, run
from deadbench.suite.read_specs import READ_SPECS
from deadbench.suite.secrets import shown_place

if TYPE_CHECKING:
    import polars as pl

    from deadbench.analysis.paired import Samples
    from deadbench.runners.jobs.job import ModelJob

_PROGRAMS = ("deadbench", "deadbench.exe")
_ROUNDING = 1e-6  # of a value: float32 arithmetic in another order
_TAKEN_OUT = "***"
_OVERRIDES = (
    "engine", "tokens", "input_spec", "dtype", "seed", "accumulator_gb", "tensor_parallel", "replicas", "config",
    "model_type", "taps",
)  # fmt: skip
_HERE = (None, "local", "none")  # addresses that every machine has
# Numbers of how a row was made, which differ from run to run.
_HOW = {
    "load_seconds", "forward_seconds", "spectrum_seconds", "peak_device_bytes", "peak_host_bytes", "attempt",
    "tensor_parallel",
}  # fmt: skip


def reproduce(
    results: Annotated[str, typer.Argument(metavar="RESULTS", help="A result set: folder or URI.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Of the result set.")],
    read: Annotated[str | None, typer.Option(help="Only this read. \\[default: each that the command made]")] = None,
    revision: Annotated[str | None, typer.Option(help="Only this checkpoint.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray to join: local, auto, host:port; none: without. \\[default: the command's]")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where the new rows go, a new folder. \\[default: a temporary one]"),
    ] = None,
    format: Format = "table",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the stored command of a row again, and show the two rows beside each other.

    The command is that of the newest run which read the model; it is given again for this model alone, in this folder.
    Exit code 1 where a value differs beyond its noise, or beyond rounding where it has none.

    Example: [bold]deadbench reproduce results/quick twin-layernorm --read trained[/bold]
    """
    from deadbench.analysis.formats import plain_rows
    from deadbench.analysis.paired import Samples
    from deadbench.analysis.results import collected, latest, scan

    one_of("--read", read, tuple(READ_SPECS))
    reads = scan(results)
    model = model_named(reads, model)
    known = collected(latest(reads))
    if model not in known["model"]:
        raise UserError(f"{model!r} has no read in {results}; choose {', '.join(_near(model, known['model']))}")
    asked = {name: value for name, value in (("read", read), ("revision", revision)) if value is not None}
    rows = known.filter(model=model, status="ok", **asked).sort("finished_at", descending=True, nulls_last=True)
    if rows.is_empty():
        raise UserError(f"{model}: no finished read of {', '.join(asked.values()) or 'it'} in {results}")
    run_id = str(rows["run_id"][0])
    rows = rows.filter(run_id=run_id)
    told = _stored_options(results, run_id)
    folder = out or tempfile.mkdtemp(prefix="deadbench-reproduced-")
    if out is not None and Path(out).exists():
        shown = shown_place(out)
        raise UserError(f"--out {shown}: is there already; give a new folder, in which nothing else was read")
    address = address or told["address"]
    if address not in _HERE and address == told["address"]:
        raise UserError(f"run {run_id} was on the cluster {address}; give --address {address} to join it, or none")
    _run_again(told, model, rows, folder, address, debug)
    made = collected(latest(scan(folder)))
    table = _beside(rows, made, Samples(scan(results, "samples"), scan(folder, "samples")))
    versions = _versions(rows["versions"].to_list(), made["versions"].to_list())
    num_differing = int((table["verdict"] == "differs").sum())
    if as_json or format == "json":
        verdict = {"run_id": run_id, "out": shown_place(folder), "equal": not num_differing, "versions": versions}
        print(json.dumps({"reproduce": plain_rows(table), "verdict": verdict}, indent=2))
    else:
        print_frames({"reproduce": table}, format)
    for package, (before, now) in versions.items():
        say(f"{package}: {before} then, {now} now")
    counts = f"{int(table['equal'].sum())} of {len(table)} values equal to the bit, {num_differing} differ"
    say(f"{counts}; rows in {shown_place(folder)}")
    if num_differing:
        raise typer.Exit(EXIT_FALSE)


def _near(model: str, known: "pl.Series") -> list[str]:
    """The models that were meant, as far as can be told; else the first twenty."""
    from deadbench.analysis.lines import distinct

    names = distinct(known)
    within = [name for name in names if model.lower() in name.lower()]
    return within or difflib.get_close_matches(model, names, n=3) or names[:20]


def _stored_options(results: str, run_id: str) -> dict[str, Any]:
    """What the command of a run says, as the program's own parser reads it; nothing of it is given to a shell.

    Raises:
        UserError: there is no record of the run, or its command cannot or must not be given again.
    """
    from deadbench.analysis.results import place_of
    from deadbench.runners.results.reader import ResultReader

    where = f"{results}/runs/{run_id}/run.json"
    text = ResultReader(place_of(results)).read_text(f"runs/{run_id}/run.json")
    if text is None:
        raise UserError(f"{where}: no such record; rows of deadbench.measure, callbacks and pytest have no command")
    try:
        command = json.loads(text)["command"]
        if not isinstance(command, str):  # of None shlex reads what is typed
            raise TypeError("no text")
        words = shlex.split(command)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: no record of a run; it has no command that can be read") from error
    if _TAKEN_OUT in command:
        raise UserError(f"{where}: secrets were taken out of its command; give it again yourself: {command}")
    if len(words) < 2 or not _is_ours(words[0]) or words[1] != "run":
        raise UserError(f"{where}: its command is no `deadbench run` ({command}); that row cannot be made again so")
    return _parsed(words[2:], where, command)


def _is_ours(program: str) -> bool:
    path = Path(program)
    return path.name in _PROGRAMS or (path.name == "__main__.py" and path.parent.name in ("deadbench", "runners"))


def _parsed(words: list[str], where: str, command: str) -> dict[str, Any]:
    from typer.exceptions import TyperException
    from typer.main import get_command

    app = typer.Typer(add_completion=False)
    app.command()(run)
    try:
        given = get_command(app).make_context("run", words).params
    except (TyperException, typer.Exit) as error:
        raise UserError(f"{where}: this version does not understand its command ({command})") from error
    if given["factory"] is not None:  # which would be imported and run, and a result set may be anybody's
        raise UserError(f"{where}: its command runs code of its folder; give it again yourself: {command}")
    return dict(given)


def _run_again(
    told: dict[str, Any], model: str, rows: "pl.DataFrame", folder: str, address: str | None, debug: bool
) -> None:
    """Read what `rows` are of, as the options `told` say, and nothing else; a read that fails is a row in `folder`.

    Raises:
        UserError: the command does not make these rows here.
    """
    from deadbench.runners.driver.loop import Settings
    from deadbench.runners.planning.assign import place_jobs

    names, suite = told["models"], told["suite"]
    if not names:
        names, suite = [model], suite or options.registry_at(told["registry"], needed=True, names=[])[0].default_suite()
    overrides = options.overridden(**{name: told[name] for name in _OVERRIDES})
    jobs, cluster, _ = options.jobs_and_cluster(
        names, suite, told["registry"], told["reads"], overrides, address=address
    )
    wanted = {(read, revision): engine for read, revision, engine in rows.select("read", "revision", "engine").rows()}
    ours = [
        replace(job, reads=tuple(each for each in job.reads if (each.read, each.revision) in wanted))
        for job in jobs
        if job.model_id == model
    ]
    if not any(job.reads for job in ours):
        raise UserError(f"{model}: its command makes no such row in this folder; go where it was given, and try again")
    ours = [job for job in ours if job.reads]
    placed, remarks = place_jobs([_by_engines(job, wanted) for job in ours], cluster)
    if remarks:  # those engines have no room here: the plan's, then
        placed, remarks = place_jobs(ours, cluster)
    settings = Settings(address, told["timeout"], told["max_retries"], (), told["checkpoint_interval"])
    execute_jobs(placed, folder, True, settings, remarks, "text", debug)


def _by_engines(job: "ModelJob", engines: dict[tuple[str, str | None], str | None]) -> "ModelJob":
    """`job`, of which what the plan may place is done by the engine that its row has."""

    def same(read: Any) -> Any:
        engine = engines[read.read, read.revision]
        known = engine in {each.engine for each in read.by_any_engine()}
        return replace(read, engine=engine, auto=False) if read.auto and known else read

    return replace(job, reads=tuple(map(same, job.reads)))


def _beside(stored: "pl.DataFrame", made: "pl.DataFrame", samples: "Samples") -> "pl.DataFrame":
    """A row for every read and number: stored, now, difference, whether they are equal to the bit, and a verdict."""
    import polars as pl

    from deadbench.analysis.compare import METRICS, compare, unit_of
    from deadbench.suite.schema import READS

    names = [column.name for column in READS if unit_of(column.name) is not None and column.name not in _HOW]
    rows = []
    noise = {}
    if (made["status"] == "ok").any():
        compared = compare(stored.lazy(), made.lazy(), METRICS, samples)
        for row in compared.filter(pl.col("metric").is_not_null()).iter_rows(named=True):
            noise[row["read"], row["revision"], row["metric"]] = row["verdict"] in ("same", "noise")
    for before in stored.sort("read", "revision", nulls_last=False).iter_rows(named=True):
        found = made.filter(read=before["read"]).filter(pl.col("revision").eq_missing(pl.lit(before["revision"])))
        now = found.row(0, named=True) if len(found) else {}
        for name in names:
            old, new = _number(before[name]), _number(now.get(name))
            if old is None and new is None:
                continue
            rows.append(
                {
                    "revision": before["revision"],
                    "read": before["read"],
                    "metric": name,
                    "stored": old,
                    "now": new,
                    "difference": None if old is None or new is None else new - old,
                    "equal": old == new,
                    "verdict": _verdict(old, new, noise.get((before["read"], before["revision"], name), False)),
                    "error": now.get("error", "not read: the command no longer makes this row"),
                }
            )
    table = pl.DataFrame(rows, infer_schema_length=None)
    return table if table["error"].null_count() < len(table) else table.drop("error")


def _verdict(old: float | None, new: float | None, within_noise: bool) -> str:
    if old == new:
        return "equal"
    if old is None or new is None:
        return "differs"
    if abs(new - old) <= _ROUNDING * max(abs(old), abs(new)):
        return "rounding"
    return "noise" if within_noise else "differs"


def _number(value: Any) -> float | None:
    number = None if value is None else float(value)
    return number if number is None or math.isfinite(number) else None


def _versions(stored: list[str | None], made: list[str | None]) -> dict[str, tuple[str, str]]:
    """The packages whose versions differ: then, and now."""
    found = []
    for texts in (stored, made):
        told: dict[str, Any] = {}
        for text in texts:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                told |= json.loads(text or "{}")
        found.append(told)
    then, now = found
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)] if now else []
    return {name: (str(then.get(name, "none")), str(now.get(name, "none"))) for name in names}
