"""`python -m tests.analysis.hostile_results`: result sets with bytes changed, each opened as `leaderboard` does.

One line of JSON for each, and a process of its own, which what is not refused would end.
"""

import io
import json
import random
import resource
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from deadbench.analysis.leaderboard import leaderboard
from deadbench.analysis.results import ResultsError, collected, scan
from deadbench.runners.results.reader import ResultReader, StoreError
from deadbench.suite.schema import to_table
from tests.analysis.conftest import _read

MEMORY = 4 * 2**30
ODD = (0x00, 0x01, 0x03, 0x0E, 0x10, 0x16, 0x7F, 0x80, 0xFE, 0xFF)
DELTAS = {"read": "DELTA_BYTE_ARRAY", "dtype": "DELTA_LENGTH_BYTE_ARRAY", "attempt": "DELTA_BINARY_PACKED"}
WAYS = {
    "plain": {"use_dictionary": False},
    "dictionary": {},
    "second": {"data_page_version": "2.0", "row_group_size": 7},
    "deltas": {"use_dictionary": False, "column_encoding": DELTAS},
}


def tables():
    """A small table of reads and one of spectra, with lists of lists."""
    rows = [_read(f"m{n}", flags=["a"] * (n % 3), massive_coordinates=[n], depth=float(n)) for n in range(20)]
    spectra = [
        {"model": f"m{n}", "read": "trained", "eigenvalues": [1.0] * n, "dead_coordinates": [[n], []]}
        for n in range(20)
    ]
    for name, made in (("reads", to_table("reads", rows)), ("spectra", to_table("spectra", spectra))):
        yield name, made.select([each for each in made.column_names if made[each].null_count < len(made)])


def whole_files():
    """(table, how it is written, bytes) of what is changed."""
    for name, table in tables():
        for way, how in WAYS.items():
            if name == "reads" or way != "deltas":
                file = io.BytesIO()
                pq.write_table(table, file, compression="none", **how)
                yield name, way, file.getvalue()


def changed(raw, draw):
    """A file with a few bytes changed: among its pages, or in its footer, where all else is told."""
    made = bytearray(raw)
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    for _ in range(draw.choice((1, 1, 2, 8))):
        first, last = (4, footer) if draw.random() < 0.6 else (footer, footer + (len(raw) - 8 - footer) // 2)
        made[draw.randrange(first, last)] = draw.choice((*ODD, draw.randrange(256)))
    return bytes(made)


def outcome(folder, table, raw):
    """What the analysis says, and of reads a run that goes on: an empty text of what was read, or the error."""
    (folder / table / "1.parquet").write_bytes(raw)
    asked = [lambda: leaderboard(scan(str(folder))), lambda: ResultReader(str(folder)).come()]
    if table != "reads":
        asked = [lambda: collected(scan(str(folder), table))]
    for ask in asked:
        try:
            ask()
            yield ""
        except (ResultsError, StoreError) as error:
            yield str(error)


def main(count):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    files, draw = list(whole_files()), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for table in ("reads", "spectra"):
            Path(folder, table).mkdir()
        good = next(raw for table, _, raw in files if table == "reads")
        for number in range(count):
            table, way, raw = files[number % len(files)]
            Path(folder, "reads", "1.parquet").write_bytes(good)
            made = changed(raw, draw) if number >= len(files) else raw
            print(json.dumps([table, way, *outcome(Path(folder), table, made)]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
