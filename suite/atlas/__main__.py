"""Writes the atlas from the installed transformers.

python -m deadbench.suite.atlas [--out FILE] [--processes N] [MODEL_TYPE…]
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import signal
import sys
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers

from deadbench.suite.atlas.survey import survey
from deadbench.suite.errors import reason_of
from deadbench.suite.storage import write_whole

_SECONDS = 120  # for one model type


class _TooLongError(BaseException):
    """Not an Exception: what tries inputs in turn must let it pass."""


def _too_long(signum: int, frame: Any) -> None:
    raise _TooLongError(f"more than {_SECONDS} s")


def _surveyed(model_type: str) -> tuple[str, list[dict[str, Any]], str]:
    """Name, entries, and what to tell of it."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(_SECONDS)
    try:
        entries = survey(model_type)
    except (Exception, _TooLongError) as error:  # one architecture that cannot be surveyed must not stop the survey
        return model_type, [], reason_of(error)[:160]
    finally:
        signal.alarm(0)
    return model_type, entries, "; ".join(f"{entry['path']} {entry['family']}" for entry in entries)


def _quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def main() -> None:
    """Survey the named model types, or all, and write the atlas."""
    parser = argparse.ArgumentParser(
        prog="python -m deadbench.suite.atlas", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument(
        "--out", type=Path, default=Path(str(resources.files("deadbench.suite").joinpath("data/atlas.json")))
    )
    parser.add_argument("--add", action="store_true", help="keep the entries of other model types that FILE has")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    names = arguments.model_types or sorted(
        name for name in transformers.CONFIG_MAPPING if transformers.CONFIG_MAPPING[name] in transformers.MODEL_MAPPING
    )
    entries: dict[str, Any] = json.loads(arguments.out.read_text())["model_types"] if arguments.add else {}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.processes, spawn, _quiet, max_tasks_per_child=150) as pool:
        for name, found, told in pool.map(_surveyed, names):
            if found:
                entries[name] = found
                _write(arguments.out, entries)
            print(f"{name}: {told}", file=sys.stderr, flush=True)


def _write(path: Path, entries: dict[str, Any]) -> None:
    """The atlas file: a line for each model type."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries))
    text = f'{{"transformers": "{transformers.__version__}", "model_types": {{\n{lines}\n}}}}\n'
    write_whole(path, text.encode())


if __name__ == "__main__":
    main()
