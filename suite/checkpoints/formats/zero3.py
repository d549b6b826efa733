"""DeepSpeed's ZeRO 3: every parameter is cut into as many equal runs of its flattened values as there are ranks.

The model's states of rank 0 say what the parameters are; each rank's optimizer states hold its runs, one after another.
"""

import itertools
import math

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.state_dicts import recorded_step
from deadbench.suite.checkpoints.formats.torch_files import load_torch_file
from deadbench.suite.checkpoints.formats.torch_objects import StoredTensor
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.checkpoints.tensors import Contents, Piece, TensorEntry, check_name
from deadbench.suite.errors import CheckpointError

FIRST_RANK = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_RANKS = 100_000


def read_zero3(files: Files, name: str) -> Contents:
    """The parameters of a ZeRO-3 checkpoint, of which `name` is the model's states of rank 0.

    Raises:
        CheckpointError: a rank's file is missing, or holds less than its runs.
    """
    value, _, _ = load_torch_file(files, name)
    shapes = value.get("param_shapes") if isinstance(value, dict) else None
    groups = shapes if isinstance(shapes, list) else [shapes]
    if not groups or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{name}: no param_shapes, as DeepSpeed's ZeRO 3 writes; convert it with zero_to_fp32.py")
    folder = name.removesuffix(FIRST_RANK)
    states = _optimizer_files(files, folder)
    ranks = [_Runs(files, file, len(states)) for file in states]
    entries = []
    for group in groups:
        for called, shape in dict(group or {}).items():
            check_name(name, called)
            if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
                raise CheckpointError(f"{name}: {shown(called)} is of shape {shown(shape)}; corrupt")
            entries.append(_entry(called, shape, ranks))
    return Contents(entries, recorded_step(value))


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

    def next(self, count: int) -> Piece:
        """The next `count` values."""
        while self._groups and self._at == self._groups[0].shape[0]:
            self._groups.pop(0)
            self._at = 0
        if not self._groups or self._at + count > self._groups[0].shape[0]:
            raise CheckpointError(f"{self.file}: fewer values than its parameters have; download the file again")
        group = self._groups[0]
        run = StoredTensor(group.storage, group.dtype, group.offset + self._at, (count,), (1,))
        self._at += count
        return self._place(run)


def _entry(name: str, shape: tuple[int, ...], ranks: list[_Runs]) -> TensorEntry:
    values = math.prod(shape)
    each = -(-values // len(ranks))
    pieces, dtype = [], "F32"
    for rank, runs in enumerate(ranks):
        piece = runs.next(each)
        count = max(0, min(each, values - rank * each))  # the last ones are filled up
        pieces.append(
            Piece(piece.file, piece.start, piece.start + 4 * count, (rank * each,), (count,), None, piece.locate)
        )
    held = tuple(piece for piece in pieces if piece.shape[0]) or tuple(pieces[:1])
    return TensorEntry(name, held[0].file, dtype, shape, 0, 0, held, flat=True)
