"""`python -m deadbench` is the command `deadbench`."""

import sys
from pathlib import Path

import deadbench

if __name__ == "__main__":
    # Python looks first where it is started, in a stranger's folder too: no more, unless deadbench itself lies there.
    if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(deadbench.__file__).resolve().parents[1]:
        del sys.path[0]

    from deadbench.runners.cli.main import main

    main()
