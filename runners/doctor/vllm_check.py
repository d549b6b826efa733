"""Whether vLLM starts and reads as torch does: a small Llama, in a process of its own, which vLLM changes."""

import importlib.util
import json
import multiprocessing
import os
import uuid
from multiprocessing.connection import Connection

from deadbench.runners.cluster.processes import end_processes, mark_process
from deadbench.runners.doctor.node_checks import NotHereError, UnwellError
from deadbench.runners.doctor.read_checks import row_of
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import Overrides
from deadbench.suite.errors import one_line
from deadbench.suite.registry.loading import load_registry, own_registry
from deadbench.suite.schema import Row
from deadbench.suite.scratch import Scratch

_SECONDS = 120.0
_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip
_NUMBERS = ("lambda_max", "lambda_mean", "lambda_min", "worst_block_ratio")
_APART = 1e-2  # relative: vLLM's kernels round elsewhere than torch's


def vllm_start(num_gpus: int) -> str:
    """vLLM's row of a random Llama, over two GPUs where there are, is torch's; it has counted its rows.

    Raises:
        NotHereError: vLLM is not installed.
        UnwellError: it does not start, or its numbers are others.
    """
    if importlib.util.find_spec("vllm") is None:
        raise NotHereError("vLLM is not installed")
    shared_by = 2 if num_gpus >= 2 else 1
    row = _apart(shared_by)
    if row["status"] != "ok":
        raise UnwellError(f"a small Llama by --engine vllm: {row['error']}")
    known = _row("torch", 1)
    for name in _NUMBERS:
        if not abs(row[name] - known[name]) <= _APART * abs(known[name]):
            raise UnwellError(
                f"a small Llama by --engine vllm: {name} is {row[name]:.4g}, and {known[name]:.4g} by torch"
            )
    devices = f" over {shared_by} GPUs" if shared_by > 1 else ""
    started = f"started in {row['load_seconds']:.0f} s"
    return f"{row['num_tokens']} tokens are as many rows, and torch's numbers{devices}; {started}"


def _apart(tensor_parallel: int) -> Row:
    """The row, by a process of its own; whatever it started is gone with it."""
    spawn, token = multiprocessing.get_context("spawn"), uuid.uuid4().hex
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_read, args=(theirs, token, tensor_parallel))
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
        end_processes(token, process.pid or 0, 0.0)
    if error is not None:
        raise UnwellError(error)
    return row  # type: ignore[no-any-return]


def _read(to: Connection, token: str, tensor_parallel: int) -> None:
    mark_process(token)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(tensor_parallel > 1))  # alone: sooner, and causes are told
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1), os.dup2(silent, 2)  # what it has to say is in its row
    try:
        to.send((None, _row("vllm", tensor_parallel)))
    except Exception as error:
        to.send((one_line(error, 300), None))


def _row(engine: str, tensor_parallel: int) -> Row:
    """The row of the small Llama, whose random weights all engines draw alike."""
    path = own_registry()
    asked = Overrides(tokens=1024, input="tokens:random", dtype="float32", engine=engine)
    with Scratch() as folder:
        (folder / "config.json").write_text(json.dumps(_LLAMA), encoding="utf-8")
        (job,) = build_jobs(load_registry(path), path, [str(folder)], None, ["random"], asked)
        return row_of(job.over(tensor_parallel))
