"""Whether vLLM starts and reads as torch does: small models, each in a process of its own, which vLLM changes."""

import importlib.util
import multiprocessing
import os
import uuid
from multiprocessing.connection import Connection
from typing import Any

from deadbench.runners.cluster.processes import end_processes, mark_process
from deadbench.runners.doctor.node_checks import NotHereError, UnwellError
from deadbench.runners.doctor.small_models import HYBRID, LLAMA, NUMBERS, is_known, small_row
from deadbench.suite.errors import one_line
from deadbench.suite.schema import Row

_SECONDS = 120.0
_ENGINE = "vllm"


def vllm_start(num_gpus: int) -> str:
    """vLLM's row of a random Llama, over two GPUs where there are, is torch's; it has counted its rows.

    Raises:
        NotHereError: vLLM is not installed.
        UnwellError: it does not start, or its numbers are others.
    """
    return _as_by_torch(LLAMA, "a small Llama", 2 if num_gpus >= 2 else 1)


def vllm_state_space() -> str:
    """The same of a model some of whose layers are a Mamba's, which tell vLLM's passes otherwise."""
    return _as_by_torch(HYBRID, "a small hybrid of Mamba and attention", 1)


def _as_by_torch(config: dict[str, Any], name: str, shared_by: int) -> str:
    if importlib.util.find_spec(_ENGINE) is None:
        raise NotHereError("vLLM is not installed")
    row = _apart(config, shared_by)
    how = f"{name} by --engine {_ENGINE}"
    is_known(row, {}, how, "torch")
    known = small_row(config, "torch")
    is_known(row, {number: known[number] for number in NUMBERS}, how, "torch")
    devices = f" over {shared_by} GPUs" if shared_by > 1 else ""
    started = f"started in {row['load_seconds']:.0f} s"
    return f"{row['num_tokens']} tokens are as many rows, and torch's numbers{devices}; {started}"


def _apart(config: dict[str, Any], tensor_parallel: int) -> Row:
    """The row, by a process of its own; whatever it started is gone with it."""
    spawn, token = multiprocessing.get_context("spawn"), uuid.uuid4().hex
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_read, args=(theirs, token, config, tensor_parallel))
    process.start()
    theirs.close()
    try:
        if not ours.poll(_SECONDS):
            raise UnwellError(f"vLLM did not start and read within {_SECONDS:g} s")
        error, row = ours.recv()
    except EOFError as ended:
        process.join()
        raise UnwellError(f"vLLM's process died (exit code {process.exitcode})") from ended
    finally:
        process.join(10)
        process.kill()
        process.join()
        end_processes(token)
    if error is not None:
        raise UnwellError(error)
    return row  # type: ignore[no-any-return]


def _read(to: Connection, token: str, config: dict[str, Any], tensor_parallel: int) -> None:
    mark_process(token)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(tensor_parallel > 1))  # alone: sooner, and causes are told
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1), os.dup2(silent, 2)  # what it has to say is in its row
    try:
        to.send((None, small_row(config, _ENGINE, tensor_parallel)))
    except Exception as error:
        to.send((one_line(error, 300), None))
