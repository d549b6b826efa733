"""DeepSpeed's ZeRO 3: every parameter is cut into as many equal runs of its flattened values as there are ranks.

The model's states of rank 0 say what the parameters are; each rank's optimizer states hold its runs, one after another.
What is not trained lies by name in each rank's states of the model, buffers in those of rank 0.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.state_dicts import recorded_step
from deadbench.suite.checkpoints.formats.torch_files import load_torch_file
from deadbench.suite.checkpoints.formats.torch_objects import StoredTensor
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.checkpoints.tensors import ITEM_BYTES, Contents, Piece, TensorEntry, check_name
from deadbench.suite.errors import CheckpointError

FIRST_RANK = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_RANKS = 100_000


def read_zero3(files: Files, name: str) -> Contents:
    """The parameters of a ZeRO-3 checkpoint, of which `name` is the model's states of rank 0.

    Raises:
        CheckpointError: a rank's file is missing, or holds less than its runs.
    """
    value, place, _ = load_torch_file(files, name)
    told = value if isinstance(value, dict) else {}
    shapes = told.get("param_shapes")
    groups = shapes if isinstance(shapes, list) else [shapes]
    if not groups or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{name}: no param_shapes, as DeepSpeed's ZeRO 3 writes; convert it with zero_to_fp32.py")
    folder = name.removesuffix(FIRST_RANK)
    states = _optimizer_files(files, folder)
    ranks = [_Runs(files, file, len(states)) for file in states]
    entries = {}
    for group in groups:
        for called, shape in dict(group or {}).items():
            entries[called] = _entry(name, called, shape, [runs.next for runs in ranks])
    frozen = told.get("frozen_param_shapes")
    if isinstance(frozen, dict) and frozen:
        held = [_Frozen(files, file) for file in _model_files(folder, len(states))]
        for called, shape in frozen.items():
            entries[called] = _entry(name, called, shape, [functools.partial(each.run, called) for each in held])
    whole, buffers = told.get("module"), told.get("buffer_names")
    whole = whole if isinstance(whole, dict) else {}
    for called in buffers if isinstance(buffers, list) else ():
        if isinstance(tensor := whole.get(called), StoredTensor):
            check_name(name, called)
            piece = place(tensor)
            entries[called] = TensorEntry(called, name, tensor.dtype, tensor.shape, piece.start, piece.end, (piece,))
    shared = told.get("shared_params")
    for called, source in shared.items() if isinstance(shared, dict) else ():
        if source in entries and isinstance(called, str):
            check_name(name, called)
            entries.setdefault(called, replace(entries[source], name=called))
    return Contents(list(entries.values()), recorded_step(value))


def _model_files(folder: str, num_ranks: int) -> list[str]:
    return [f"{folder}zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(num_ranks)]


def _optimizer_files(files: Files, folder: str) -> list[str]:
    """The file of each rank."""
    for kind in ("", "bf16_", "fp16_"):
        names = (f"{folder}{kind}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(_RANKS))
        if found := list(itertools.takewhile(files.has, names)):
            return found
    raise CheckpointError(
        f"{folder}zero_pp_rank_0_mp_rank_00_optim_states.pt: missing, and with it a part of every parameter; copy the "
        "files of all ranks"
    )


class _Runs:
    """The runs of one rank, in the order of the parameters."""

    def __init__(self, files: Files, file: str, num_ranks: int):
        value, self._place, _ = load_torch_file(files, file)
        states = value.get("optimizer_state_dict") if isinstance(value, dict) else None
        groups = states.get("fp32_flat_groups") if isinstance(states, dict) else None
        if not isinstance(groups, list) or not all(isinstance(g, StoredTensor) and len(g.shape) == 1 for g in groups):
            raise CheckpointError(f"{file}: no fp32_flat_groups, as ZeRO 3 writes; convert it with zero_to_fp32.py")
        self.file, self._groups, self._at = file, list(groups), 0
        told = states.get("partition_count") if isinstance(states, dict) else None
        if type(told) is int and told != num_ranks:
            raise CheckpointError(
                f"{file}: one of {told} ranks, of which {num_ranks} are here; copy the files of all ranks"
            )

    def next(self, count: int) -> tuple[str, Piece]:
        """The next `count` values, and their dtype."""
        while self._groups and self._at == self._groups[0].shape[0]:
            self._groups.pop(0)
            self._at = 0
        if not self._groups or self._at + count > self._groups[0].shape[0]:
            raise CheckpointError(f"{self.file}: fewer values than its parameters have; download the file again")
        group = self._groups[0]
        run = StoredTensor(group.storage, group.dtype, group.offset + self._at, (count,), (1,))
        self._at += count
        return group.dtype, self._place(run)


class _Frozen:
    """The runs of one rank of what is not trained, by name, beside its states of the model."""

    def __init__(self, files: Files, file: str):
        value, self._place, _ = load_torch_file(files, file)
        told = value.get("frozen_param_fragments") if isinstance(value, dict) else None
        self._file, self._runs = file, told if isinstance(told, dict) else {}

    def run(self, name: str, count: int) -> tuple[str, Piece]:
        """The first `count` values of a parameter's run, and their dtype."""
        run = self._runs.get(name)
        if not isinstance(run, StoredTensor) or len(run.shape) != 1 or run.shape[0] < count:
            raise CheckpointError(f"{self._file}: no run of {count} values of {name}; copy the files of all ranks")
        return run.dtype, self._place(StoredTensor(run.storage, run.dtype, run.offset, (count,), run.strides))


def _entry(file: str, name: Any, shape: Any, ranks: Sequence[Callable[[int], tuple[str, Piece]]]) -> TensorEntry:
    """A parameter, of which each of the ranks gives the next run of so many values."""
    if not isinstance(name, str) or not isinstance(shape, tuple):
        raise CheckpointError(f"{file}: {shown(name)} is of shape {shown(shape)}; corrupt")
    check_name(file, name)
    if not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise CheckpointError(f"{file}: {shown(name)} is of shape {shown(shape)}; corrupt")
    values = math.prod(shape)
    each = -(-values // len(ranks))
    pieces, dtypes = [], set()
    for rank, run in enumerate(ranks):
        dtype, piece = run(each)
        dtypes.add(dtype)
        count = max(0, min(each, values - rank * each))  # the last ones are filled up
        end = piece.start + ITEM_BYTES[dtype] * count
        pieces.append(Piece(piece.file, piece.start, end, (rank * each,), (count,), piece.strides, piece.locate))
    if len(dtypes) != 1:
        raise CheckpointError(f"{file}: the runs of {shown(name)} are {', '.join(sorted(dtypes))}; corrupt")
    held = tuple(piece for piece in pieces if piece.shape[0]) or tuple(pieces[:1])
    return TensorEntry(name, held[0].file, dtypes.pop(), shape, 0, 0, held, flat=True)
