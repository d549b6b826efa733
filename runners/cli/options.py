"""Options that several commands share, and the jobs that the options of `run` and `plan` ask for."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deadbench.runners.cli.console import UserError, one_of

if TYPE_CHECKING:
    from deadbench.runners.jobs.job import ModelJob, Overrides
    from deadbench.runners.planning.hardware import Cluster
    from deadbench.suite.registry import entries

# What is read.
Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL]...", help="Registry ids, SOURCEs or folders of checkpoints."),
]
Suite = Annotated[str | None, typer.Option(metavar="NAME", help="Of the registry. \\[default: quick, else the first]")]
Registry = Annotated[Path | None, typer.Option(metavar="FILE", help="Registry. \\[default: models.yaml]")]
Reads = Annotated[
    str | None,
    typer.Option(help="Of parameters, random, trained, functional. \\[default: the suite's, or the first three]"),
]
Tokens = Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens to read. \\[default: the protocol's]")]
InputSpec = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="SPEC",
        help="text[:FILE], image[:DIR], image-text[:DIR], tokens:random, tokens:FILE.npy, hf:… "
        "\\[default: by the modality]",
    ),
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of random weights and inputs.")]
Dtype = Annotated[
    str | None, typer.Option(help="auto, float32, float16, bfloat16, float64. \\[default: the registry's, or auto]")
]
Taps = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help="Places of the residual stream to read: all, none (the final norm alone), or every:K. "
        "\\[default: the protocol's, all]",
    ),
]

Factory = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="Read the nn.Module that this function of yours returns, alone or with batches. Imports and runs it.",
    ),
]

# Of what architecture a SOURCE is, where it does not say.
Config = Annotated[
    str | None,
    typer.Option(metavar="CONFIG", help="In place of a SOURCE's config.json: such a file, a folder, or a Hub id."),
]
ModelType = Annotated[
    str | None, typer.Option(metavar="NAME", help="transformers' model type, where a config.json has none.")
]

# Where and how.
Address = Annotated[
    str | None,
    typer.Option(help="Ray to join: local, auto, host:port; none: this process, without Ray. \\[default: local]"),
]
Out = Annotated[str, typer.Option(metavar="DIR_OR_URI", help="Result set to write or continue.")]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="Skip finished reads, or redo them.")]
Engine = Annotated[str, typer.Option(help="auto, torch, streaming (one block at a time) or vllm.")]
Replicas = Annotated[
    int, typer.Option(min=1, metavar="N", help="Processes (with GPUs: one GPU each) that divide one model's tokens.")
]
AccumulatorGb = Annotated[
    float | None,
    typer.Option(min=0, metavar="GB", help="Memory for residual-stream accumulators. \\[default: 1/4 of the free]"),
]
Autoscale = Annotated[
    str | None,
    typer.Option(metavar="SHAPE", help="Nodes that an autoscaler may add: 8x80GB, or how many of them: 4x8x80GB."),
]

# What is compared.
GateFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Gate file (YAML): what may not get worse.")]


def given_config(told: str | None) -> dict[str, Any] | None:
    """The contents of the configuration that --config names.

    Raises:
        CheckpointError: it cannot be read.
    """
    if told is None:
        return None
    from deadbench.suite.checkpoints.adapters import read_config

    return read_config(told)


def overridden(
    *,
    engine: str,
    tokens: int | None,
    input_spec: str | None,
    dtype: str | None,
    seed: int,
    accumulator_gb: float | None,
    tensor_parallel: int | None,
    replicas: int,
    config: str | None,
    model_type: str | None,
    taps: str | None,
) -> "Overrides":
    """What the flags change in the protocol.

    Raises:
        UserError: a value that neither `run` nor `plan` takes, or two that do not go together.
    """
    from deadbench.runners.engines.registry import ENGINES
    from deadbench.runners.jobs.job import Overrides
    from deadbench.suite.registry.entries import TAP_RULE
    from deadbench.suite.registry.entries import Dtype as Allowed

    one_of("--dtype", dtype, Allowed.__args__)  # type: ignore[attr-defined]
    if engine not in ("auto", *ENGINES):
        raise UserError(f"--engine {engine!r} cannot be run by this version; choose auto, {', '.join(ENGINES)}")
    if taps is not None and not re.fullmatch(TAP_RULE, taps):
        raise UserError(f"--taps {taps!r} is unknown; choose all, none or every:K, such as every:4")
    if tokens is not None and input_spec is not None and input_spec.endswith(".npy"):
        raise UserError("--tokens does nothing with tokens:FILE.npy, which is used exactly as given; leave one out")
    chosen = None if engine == "auto" else engine
    return Overrides(
        tokens,
        input_spec,
        dtype,
        chosen,
        seed,
        accumulator_gb,
        tensor_parallel,
        replicas,
        given_config(config),
        model_type,
        taps,
    )


def jobs_and_cluster(
    models: list[str] | None,
    suite: str | None,
    registry: Path | None,
    reads: str | None,
    overrides: "Overrides",
    *,
    assume: str | None = None,
    address: str | None = None,
    factory: str | None = None,
    autoscale: str | None = None,
) -> "tuple[list[ModelJob], Cluster, list[str]]":
    """The jobs that the flags ask for, on which cluster, and what there is to say of the names that were given.

    The cluster is the one that is assumed, that Ray at `address` reports, or this machine; with what may be added.

    Raises:
        ValueError: a registry, model, read or cluster that cannot be understood or reached; one line.
    """
    from deadbench.runners.cluster.joining import connect
    from deadbench.runners.jobs.build import build_jobs
    from deadbench.runners.jobs.job import JobError
    from deadbench.runners.jobs.opening import all_unfit, which_are_meant
    from deadbench.runners.planning.assign import in_one_process
    from deadbench.runners.planning.hardware import NO_RAY, parse_cluster, parse_nodes, ray_cluster, this_machine

    alone = address == NO_RAY
    if alone and (overrides.replicas > 1 or (overrides.tensor_parallel or 1) > 1):
        raise UserError("--address none is one process; leave out --tensor-parallel and --replicas, or --address none")
    # Mistakes in shapes are told before anything is opened.
    cluster = parse_cluster(assume) if assume is not None else None
    added = parse_nodes(autoscale, "--autoscale") if autoscale is not None else None
    wanted = [part.strip() for part in reads.split(",")] if reads is not None else None
    names = models or []
    if factory is not None:
        cluster = cluster or this_machine()
        jobs = _of_factory(factory, names, suite, wanted, overrides)
        return jobs, cluster if added is None else cluster.with_nodes(added), []
    known, path, passed_over = registry_at(registry, needed=suite is not None or not names, names=names)
    jobs = build_jobs(known, path, names, suite, wanted, overrides, assumed=assume is not None)
    if unfit := all_unfit(jobs):
        raise JobError(unfit)
    if alone:
        jobs = in_one_process(jobs)
    if cluster is None and address in (None, "local", NO_RAY):
        cluster = this_machine(most_gpus=1 if alone else None)
    elif cluster is None:
        connect(address)
        cluster = ray_cluster(str(address))
    if added is not None:
        cluster = cluster.with_nodes(added)
    remarks = dict.fromkeys(remark for job in jobs for remark in job.remarks)  # what many models have, once
    return jobs, cluster, [*passed_over, *which_are_meant(known, names), *remarks]


def _of_factory(
    factory: str, names: list[str], suite: str | None, reads: list[str] | None, overrides: "Overrides"
) -> "list[ModelJob]":
    """The one job of a module of the user's own, which is looked for from this folder.

    Raises:
        UserError: other models are named beside it.
    """
    from deadbench.runners.jobs.own_factory import factory_job

    if names or suite is not None:
        raise UserError(f"--model {factory} is read alone; leave out {names[0] if names else '--suite'}")
    return [factory_job(factory, reads, overrides, Path.cwd())]


def registry_at(named: Path | None, *, needed: bool, names: list[str]) -> "tuple[entries.Registry, Path, list[str]]":
    """The registry, where it is, and a remark where ./models.yaml, which is none, was passed over.

    Raises:
        RegistryError: it cannot be read, and it was named, or is `needed`, or one of `names` is no SOURCE.
    """
    from deadbench.suite.checkpoints.sources import is_source
    from deadbench.suite.registry.entries import RegistryError
    from deadbench.suite.registry.loading import find_registry, load_registry, own_registry

    path = find_registry(named)
    try:
        return load_registry(path), path, []
    except RegistryError as error:
        if named is not None or needed or not all(is_source(name) for name in names):
            raise
        own = own_registry()
        remark = f"{error}; passed over, since a SOURCE needs no registry"
        return load_registry(own).model_copy(update={"models": []}), own, [remark]
