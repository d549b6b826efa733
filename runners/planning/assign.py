"""Jobs with the engine, devices and work that the plan gave them."""

from dataclasses import replace

from deadbench.runners.engines.registry import DEFAULT, ENGINES
from deadbench.runners.jobs.job import ModelJob, ReadJob
from deadbench.runners.jobs.resolved import num_tokens
from deadbench.runners.planning.hardware import Cluster
from deadbench.suite.read_specs import TAP_BYTES
from deadbench.suite.registry.entries import Model

_WIDTHS = ("hidden_size", "d_model", "n_embd")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")


def place_jobs(jobs: list[ModelJob], cluster: Cluster) -> tuple[list[ModelJob], list[str]]:
    """`jobs` with the engine that the plan chose, and the problems, one line each; what cannot fit carries its reason.

    Models whose published size leaves no doubt are not measured.
    """
    problems: list[str] = []
    placed = []
    for job in jobs:
        reads, chosen, share, work, on_device, on_host = [], None, 0.0, 0.0, 0.0, 0.0
        asked = job.asked_tensor_parallel(has_gpus=cluster.largest.gpus > 0)
        measured = [read for read in job.reads if _is_measured(read, cluster, asked)]
        if measured:
            # torch, which who needs no measurement need not wait for
            from deadbench.runners.planning.plan import place_together

            rows = dict(zip(map(id, measured), place_together(measured, cluster, asked), strict=True))
        for read in job.reads:
            work += _work(read)
            if measured and (row := rows.get(id(read))):
                share = max(share, row.gpus)
                on_device, on_host = max(on_device, row.peak_bytes or 0), max(on_host, row.peak_host_bytes or 0)
                if row.tensor_parallel and row.tensor_parallel > 1:
                    chosen = max(chosen or 1, row.tensor_parallel)
                if row.problem:
                    problems.append(f"{read.label()}: {row.problem}")
                    read = replace(read, error=row.problem)
                elif row.engine != read.engine == DEFAULT:
                    problems.append(f"{read.label()}: {row.note}")
                    read = replace(read, engine=row.engine)
            elif read.engine:
                share = 1.0
            reads.append(read)
        share = min(share, 1.0) or 1.0
        chosen = job.tensor_parallel or chosen
        job = replace(job, work=work, device_bytes=on_device, host_bytes=on_host)
        placed.append(replace(job, reads=tuple(reads), tensor_parallel=chosen, gpu_share=share))
    return placed, problems


def in_one_process(jobs: list[ModelJob]) -> list[ModelJob]:
    """`jobs` as one process can do them, without Ray: what needs processes of its own carries that as its error."""

    def possible(read: ReadJob) -> ReadJob:
        if read.error or read.engine is None or ENGINES[read.engine].in_process:
            return read
        reason = f"{read.engine} runs in processes of its own; give --engine torch, or leave --address none out"
        return replace(read, error=reason)

    return [replace(job, reads=tuple(map(possible, job.reads))) for job in jobs]


def _work(read: ReadJob) -> float:
    """2 x parameters x tokens, as far as the registry tells; what it does not tell is small."""
    width = _first(read.model, _WIDTHS) or 1024
    return 2.0 * (read.model.parameters or 0) * num_tokens(read.protocol.tokens, width) if read.engine else 0.0


def _is_measured(read: ReadJob, cluster: Cluster, asked: int | None) -> bool:
    """Whether what a read needs must be counted to say where it runs, on `asked` devices if so many are asked for."""
    if read.engine is None or read.error or read.factory:
        return False
    return asked not in (None, 1) or not _surely_fits(read, cluster)


def _surely_fits(read: ReadJob, cluster: Cluster) -> bool:
    """Whether float32 weights by the registry's own figures take less than an eighth of the memory, and all taps too.

    What a factory of the user's builds is not measured: it is theirs to say where it fits.
    """
    if read.factory is not None:
        return True
    node = cluster.largest
    if node.gpus:
        return False  # how many fit on one GPU is worth the measurement
    memory, parameters = node.host_bytes, read.model.parameters
    if memory is None or parameters is None or read.accumulator_gb is not None:
        return False
    return 8 * max(4 * parameters, TAP_BYTES * _squares(read.model)) <= memory


def _squares(model: Model) -> int:
    """Taps x width^2, as the registry tells; where it does not, a block has as many parameters at least."""
    width, depth = _first(model, _WIDTHS), _first(model, _DEPTHS)
    return (depth + 1) * width**2 if width and depth else model.parameters or 0


def _first(model: Model, names: tuple[str, ...]) -> int | None:
    """The whole number that the registry's configuration has under the first of `names` that it has."""
    config = model.config or {}
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
