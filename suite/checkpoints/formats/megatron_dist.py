"""Megatron-core's distributed form, `torch_dist`: the layers of a kind are one tensor, and `common.pt` lies beside.

The first axis of such a tensor counts the layers; its name has no number. The command's arguments are in `common.pt`,
which torch.save wrote.
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.megatron import recorded_config, recorded_norm
from deadbench.suite.checkpoints.formats.state_dicts import recorded_step
from deadbench.suite.checkpoints.formats.torch_files import load_torch_file
from deadbench.suite.checkpoints.tensors import Contents, Piece, TensorEntry
from deadbench.suite.errors import CheckpointError

_COMMON = "common.pt"
_STACKED = re.compile(r"((?:.*\.)?(?:decoder|encoder)\.layers\.)(?!\d+\.)(.+)")
_MOST_LAYERS = 1000


def of_megatron(files: Files, folder: str, contents: Contents) -> Contents:
    """What a `folder` of torch.distributed.checkpoint holds, as Megatron-core calls it outside of that form."""
    contents = replace(contents, entries=list(_apart(contents.entries)))
    if not files.has(name := folder + _COMMON):
        return contents
    try:
        value, _, _ = load_torch_file(files, name)
    except CheckpointError as error:  # which a configuration from elsewhere makes up for
        return replace(contents, remark=str(error))
    norm = recorded_norm(value, (entry.name for entry in contents.entries))
    if norm is None:
        return contents
    config, _ = recorded_config(value, norm)  # that it is of several ranks does not matter: tensors are whole
    step = recorded_step(value) if contents.step is None else contents.step
    return replace(contents, step=step, config=config, norm=norm)


def _apart(entries: Sequence[TensorEntry]) -> Iterable[TensorEntry]:
    """The tensors, with one for each layer in place of one for all."""
    counts: dict[str, set[int]] = {}
    for entry in entries:
        if found := _STACKED.fullmatch(entry.name):
            counts.setdefault(found[1], set()).add(entry.shape[0] if len(entry.shape) > 1 else 0)
    for entry in entries:
        found = _STACKED.fullmatch(entry.name)
        count = counts[found[1]] if found else set()
        if found and len(count) == 1 and 0 < max(count) <= _MOST_LAYERS:
            yield from _layers(entry, found[1], found[2])
        else:
            yield entry


def _layers(entry: TensorEntry, begin: str, part: str) -> Iterable[TensorEntry]:
    pieces: list[list[Piece]] = [[] for _ in range(entry.shape[0])]
    for piece in entry.pieces:
        for number in range(piece.shape[0]):
            size = (piece.end - piece.start) // piece.shape[0]
            locate = functools.partial(_locate, whole=piece, number=number)
            part_of_it = Piece(piece.file, 0, size, piece.place[1:], piece.shape[1:], None, locate)
            pieces[piece.place[0] + number].append(part_of_it)
    for layer, own in enumerate(pieces):
        file = own[0].file if own else entry.file
        yield replace(
            entry, name=f"{begin}{layer}.{part}", called=entry.stored_name, file=file, shape=entry.shape[1:],
            pieces=tuple(own),
        )  # fmt: skip


def _locate(files: Files, piece: Piece, whole: Piece, number: int) -> Piece:
    """Of a piece of several layers the part of one."""
    held = whole.locate(files, whole) if whole.locate else whole
    item = (whole.end - whole.start) // max(math.prod(whole.shape), 1)
    step = held.strides[0] if held.strides else math.prod(piece.shape)
    start = held.start + number * step * item
    end = held.end - (whole.shape[0] - 1 - number) * step * item
    strides = held.strides and held.strides[1:]
    return held._replace(start=start, end=end, place=piece.place, shape=piece.shape, strides=strides)
