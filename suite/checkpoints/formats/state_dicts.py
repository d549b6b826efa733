"""The state dict in what a training script saved: alone, or beside optimizers, under a key, in nested dicts."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from deadbench.suite.checkpoints.formats import megatron
from deadbench.suite.checkpoints.formats.nanogpt import NANOGPT, recorded_config
from deadbench.suite.checkpoints.formats.torch_objects import StoredTensor
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.checkpoints.tensors import Contents, Piece, TensorEntry, check_name
from deadbench.suite.errors import CheckpointError

# Where training scripts keep the model beside optimizers and counters, the surest first.
_MODEL_KEYS = ("state_dict", "model_state_dict", "module", "model", "model_state")
STEP_KEYS = ("global_step", "global_steps", "iter_num", "iteration", "step", "num_updates")
_BESIDE = re.compile(  # it; the first part of a name, for which Megatron numbers its optimizers
    r"(chained_\d+\.)?(optimizers?|optim|optimizer_states|lr_schedulers?|loss_fn)(\.|$)"
)
_MAX_DEPTH, _MAX_VALUES = 16, 2_000_000


@dataclass(frozen=True)
class Named:
    """A tensor of which the name alone is told here; what it is stands elsewhere under that."""

    name: str


_TENSORS = (StoredTensor, Named)


def contents_of(value: Any, file: str, place: Callable[[StoredTensor], Piece], remark: str | None = None) -> Contents:
    """The tensors of the model in a value of torch.save, each at its `place`, and what is recorded beside them.

    Raises:
        CheckpointError: no tensors.
    """
    entries: dict[str, TensorEntry] = {}
    for name, tensor in named_tensors(model_part(value), file):
        piece = place(tensor)
        check_name(file, name)
        if name in entries:
            raise CheckpointError(f"{file}: two tensors are called {shown(name)}; corrupt or hostile")
        entries[name] = TensorEntry(name, file, tensor.dtype, tensor.shape, piece.start, piece.end, (piece,))
    if not entries:
        raise CheckpointError(
            f"{file}: a {type(value).__name__} without tensors by name; give the file of the state_dict"
        )
    config = recorded_config(value)
    norm = megatron.recorded_norm(value, entries)
    told, unfit = megatron.recorded_config(value, norm) if norm else (None, None)
    return Contents(
        list(entries.values()), recorded_step(value), config or told, remark, norm, NANOGPT if config else None, unfit
    )


def model_part(value: Any) -> Any:
    """The state dict inside what was saved; what was saved itself where it is one."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(value, dict) or any(isinstance(each, _TENSORS) for each in value.values()):
            return value
        inner = next((value[key] for key in _MODEL_KEYS if isinstance(value.get(key), dict) and value[key]), None)
        if inner is None:
            return value
        value = inner
    return value


def recorded_step(value: Any) -> int | None:
    """The training step that was saved beside the model."""
    for key in STEP_KEYS if isinstance(value, dict) else ():
        if is_step(step := value.get(key)):
            return int(step)
    return None


def is_step(value: Any) -> bool:
    """Whether a value can be a training step."""
    return type(value) is int and 0 <= value < 2**63


def named_tensors(value: Any, file: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of a state dict, of nested ones with the path before it."""
    pending: list[tuple[str, Any, int]] = [("", value, 0)] if isinstance(value, dict) else []
    seen = 0
    while pending:
        path, each, depth = pending.pop()
        if isinstance(each, _TENSORS):
            yield path, each
            continue
        seen += len(each)
        if depth > _MAX_DEPTH or seen > _MAX_VALUES:
            raise CheckpointError(f"{file}: dicts {depth} deep, {seen:,} values; no state dict is like that")
        for key, below in reversed(each.items()):
            if depth == 0 and _BESIDE.match(str(key)):
                continue
            if isinstance(below, (*_TENSORS, dict)):
                if not isinstance(key, (str, int)):
                    raise CheckpointError(f"{file}: a tensor is called {shown(key)}; give a state_dict")
                pending.append((f"{path}.{key}" if path else str(key), below, depth + 1))
