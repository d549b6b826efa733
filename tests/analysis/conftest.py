"""Result sets made by hand: `read(…)` is a row, `result_set(rows)` a folder on disk, `frame(rows)` the lazy table."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from deadbench.suite.schema import KEY, to_table

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)


def _read(model: str = "m", read: str = "trained", *, minute: int = 0, **columns: Any) -> dict[str, Any]:
    """One ok float32 read of the protocol `standard` that finished `minute` minutes after noon."""
    row = {
        "run_id": "run-1", "model": model, "read": read, "seed": 0, "protocol_hash": f"hash-{read}",
        "engine": None if read == "parameters" else "torch", "protocol": "standard", "dtype": "float32",
        "family": "layernorm", "status": "ok", "attempt": 1, "versions": '{"torch": "2.13.0"}', "device": "cpu",
        "started_at": NOON, "finished_at": NOON + timedelta(minutes=minute),
    }  # fmt: skip
    return row | columns


def _write(
    folder: Path,
    rows: list[dict[str, Any]],
    spectra: dict[int, list[float]] | None = None,
    blocks: dict[int, list[dict[str, Any]]] | None = None,
) -> str:
    """Write `rows`, one file each; `spectra` gives eigenvalues and `blocks` taps, by index of the row."""
    tables: dict[str, list[dict[str, Any]]] = {"reads": rows, "spectra": [], "blocks": []}
    for index, taps in (blocks or {}).items():
        tables["blocks"] += [{name: rows[index].get(name) for name in ["run_id", *KEY]} | tap for tap in taps]
    for index, eigenvalues in (spectra or {}).items():
        key = {name: rows[index].get(name) for name in ["run_id", *KEY]}
        tables["spectra"].append(key | {"site": "final_norm", "eigenvalues": eigenvalues})
    for table, entries in tables.items():
        (folder / table).mkdir(parents=True, exist_ok=True)
        for index, row in enumerate(entries):
            pq.write_table(to_table(table, [row]), folder / table / f"{index:04}.parquet")
    return str(folder)


@pytest.fixture
def read() -> Callable[..., dict[str, Any]]:
    return _read


@pytest.fixture
def result_set(tmp_path: Path) -> Callable[..., str]:
    return lambda rows, spectra=None, name="results", blocks=None: _write(tmp_path / name, rows, spectra, blocks)


@pytest.fixture
def frame() -> Callable[[list[dict[str, Any]]], pl.LazyFrame]:
    return lambda rows: pl.DataFrame(pl.from_arrow(to_table("reads", rows))).lazy()
