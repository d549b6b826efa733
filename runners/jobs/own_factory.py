"""A module of the user's own, by the name of what builds it: `package.module:factory`, given on the command line.

Only such a name is ever imported; none comes from a registry or a checkpoint.
"""

import hashlib
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deadbench.runners.engines.registry import DEFAULT
from deadbench.runners.jobs.job import JobError, ModelJob, Overrides, ReadJob, protocol_hash
from deadbench.suite.errors import InputError, message
from deadbench.suite.inputs.specs import check_spec, content_hash
from deadbench.suite.read_specs import READ_SPECS
from deadbench.suite.registry.entries import Model, Protocol

READS = ("parameters", "trained")  # a live module has: what it starts from is its factory's


def factory_job(factory: str, reads: list[str] | None, overrides: Overrides, base: Path) -> ModelJob:
    """The reads of what `factory` builds, found from `base` as Python started there would find it; not imported here.

    Raises:
        JobError: no such file of Python, or a read, input, engine or number of processes that does not go with it.
    """
    for read in reads or ():
        if read not in READS:
            raise JobError(
                f"--model {factory}: the read {read!r} cannot be made of a module; choose {', '.join(READS)}"
            )
    if overrides.engine not in (None, DEFAULT) or overrides.replicas > 1 or (overrides.tensor_parallel or 1) > 1:
        raise JobError(
            f"--model {factory} runs on one device by torch; leave out --engine, --tensor-parallel, --replicas"
        )
    if overrides.config is not None or overrides.model_type is not None:
        raise JobError(f"--model {factory}: --config and --model-type say nothing of a module; leave them out")
    if overrides.input is not None:
        try:
            if not overrides.input.startswith("tokens:"):
                raise InputError(
                    f"input {overrides.input!r}: a module has no tokenizer; give tokens:random or a .npy file"
                )
            check_spec(overrides.input, "text")
        except InputError as error:
            raise JobError(f"--model {factory}: {error}, or a factory that returns (module, batches)") from error
    fingerprint = hashlib.sha256(_file_of(factory, base).read_bytes()).hexdigest()[:16]
    protocol = Protocol() if overrides.tokens is None else Protocol(tokens=overrides.tokens)
    content = "of the factory" if overrides.input is None else content_hash(overrides.input)
    dtype = overrides.dtype or "auto"

    def job(read: str) -> ReadJob:
        runs = READ_SPECS[read].runs_model
        return ReadJob(
            model=Model.model_construct(id=factory, source=factory),
            read=read,
            revision=None,
            seed=overrides.seed,
            engine=DEFAULT if runs else None,
            protocol_name="standard" + overrides.label(),
            protocol=protocol,
            protocol_hash=protocol_hash(read, protocol, dtype, content),
            input=None if overrides.input is None else _absolute(overrides.input),
            dtype=dtype,
            fingerprint=fingerprint,
            base=base,
            accumulator_gb=overrides.accumulator_gb,
            factory=factory,
        )

    return ModelJob(factory, tuple(job(read) for read in READS if read in (reads or READS)), 1)


def built(factory: str, base: Path) -> Any:
    """What `factory` returns: the named code is imported, from `base` first, and run.

    Raises:
        ValueError: it cannot be imported, or raises; one line.
    """
    name, _, attribute = factory.partition(":")
    with _importable(base):
        try:
            found = importlib.import_module(name)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (Exception, SystemExit) as error:  # the user's code runs: whatever it raises is told in one line
            raise ValueError(f"--model {factory}: cannot be imported ({message(error)})") from error
        try:
            return found()  # type: ignore[operator]
        except (Exception, SystemExit) as error:
            raise ValueError(f"--model {factory}: fails ({type(error).__name__}: {message(error)})") from error


@contextmanager
def _importable(base: Path) -> Iterator[None]:
    sys.path.insert(0, str(base))
    try:
        yield
    finally:
        sys.path.remove(str(base))


def _file_of(factory: str, base: Path) -> Path:
    name, _, attribute = factory.partition(":")
    if not all(part.isidentifier() for part in (*name.split("."), *attribute.split("."))):
        raise JobError(f"--model {factory!r} names no factory; write it as package.module:factory")
    below = Path(*name.split("."))
    for folder in (base, *map(Path, sys.path)):
        for file in (folder / below.with_suffix(".py"), folder / below / "__init__.py"):
            if file.is_file():
                return file
    raise JobError(f"--model {factory}: there is no module {name} here or in Python's path; give the command beside it")


def _absolute(spec: str) -> str:
    kind, _, rest = spec.partition(":")
    return spec if rest == "random" else f"{kind}:{Path(rest).resolve()}"
