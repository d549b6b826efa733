"""What a read of a live model came to: rows by table, as `deadbench run` would store them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from deadbench.runners.results.store import ResultStore
from deadbench.suite.schema import Row, to_table


@dataclass(frozen=True)
class Reading:
    """The rows of one look at a model; of ranks that train together the first has them, the others none.

    Attributes:
        tables: Arrow tables by name, one dictionary a read, in the order in which they were made.
    """

    tables: tuple[dict[str, pa.Table], ...] = ()

    @property
    def row(self) -> Row | None:
        """The columns of `reads`, of the last read where there were several; None where another rank has them."""
        return self.rows[-1] if self.tables else None

    @property
    def rows(self) -> list[Row]:
        """The same of every read."""
        return self._all("reads")

    @property
    def spectra(self) -> list[Row]:
        """Rows of `spectra`: the final norm's eigenvalues, and each tap's."""
        return self._all("spectra")

    @property
    def blocks(self) -> list[Row]:
        """Rows of `blocks`: the residual stream, block by block."""
        return self._all("blocks")

    @property
    def norms(self) -> list[Row]:
        """Rows of `norms`: every norm, where the parameters were read."""
        return self._all("norms")

    def save(
        self, out: str | Path, *, model: str | None = None, revision: str | None = None, step: int | None = None
    ) -> None:
        """Add the rows to the result set at `out`, which leaderboard, trend and compare read.

        Args:
            out: a folder or URI; it is made where it is not there.
            model: what the model is called there; None: its class.
            revision: which checkpoint; None with a `step`: `step{step}`.
            step: training step.

        Raises:
            StoreError: it cannot be written, or is of a newer version.
        """
        if not self.tables:
            return
        store = ResultStore(str(out))
        for tables in self.tables:
            store.write(renamed(tables, model, revision, step))

    def _all(self, table: str) -> list[Row]:
        return [row for each in self.tables if table in each for row in each[table].to_pylist()]


def renamed(
    tables: dict[str, pa.Table], model: str | None, revision: str | None, step: int | None
) -> dict[str, pa.Table]:
    """The tables of a read under another name, revision and step; None leaves what is there."""
    revision = f"step{step}" if revision is None and step is not None else revision
    key: dict[str, Any] = {name: v for name, v in (("model", model), ("revision", revision)) if v is not None}
    changed = {}
    for name, table in tables.items():
        own = key | ({"checkpoint_step": step} if name == "reads" and step is not None else {})
        changed[name] = to_table(name, [row | own for row in table.to_pylist()])
    return changed
