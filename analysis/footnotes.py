"""What a table needs said below it, in whatever format: words that its cells use and that mislead by themselves."""

import polars as pl

from deadbench.analysis.cells import told
from deadbench.suite.plain_text import MAX_VALUE, plain

_MAX_NAMED = 8


def footnotes(frame: pl.DataFrame) -> list[str]:
    """The lines below a table of `frame`, none where nothing needs a word."""
    return _order(frame) + _replicates(frame) + _zero_scales(frame) + _lost(frame)


def _order(frame: pl.DataFrame) -> list[str]:
    """That a trend's checkpoints are ordered by their names alone."""
    if not {"checkpoint_step", "revision"} <= set(frame.columns) or {"model", "angle"} & set(frame.columns):
        return []
    unknown = frame.filter(pl.col("checkpoint_step").is_null())["revision"].drop_nulls().n_unique()
    if unknown < 2:
        return []
    return [f"no training step is known of {unknown} checkpoints: in the natural order of their names"]


def _replicates(frame: pl.DataFrame) -> list[str]:
    """What a mean over seeds is of."""
    count = next((name for name in ("num_replicates", "num_seeds") if name in frame.columns), None)
    if count is None or ("verdict" in frame.columns) != (count == "num_seeds"):
        return []
    rows = frame.filter(pl.col(count) > 1)
    if rows.is_empty():
        return []
    if "model" in rows.columns:
        names = rows.select(pl.format("{} ({})", pl.col("model").cast(pl.String), count)).to_series().to_list()
        return [plain(f"mean ± standard deviation over seeds: {_named(names)}", None)]
    return [f"mean ± standard deviation over up to {max(rows[count].to_list())} seeds"]


def _zero_scales(frame: pl.DataFrame) -> list[str]:
    """What zero scales do to the columns of a leaderboard or a trend."""
    if not {"num_zero_scales", "depth"} <= set(frame.columns) or "angle" in frame.columns:
        return []
    rows = frame.filter(pl.col("num_zero_scales") > 0)
    if rows.is_empty():
        return []
    name = "model" if "model" in frame.columns else "revision"
    counts = rows.select(pl.format("{} ({})", pl.col(name).fill_null("here"), "num_zero_scales")).to_series().to_list()
    note = (
        f"zero scales: {_named(counts)}. Each is a dead direction that training closed (learned); "
        "v lies on the smallest, its depth is that of a scale, and no kernel is left (algebraic 0)"
    )
    if "rank" in frame.columns:
        note += "; by depth it has no rank"
    if "kernel_exact" in frame.columns and rows["kernel_exact"].any():
        note += "; exact yes says only that this scale is too small for either precision"
    return [plain(note, None)]


def _lost(frame: pl.DataFrame) -> list[str]:
    if not {"verdict", "metric", "detail"} <= set(frame.columns):
        return []
    rows = frame.filter(pl.col("verdict").cast(pl.String) == "lost")
    if rows.is_empty():
        return []
    reasons: dict[str, list[str]] = {}
    for model, metric, detail in rows.select(pl.col("model", "metric", "detail").cast(pl.String)).iter_rows():
        reasons.setdefault(detail or "", []).append(f"{model} {metric}")
    lines = [f"{_named(names)}: {reason}" for reason, names in reasons.items() if reason]
    return [
        "lost: the baseline has a value of the metric and the candidate has none",
        *(told(line, None) for line in lines),
    ]


def _named(names: list[str]) -> str:
    names = [told(name, MAX_VALUE) for name in dict.fromkeys(names)]
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
