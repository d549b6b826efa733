"""Dead directions of transformers, from Python.

    import deadbench

    deadbench.classify("./my-checkpoint")["family"]  # 'layernorm', from its parameters alone
    reads = deadbench.scan("results/quick")  # a polars.LazyFrame; deadbench.scan(RESULTS, "spectra") another table
    deadbench.measure(model, batches).row["depth"]  # of a model that lives here, in training too
    deadbench.leaderboard("results/quick")  # what the command of that name shows, as a polars.DataFrame

Importing this costs nothing: torch, polars and the rest wait until a function needs them. A caller's mistake is a
`ValueError` of one line. The functions here are the interface; what lies below them may move.

(PYTEST_DONT_REWRITE: else a pytest that is started after this import warns of our plugin, or dies of the warning.)
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl
    from torch import nn

    from deadbench.runners.live.reading import Reading

__version__: str

__all__ = ["__version__", "classify", "compare", "families", "leaderboard", "measure", "scan", "trend"]

if not (Path(__file__).parent / "suite").is_dir():  # a clone whose links were lost on the way, as in a zip archive
    __path__.append(str(Path(__file__).parents[1]))


def classify(source: str | Path, config: str | Path | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Normalisation family, final norm and predicted depth of one checkpoint, from its parameters alone.

    `source` is a folder, a Hub id (`org/name[@revision]`), a URL, or one file of weights; only configuration, headers
    and the final norm's tensors are read. `config` takes the place of its config.json: the contents of one, its path, a
    folder or a Hub id. Returns the object that `deadbench classify --json` prints for it: a checkpoint that cannot be
    read raises nothing, its `error` is one line and the other fields are None.

    Example: `deadbench.classify("./my-checkpoint")["scale_harmonic"]`
    """
    from deadbench.suite.checkpoints.adapters import read_config
    from deadbench.suite.reads.classify import classify as classify_one

    if config is None or isinstance(config, Mapping):
        given = None if config is None else dict(config)
    else:
        given = read_config(str(config))
    return classify_one(str(source), config=given)[0]


def measure(
    model: "nn.Module",
    batches: Iterable[Any] | None = None,
    *,
    reads: Sequence[str] | None = None,
    final_norm: "str | nn.Module | None" = None,
    blocks: "str | nn.Module | Sequence[nn.Module] | None" = None,
    taps: str = "all",
    max_tokens: int | str = "64D",
    accumulator_gb: float | None = None,
) -> "Reading":
    """The reads of a model that lives in this process, as `deadbench run` makes them of a checkpoint; without Ray.

    `batches` is an iterable of what the model takes: tensors, dictionaries or tuples; positions where an
    `attention_mask` (of an encoder-decoder `decoder_attention_mask`) is 0 do not count. Without batches the
    parameters alone are read, and nothing is run. The final norm and the blocks are found by what flows through the
    model, or told: a path (`final_norm="ln_f", blocks="h"`) or the modules. Compiled, under autocast or with gradient
    checkpointing the model runs uncompiled and without gradients; under DistributedDataParallel and fully_shard every
    rank calls this with its own batches, and the first has the rows. Modes, gradients, hooks, buffers and all random
    numbers are left as they were found.

    `reads` are `parameters`, `trained` or both; `taps="none"` leaves the blocks out; at most `max_tokens` rows are read
    (a number, or a multiple of the width), and `accumulator_gb` is the memory for the blocks' statistics.

    Raises:
        ValueError: no final norm that can be told, too few tokens, or an input that the model does not take.

    Example: `deadbench.measure(model, batches).row["depth"]`; `.save("results", model="mine", step=1000)` keeps it
    """
    from deadbench.runners.live.measure import measure as look

    return look(
        model, batches, reads=reads, final_norm=final_norm, blocks=blocks, taps=taps,
        max_tokens=max_tokens, accumulator_gb=accumulator_gb,
    )  # fmt: skip


def scan(results: str | Path | Sequence[str | Path], table: str = "reads") -> "pl.LazyFrame":
    """A table of one result set, or of several: `reads`, `spectra`, `blocks`, `norms` or `functional`, all its rows.

    Raises:
        ValueError: no such table, or no result set there.

    Example: `deadbench.scan("results/quick").filter(status="ok").select("model", "depth").collect()`
    """
    from deadbench.analysis.results import scan as scan_all

    return scan_all(str(results) if isinstance(results, str | Path) else [str(each) for each in results], table)


def leaderboard(results: str | Path, *, sort: str = "depth", family: str | None = None) -> "pl.DataFrame":
    """Models ranked by the depth of their dead direction, in decades; like protocols and precisions together.

    Raises:
        ValueError: no result set, or no such column or family.

    Example: `deadbench.leaderboard("results/quick", family="layernorm").head(3)`
    """
    from deadbench.analysis.leaderboard import leaderboard as rank

    return rank(scan(results), sort=sort, family=family)


def families(results: str | Path) -> "pl.DataFrame":
    """Each claim about the normalisation families as a row, with how many models can be tested and how many hold it.

    Raises:
        ValueError: no result set.

    Example: `deadbench.families("results/quick").filter(holds=False)`
    """
    from deadbench.analysis.families import families as judge

    return judge(scan(results), scan(results, "functional"))


def compare(baseline: str | Path, candidate: str | Path, *, gate: str | Path | None = None) -> "pl.DataFrame":
    """Every metric of every read of `baseline` beside that of `candidate`; each is RESULTS or RESULTS@REVISION.

    With `gate`, a gate.yaml, its checks instead: a row each, with `verdict` and what was `allowed`.

    Raises:
        ValueError: no result set, protocols that do not compare, or a gate file that does not hold.

    Example: `deadbench.compare("results/quick@step0", "results/quick@step4096").filter(verdict="changed")`
    """
    from deadbench.analysis.compare import METRICS
    from deadbench.analysis.compare import compare as differences
    from deadbench.analysis.drift import with_drift
    from deadbench.analysis.gate import judge, load_gate
    from deadbench.analysis.paired import Samples
    from deadbench.analysis.sides import open_side

    left, right = open_side(str(baseline)), open_side(str(candidate))
    rules = None if gate is None else load_gate(Path(gate))
    asked = METRICS if rules is None else rules.scales()
    rows = differences(left.reads, right.reads, asked, Samples(left.samples, right.samples))
    return rows if rules is None else with_drift(judge(rows, rules), right.until, rules)


def trend(results: str | Path, model: str, *, metrics: Sequence[str] | None = None) -> "pl.DataFrame":
    """The reads of `model`, one a checkpoint, in training order; `metrics` are columns of `reads`.

    Raises:
        ValueError: no result set, no such model in it, or a metric that is no numeric column.

    Example: `deadbench.trend("results/quick", "twin-layernorm")["depth"].to_list()`
    """
    from deadbench.analysis.trend import METRICS, checkpoints

    return checkpoints(scan(results), model, metrics or METRICS)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from deadbench.runners.results.versions import own_version

        return own_version()
    raise AttributeError(f"module 'deadbench' has no attribute {name!r}")
