"""Whether whole reads come out right: a bundled model with a known answer, by two engines; and memory afterwards."""

import logging

import torch

from deadbench.runners.doctor.node_checks import UnwellError
from deadbench.runners.engines.device import give_back
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import ModelJob, Overrides
from deadbench.runners.worker.run import run_model
from deadbench.suite.registry.loading import load_registry, own_registry
from deadbench.suite.schema import Row

TWIN, _STEP, _TOKENS = "twin-layernorm", "step4096", 2048
_DEPTH, _DECADES = 14.0, 1.0  # as stored; what float32 leaves of a kernel differs from device to device
_ENGINES_DECADES = 0.3
_ENGINES = ("torch", "streaming")


def twin() -> str:
    """A trained LayerNorm model: one dead direction, along the inverse scale, by both engines alike."""
    rows = {engine: _row(engine) for engine in _ENGINES}
    for engine, row in rows.items():
        is_the_twin(row, f"{TWIN} by --engine {engine}")
    apart = abs(rows["torch"]["depth"] - rows["streaming"]["depth"])
    if apart > _ENGINES_DECADES:
        raise UnwellError(f"{TWIN}: the engines differ by {apart:.1f} decades in depth")
    left = memory_left()
    if left:
        raise UnwellError(f"{left / 1e6:.0f} MB are still allocated on the GPU after two reads")
    return f"depth {rows['torch']['depth']:.2f} and {rows['streaming']['depth']:.2f} by {' and '.join(_ENGINES)}"


def is_the_twin(row: Row, how: str) -> None:
    """Raise UnwellError where a row is not what is known of the LayerNorm twin; `how` it was read."""
    if row["status"] != "ok":
        raise UnwellError(f"{how}: {row['error']}")
    if not (row["alignment"] > 0.9999 and row["num_dead_1e6"] == 1 and abs(row["depth"] - _DEPTH) < _DECADES):
        raise UnwellError(
            f"{how}: alignment {row['alignment']:.4f}, {row['num_dead_1e6']} dead, depth {row['depth']:.1f}; 1.0000, "
            f"1 and {_DEPTH:.1f} are known"
        )
    if "the CPU does it" in row["engine_detail"]:
        raise UnwellError(f"{how}: {row['engine_detail'].split('; ')[-2]}")


def memory_left() -> int:
    """Bytes that are allocated on the GPU, reads being over."""
    give_back()
    return int(torch.cuda.memory_allocated()) if torch.cuda.is_initialized() else 0


def twin_job(engine: str) -> ModelJob:
    """The trained read of the LayerNorm twin's last checkpoint."""
    path = own_registry()
    (job,) = build_jobs(load_registry(path), path, [TWIN], None, ["trained"], Overrides(tokens=_TOKENS, engine=engine))
    return job.without(read.identity() for read in job.reads if read.revision != _STEP)


def _row(engine: str) -> Row:
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # which tells of parameters that wait on the disk
    return row_of(twin_job(engine))


def row_of(job: ModelJob) -> Row:
    """The row of a job of one read, in this process."""
    return next(event.row for event in run_model(job, "doctor", 1) if isinstance(event, Finished))
