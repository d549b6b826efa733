"""Publishing: leaderboard, claims, report, all tables and a data card, in a folder or as a dataset of the Hub.

What is published is a result set itself: `deadbench leaderboard PUBLISHED` reads it, and so does `datasets`.
"""

import glob
import io
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from deadbench.analysis.cells import without_secrets
from deadbench.analysis.families import families
from deadbench.analysis.formats import environment, render
from deadbench.analysis.leaderboard import leaderboard
from deadbench.analysis.pages.report import provenance, write_report
from deadbench.analysis.results import ResultsError, collected, scan
from deadbench.suite.errors import message
from deadbench.suite.plain_text import plain
from deadbench.suite.schema import TABLES, arrow_schema
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import is_url, sweep_folders, write_whole

HUB = "hf://datasets/"
_LEADERBOARD_COLUMNS = [
    "rank", "model", "revision", "family", "read", "depth", "deepening", "alignment", "kernel_exact", "num_dead_1e6",
    "num_parameters", "protocol", "dtype",
]  # fmt: skip
_CLAIM_COLUMNS = ["claim", "statement", "num_models", "num_hold", "holds", "value_median", "unit", "failing"]


def publish(
    locations: Sequence[str], target: str, *, title: str, license: str = "cc-by-4.0", private: bool = False
) -> str:
    """Publish the result sets at `locations` to a new folder, or to `hf://datasets/OWNER/NAME`; returns where.

    A folder is written whole or not at all; a Hub repository is made where there is none and gets one commit.

    Raises:
        ResultsError: no result set, a folder that is there already, or a target that cannot be.
    """
    shown = shown_place(target)
    if target.startswith(HUB):
        repository = target.removeprefix(HUB).rstrip("/")
        if not re.fullmatch(r"[\w][\w.\-]*/[\w][\w.\-]*", repository):
            raise ResultsError(f"--to {shown}: expected {HUB}OWNER/NAME")
        with tempfile.TemporaryDirectory() as folder:
            _write(locations, Path(folder), title, license)
            return _upload(Path(folder), repository, private)
    if is_url(target):
        raise ResultsError(f"--to {shown}: a folder or {HUB}OWNER/NAME is expected")
    final = Path(target)
    if final.exists():
        raise ResultsError(f"--to {shown}: is there already; name a new folder")
    if not final.resolve().parent.is_dir():
        raise ResultsError(f"--to {shown}: no such directory {final.resolve().parent}")
    parent = final.resolve().parent
    sweep_folders(parent.glob(f".{glob.escape(final.name)}-{'[0-9a-f]' * 32}"))
    aside = parent / f".{final.name}-{uuid.uuid4().hex}"
    aside.mkdir(0o700)
    try:
        _write(locations, aside, title, license)
        aside.chmod(0o755)  # meanwhile it was for its owner alone
        os.replace(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def _write(locations: Sequence[str], folder: Path, title: str, license: str) -> None:
    reads = collected(scan(locations)).lazy()
    board, claims = leaderboard(reads), families(reads, scan(locations, "functional"))
    write_whole(folder / "leaderboard.csv", (render({"leaderboard": board}, "csv") + "\n").encode())
    write_whole(folder / "claims.csv", (render({"families": claims}, "csv") + "\n").encode())
    write_report(locations, folder / "report.html")
    rows = {name: _write_table(locations, folder, name) for name in TABLES}
    card = environment().get_template("card.md.j2").render(
        title=plain(title),
        license=plain(license),
        rows={name: count for name, count in rows.items() if count},
        columns={name: [(c.name, c.unit, c.meaning) for c in TABLES[name]] for name, count in rows.items() if count},
        facts=provenance(locations, reads),
        board=render({"leaderboard": board.select(_LEADERBOARD_COLUMNS).head(100)}, "md"),
        claims=render({"families": claims.select(_CLAIM_COLUMNS)}, "md"),
    )  # fmt: skip
    write_whole(folder / "README.md", card.encode())


def _write_table(locations: Sequence[str], folder: Path, name: str) -> int:
    """One file a table, with the schema's metadata; returns how many rows, and writes no file for none."""
    frame: pl.DataFrame = _without_secrets(collected(scan(locations, name)))
    if frame.is_empty():
        return 0
    (folder / name).mkdir()
    table: Any = frame.to_arrow().cast(arrow_schema(name))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_whole(folder / name / "published.parquet", buffer.getvalue())
    return len(frame)


def _without_secrets(frame: pl.DataFrame) -> pl.DataFrame:
    """The same rows; those that are not our own may hold a secret of a place."""
    texts = [pl.col(n) for n, t in frame.schema.items() if t == pl.String and frame[n].str.contains("://").any()]
    return frame.with_columns(each.map_elements(without_secrets, return_dtype=pl.String) for each in texts)


def _upload(folder: Path, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, repo_type="dataset", folder_path=folder, commit_message="deadbench results"
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = message(error)
        raise ResultsError(f"{HUB}{repository}: the Hub refused ({reason}); `hf auth login` signs in") from error
    return str(commit.commit_url)
