"""Worker processes of Ray that end before they begin: Ray's start waits for them for ever, and says nothing.

A library that does not import in them (Ray's own psutil, say) ends each before Ray knows it.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

STARTING_SECONDS = 20.0  # after which what the workers wrote is looked at
PATIENCE_SECONDS = 300.0  # a machine under load takes long to begin, and writes nothing
# A worker's traceback names its program, and its last line the error.
_WORKERS, _ERROR = "default_worker.py", r"^(\w[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)$"

# Ray's start holds the interpreter while it waits, so that no thread of this process runs: another process looks.
_WATCH = r"""
import glob, os, re, select, signal, sys, time
parent, folder, patience, longest = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
program, error = sys.argv[5:]
began = time.monotonic()
while not select.select([0], [], [], 1.0)[0]:
    waited, line = time.monotonic() - began, None
    for name in glob.glob(glob.escape(folder) + "/session_2*/logs/raylet.err") if waited > patience else ():
        with open(name, errors="replace") as log:
            _, named, after = log.read()[-64000:].rpartition(program)
        found = re.search(error, after, re.M) if named else None
        if found:
            line = "Ray's worker processes end before they begin: " + ascii(found[1])[1:-1][:200]
    if line or waited > longest:
        line = line or f"Ray did not start within {longest:.0f} s"
        print(f"deadbench: {line}; mend that in this environment", file=sys.stderr, flush=True)
        os.kill(parent, signal.SIGKILL)
        break
"""


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """The block starts a Ray in `folder`; where no worker can begin, this process ends, with one line that says why.

    The processes of a Ray end with the one that started it.
    """
    told = [str(os.getpid()), str(folder), str(STARTING_SECONDS), str(PATIENCE_SECONDS), _WORKERS, _ERROR]
    watcher = subprocess.Popen([sys.executable, "-I", "-S", "-c", _WATCH, *told], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        watcher.communicate()  # the end of its input is its own
