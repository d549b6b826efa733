"""Whether a read takes the memory that is planned for it: one is planned, and its peak measured."""

import json
from pathlib import Path

import psutil

from deadbench.runners.doctor.node_checks import UnwellError
from deadbench.runners.doctor.read_checks import row_of
from deadbench.runners.doctor.small_models import random_job
from deadbench.runners.engines.device import give_back
from deadbench.runners.jobs.events import peak_host_bytes
from deadbench.runners.planning.hardware import PROCESS_BYTES, this_machine
from deadbench.runners.planning.plan import place
from deadbench.suite.scratch import Scratch

# Large enough that its weights, 0.14 GB, are most of what it takes, and drawn in a second.
_MODEL = {
    "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 120_000, "hidden_size": 256,
    "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
_TOKENS = 1100
_OVER = 1.25  # times the plan: allocators round, and a process imports on its way
_RESET_PEAK = "5"  # of a process, as Linux wants it told


def planned_memory() -> str:
    """A read's peaks, of the host and of the GPU where there is one, are within the plan's."""
    with Scratch() as folder:
        (folder / "config.json").write_text(json.dumps(_MODEL), encoding="utf-8")
        job = random_job(str(folder), "torch", _TOKENS)
        planned = place(job.reads[0], this_machine(most_gpus=1))
        if planned.problem:
            raise UnwellError(f"a read of {_MODEL['vocab_size']} embeddings has no place here: {planned.problem}")
        give_back()
        before = _begin_peak()
        row = row_of(job)
        after = peak_host_bytes()
    if row["status"] != "ok":
        raise UnwellError(f"the read that was planned failed: {row['error']}")
    assert planned.peak_host_bytes is not None, "every read that has a place takes some of the host"
    told = [] if before is None else [_within("host memory", after - before, planned.peak_host_bytes - PROCESS_BYTES)]
    if row["peak_device_bytes"] is not None and planned.peak_bytes is not None:
        told.append(_within("the GPU's", row["peak_device_bytes"], planned.peak_bytes))
    held = "" if before is None else f", beside {before / 1e9:.2f} GB that the process held"
    return f"{', '.join(told)}{held}" if told else "this system tells no process its peak"


def _begin_peak() -> int | None:
    """Bytes that this process holds, from which its peak is measured anew; None where the system does not do that."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return None
    return int(psutil.Process().memory_info().rss)


def _within(what: str, measured: float, planned: float) -> str:
    """The two in words.

    Raises:
        UnwellError: more than was planned.
    """
    told = f"{measured / 1e6:.0f} of {planned / 1e6:.0f} MB planned of {what}"
    if measured > _OVER * planned:
        raise UnwellError(
            f"a read took {told}; plans are too low here: leave as much more free, and tell us with `deadbench doctor "
            "--json`"
        )
    return told
