"""What a table needs said below it, in whatever format: words that its cells use and that mislead by themselves."""

import polars as pl

from deadbench.analysis.cells import one_line

_MAX_NAMED = 8


def footnotes(frame: pl.DataFrame) -> list[str]:
    """The lines below a table of `frame`, none where nothing needs a word."""
    return _lost(frame)


def _lost(frame: pl.DataFrame) -> list[str]:
    if not {"verdict", "metric", "detail"} <= set(frame.columns):
        return []
    rows = frame.filter(pl.col("verdict").cast(pl.String) == "lost")
    if rows.is_empty():
        return []
    reasons: dict[str, list[str]] = {}
    for model, metric, detail in rows.select(pl.col("model", "metric", "detail").cast(pl.String)).iter_rows():
        reasons.setdefault(detail or "", []).append(f"{model} {metric}")
    told = [f"{_named(names)}: {reason}" for reason, names in reasons.items() if reason]
    return ["lost: the baseline has a value of the metric and the candidate has none", *map(one_line, told)]


def _named(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
