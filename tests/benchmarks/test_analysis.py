"""Analysis of 100 000 reads: leaderboard, families and compare, each in polars (ours) and in pandas.

`make bench` runs them; extra_info has the peak memory of a process of its own that does only this.
"""

import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from deadbench.analysis.compare import compare
from deadbench.analysis.families import families
from deadbench.analysis.leaderboard import leaderboard
from deadbench.analysis.pages.report import write_report
from deadbench.analysis.results import collected, scan
from deadbench.suite.schema import KEY, arrow_schema
from tests.conftest import ROOT

NUM_READS = 100_000
SERIES = 20  # checkpoints of a model


@pytest.fixture(scope="module")
def location(sized, tmp_path_factory):
    return write_reads(tmp_path_factory.mktemp("reads") / "results", sized(NUM_READS, 5_000))


@pytest.fixture(scope="module")
def reads(location):
    return collected(scan(location)).lazy()


def write_reads(folder, count, seed=0):
    """`count` reads of models with a random read, and a parameters and a trained read of each checkpoint."""
    draw = np.random.default_rng(seed)
    per_model = 1 + 2 * SERIES
    model, place = np.divmod(np.arange(count), per_model)
    random, step = place == 0, np.maximum(place - 1, 0) // 2
    parameters = ~random & (place % 2 == 1)
    layer = model % 2 == 0
    forward = ~parameters
    depth = np.where(layer, 13 + draw.normal(0, 0.3, count), draw.normal(0, 0.2, count))
    names = np.array([f"org/model-{m}-{'layernorm' if m % 2 == 0 else 'rmsnorm'}" for m in range(model.max() + 1)])
    noon = datetime(2026, 11, 1, tzinfo=UTC)

    def measured(values):
        return pl.Series(values).scatter(np.flatnonzero(parameters), None)

    frame = pl.DataFrame({
        "run_id": ["run"] * count,
        "model": names[model],
        "revision": pl.Series([f"step{s}" for s in step]).scatter(np.flatnonzero(random), None),
        "read": np.where(random, "random", np.where(parameters, "parameters", "trained")),
        "seed": np.zeros(count, np.int64),
        "protocol_hash": np.where(parameters, "p", np.where(random, "r", "t")),
        "engine": measured(["torch"] * count),
        "checkpoint_step": pl.Series(step * 1000).scatter(np.flatnonzero(random), None),
        "protocol": ["standard"] * count,
        "num_tokens": measured(np.full(count, 8192)),
        "family": np.where(layer, "layernorm", "rmsnorm"),
        "family_expected": np.where(layer, "layernorm", "rmsnorm"),
        "num_parameters": 1_000_000 * (1 + model),
        "num_zero_scales": np.zeros(count, np.int64),
        "depth_predicted": np.where(layer, 13.2, np.nan),
        "alignment": measured(np.where(layer, 1.0, draw.uniform(0, 0.3, count))),
        "containment": measured(np.where(layer, 1.0, np.nan)),
        "lambda_v": measured(10.0**-depth),
        "lambda_mean": measured(np.ones(count)),
        "lambda_control": measured(draw.uniform(0.5, 1.5, count)),
        "depth": measured(depth),
        "depth_limit": measured(np.full(count, 28.0)),
        "num_dead_1e6": measured(layer.astype(np.int64)),
        "num_algebraic": measured(layer.astype(np.int64)),
        "num_learned": measured(np.zeros(count, np.int64)),
        "precision_slope": measured(np.where(layer, 1.05, 0.0)),
        "kernel_exact": measured(layer),
        "blocks_preserved": measured(draw.random(count) < 0.99),
        "worst_block_ratio": measured(draw.uniform(0.7, 1.2, count)),
        "dtype": ["float32"] * count,
        "finished_at": [noon + timedelta(seconds=int(i)) for i in range(count)],
        "attempt": np.ones(count, np.int64),
        "status": ["ok"] * count,
    })  # fmt: skip
    assert forward.any()
    schema = arrow_schema("reads")
    empty = pl.from_arrow(schema.empty_table())
    table = pl.concat([empty, frame.cast({n: empty.schema[n] for n in frame.columns})], how="diagonal")
    (folder / "reads").mkdir(parents=True)
    for part, rows in enumerate(table.iter_slices(10_000)):
        pq.write_table(rows.to_arrow().cast(schema), folder / "reads" / f"{part:03}.parquet")
    return str(folder)


def peak_bytes(body, location):
    """Peak resident memory of a process that opens the result set and does only `body`."""
    script = f"""
import polars as pl
from deadbench.runners.jobs.events import peak_host_bytes
from deadbench.analysis.results import collected, scan
from deadbench.analysis.compare import compare
from deadbench.analysis.families import families
from deadbench.analysis.leaderboard import leaderboard
reads = scan({location!r})
{body}
print(peak_host_bytes())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("what", ["leaderboard", "families", "compare"])
@pytest.mark.benchmark(min_rounds=3, max_time=3)
def test_polars(benchmark, location, reads, what):
    """From files on disk to the finished table."""
    calls = {
        "leaderboard": (lambda: leaderboard(scan(location)), "leaderboard(reads)"),
        "families": (lambda: families(scan(location)), "families(reads)"),
        "compare": (lambda: compare(scan(location), scan(location)), "compare(reads, reads)"),
    }
    call, body = calls[what]
    benchmark.group = f"{what} of {NUM_READS:,} reads"
    table = benchmark(call)
    assert len(table) > 10
    if benchmark.enabled:
        benchmark.extra_info["peak_host_bytes"] = peak_bytes(body, location)


@pytest.mark.parametrize("what", ["leaderboard", "families", "compare"])
@pytest.mark.benchmark(min_rounds=3, max_time=3)
def test_pandas(benchmark, location, reads, what):
    """What a user would write: the same rows by groupby and merge, for fewer columns and claims than ours."""
    pandas = pytest.importorskip("pandas")
    calls = {"leaderboard": _pandas_leaderboard, "families": _pandas_families, "compare": _pandas_compare}
    benchmark.group = f"{what} of {NUM_READS:,} reads"
    result = benchmark(lambda: calls[what](pandas, location))
    ours = {
        "leaderboard": lambda: leaderboard(reads)["depth"].sum(),
        "families": lambda: families(reads).filter(claim="blocks-preserved")["num_hold"][0],
        "compare": lambda: float((compare(reads, reads)["metric"] == "depth").sum()),
    }
    assert result == pytest.approx(ours[what](), rel=1e-9), "both routes give the same answer"


def _opened(pandas, location):
    frame = pandas.read_parquet(f"{location}/reads")
    frame = frame.sort_values(["finished_at", "attempt"], ascending=False).drop_duplicates(KEY)
    return frame[frame["status"] == "ok"]


def _speaking(frame):
    forward = frame[frame["read"].isin(["random", "trained"])]
    ordered = forward.sort_values("checkpoint_step", ascending=False)
    return ordered.drop_duplicates(["model", "protocol", "dtype", "read"])


def _pandas_leaderboard(pandas, location):
    lines = _speaking(_opened(pandas, location))
    random = lines[lines["read"] == "random"].groupby(["model", "protocol", "dtype"])["depth"].mean()
    best = lines.sort_values("read", ascending=False).drop_duplicates(["model", "protocol", "dtype"])
    best = best.join(random.rename("depth_random"), on=["model", "protocol", "dtype"])
    best["deepening"] = best["depth"] - best["depth_random"]
    best["rank"] = best.groupby(["protocol", "dtype"])["depth"].rank(method="min", ascending=False)
    return best.sort_values("rank")["depth"].sum()


def _pandas_families(pandas, location):
    frame = _opened(pandas, location)
    lines = _speaking(frame)
    random = lines[lines["read"] == "random"].set_index("model")[["lambda_v", "num_dead_1e6"]].add_prefix("random_")
    lines = lines.join(random, on="model")
    layer = lines["family"] == "layernorm"
    claims = {
        "aligned": lines["alignment"].ge(0.99995).where(layer & (lines["read"] == "random")),
        "exact": lines["kernel_exact"].where(layer),
        "deepens": lines["lambda_v"].lt(lines["random_lambda_v"]).where(layer & (lines["read"] == "trained")),
        "more": lines["num_dead_1e6"].gt(lines["random_num_dead_1e6"]).where(lines["read"] == "trained"),
        "blocks": lines["blocks_preserved"],
    }
    held = {}
    for name, holds in claims.items():
        tested = lines.assign(holds=holds.astype("object")).dropna(subset="holds")
        held[name] = tested.groupby(["model", "protocol"])["holds"].agg(lambda each: all(each)).sum()
    return held["blocks"]


def _pandas_compare(pandas, location):
    sides = [_opened(pandas, location) for _ in range(2)]
    pairs = sides[0].merge(sides[1], on=KEY, suffixes=("", "_candidate"))
    metrics = ["depth", "lambda_v", "alignment", "containment", "num_dead_1e6", "num_learned", "worst_block_ratio"]
    rows = []
    for metric in metrics:
        kept = pairs[[*KEY, metric, f"{metric}_candidate"]].dropna(subset=metric)
        kept = kept.assign(metric=metric, change=kept[f"{metric}_candidate"].astype(float) - kept[metric].astype(float))
        rows.append(kept.rename(columns={metric: "baseline", f"{metric}_candidate": "candidate"}))
    table = pandas.concat(rows)
    return float((table["metric"] == "depth").sum())


@pytest.mark.benchmark(min_rounds=1, max_time=1, warmup=False)
def test_report_of_100_models(benchmark, tmp_path):
    """100 models with 41 reads each, a spectrum of 4096 values and 32 taps for each that speaks."""
    location = write_reads(tmp_path / "results", 100 * (1 + 2 * SERIES))
    keys = collected(scan(location).filter(pl.col("read") != "parameters")).select("run_id", *KEY)
    speaking = keys.filter((pl.col("revision") == f"step{SERIES - 1}") | pl.col("revision").is_null())
    tables = {
        "spectra": speaking.with_columns(
            site=pl.lit("final_norm"), eigenvalues=pl.lit(np.geomspace(10, 1e-13, 4096)).implode().first()
        ),
        "blocks": speaking.join(
            pl.DataFrame({"block": range(33), "sigma_min": 0.1, "sigma_median": 1.0, "floor": 1e-7}), how="cross"
        ).with_columns(state=pl.lit("preserved")),
    }
    for name, frame in tables.items():
        empty = pl.from_arrow(arrow_schema(name).empty_table())
        table = pl.concat([empty, frame.cast({n: empty.schema[n] for n in frame.columns})], how="diagonal")
        (tmp_path / "results" / name).mkdir()
        pq.write_table(table.to_arrow().cast(arrow_schema(name)), tmp_path / "results" / name / "0.parquet")
    out = tmp_path / "report.html"
    benchmark.group = "report of 100 models"
    benchmark.pedantic(write_report, args=(location, out), rounds=1)
    benchmark.extra_info["bytes"] = out.stat().st_size
    assert out.stat().st_size < 5e6
