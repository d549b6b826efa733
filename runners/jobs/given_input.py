"""Which input a model is given: the one that was asked for, else the first of its protocol's that can be had."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from deadbench.runners.jobs.job import JobError, Overrides, Unfit
from deadbench.suite.errors import CheckpointError, InputError
from deadbench.suite.inputs.early_checks import check_config, has_tokenizer
from deadbench.suite.inputs.hub_files import why_unreachable
from deadbench.suite.inputs.specs import check_spec, content_hash
from deadbench.suite.registry.entries import Model, Protocol, Registry

DEFAULT_INPUT = {"text": "text", "image": "image", "audio": "audio:noise"}


@dataclass(frozen=True)
class GivenInput:
    """An input specification, and what it stands for: the protocol's own input, which cannot be had, and why."""

    spec: str
    stands_for: str | None = None
    why: str | None = None


def default_input(model: Model, protocol: Protocol) -> str:
    """What the model is fed under the protocol where nothing else is said, and everything can be had."""
    own = protocol.inputs.get(model.modality, [DEFAULT_INPUT[model.modality]])
    return model.input or own[0]


def given_input(model: Model, protocol: Protocol, overrides: Overrides, base: Path) -> GivenInput:
    """The first of the protocol's inputs for the model's modality that can be had here, else the last of them.

    Raises:
        JobError: one of them is no input for the model.
    """
    if model.input is not None or model.modality not in protocol.inputs:
        return GivenInput(default_input(model, protocol))
    inputs = protocol.inputs[model.modality]
    try:
        for spec in inputs:
            check_spec(spec, model.modality)
    except InputError as error:
        raise JobError(f"{model.id}: {error}") from error
    missing: str | None = None
    for spec in inputs:
        why = _why_missing(spec, model, overrides, base) if spec != inputs[-1] else None
        if why is None:
            return GivenInput(spec) if spec == inputs[0] else GivenInput(spec, inputs[0], missing)
        missing = missing or why
    raise AssertionError("the last input is always given")


def _why_missing(spec: str, model: Model, overrides: Overrides, base: Path) -> str | None:
    """Why an input cannot be had for the model, in one line: no network, or no tokenizer."""
    kind, _, rest = spec.partition(":")
    if kind == "hf" and (why := why_unreachable(rest)) is not None:
        return why
    if kind not in ("text", "hf") or model.modality != "text":
        return None
    if model.source is None:
        return f"{model.id} has no source, whose tokenizer {spec} needs"
    try:
        names = overrides.opened(model.source, model.main_checkpoint(), base).names()
    except CheckpointError as error:
        return f"the tokenizer that {spec} needs cannot be reached ({error})"
    return None if has_tokenizer(names) else f"{model.id} has no tokenizer, which {spec} needs"


def changed_label(registry: Registry, protocol_name: str, model: Model, overrides: Overrides) -> str:
    """What the command line changes in a protocol, as it is appended to its name.

    An input that the registry gives the model under that protocol changes nothing.
    """
    if overrides.taps == registry.protocols[protocol_name].taps:
        overrides = replace(overrides, taps=None)
    if overrides.input is None:
        return overrides.label()
    suites = [suite for suite in registry.suites.values() if suite.protocol == protocol_name]
    entries = [entry.input for suite in suites for entry in suite.entries() if entry.model == model.id]
    own = default_input(model, registry.protocols[protocol_name])
    same = any(_same_input(given or own, overrides.input) for given in [*entries, None])
    return (replace(overrides, input=None) if same else overrides).label()


def _same_input(one: str, other: str) -> bool:
    """Whether two inputs are of one kind and content, which is what the protocol's hash goes by."""
    if one.partition(":")[0] != other.partition(":")[0]:
        return False
    with contextlib.suppress(OSError, InputError):  # what is not here is another, or is told where it is asked for
        return content_hash(one) == content_hash(other)
    return False


def why_unfit(model: Model, spec: str, overrides: Overrides, base: Path) -> Unfit | None:
    """Why the model cannot take an input, as far as its configuration and the names of its files tell."""
    try:
        known = model.main_checkpoint()
        checkpoint = overrides.opened(model.source, known, base) if model.source else None
        here = checkpoint if checkpoint is not None and checkpoint.folder is not None else None
        config = model.config or (checkpoint.config() if checkpoint is not None else {})
        check_config(spec, model.modality, config, None if here is None else here.names())
    except InputError as error:
        return Unfit(error)
    except CheckpointError:
        pass  # which the read will say
    return None
