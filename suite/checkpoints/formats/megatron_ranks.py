"""Megatron-LM's folder of ranks: a file for each tensor-parallel rank of each stage of a pipeline, put together."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from deadbench.suite.checkpoints.dialects.tensors import Values, joined
from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.megatron import arguments
from deadbench.suite.checkpoints.formats.state_dicts import contents_of
from deadbench.suite.checkpoints.formats.torch_files import load_torch_file
from deadbench.suite.checkpoints.tensors import Contents, TensorEntry

_FIRST = re.compile(r"mp_rank_00(_000)?/model_optim_rng\.pt$")
_MOST = 1000  # ranks, and stages
_ROWS = re.compile(
    r"word_embeddings\.weight$|output_layer\.weight$|(query_key_value|linear_qkv|dense_h_to_4h|linear_fc1)\.(weight|bias)$"
)
_COLUMNS = re.compile(r"((self_)?attention\.dense|linear_proj|dense_4h_to_h|linear_fc2)\.weight$")
_UP = re.compile(r"(dense_h_to_4h|linear_fc1)\.(weight|bias)$")
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def read_megatron(files: Files, name: str) -> Contents:
    """The tensors of a checkpoint, of which `name` is the first rank's file.

    Raises:
        CheckpointError: a file that cannot be read, or ranks that do not fit together.
    """
    folder, staged = _FIRST.sub("", name), "_000/" in name
    value, _, _ = load_torch_file(files, name)
    told = arguments(value)
    expected = (told.get("tensor_model_parallel_size", 1), told.get("pipeline_model_parallel_size", 1))
    stages = [_ranks(files, folder, stage) for stage in _stages(files, folder, staged)]
    entries: dict[str, TensorEntry] = {}
    blocks = 0
    for ranks in stages:
        here = _stage(ranks, bool(told.get("swiglu")))
        for entry in here:  # each counts its layers anew; what the last one has of the first one's is the same
            called = _renumbered(entry.name, blocks)
            entries.setdefault(called, replace(entry, name=called, called=entry.stored_name))
        blocks += 1 + max((int(found[0]) for each in here if (found := _LAYER.search(each.name))), default=-1)
    first, there = stages[0][0], (len(stages[0]), len(stages))
    unfit = None if expected == there != (1, 1) else first.unfit  # which was said of one file
    if expected != there:
        unfit = (
            f"files of {there[0]} tensor-parallel and {there[1]} pipeline ranks, not of {expected}; copy those of all"
        )
    norms = [ranks[0].norm for ranks in stages if ranks[0].norm]
    final = next((norm.name for norm in norms if norm.name), None)
    told_norm = replace(norms[0], name=final) if norms else None
    return replace(first, entries=list(entries.values()), norm=told_norm, unfit=unfit)


def _stages(files: Files, folder: str, staged: bool) -> list[int | None]:
    """The stages of a pipeline; one without a number where there is none."""
    if not staged:
        return [None]
    return list(itertools.takewhile(lambda stage: files.has(_name(folder, 0, stage)), range(_MOST)))


def _ranks(files: Files, folder: str, stage: int | None) -> list[Contents]:
    """What the tensor-parallel ranks of a stage have."""
    names = itertools.takewhile(files.has, (_name(folder, rank, stage) for rank in range(_MOST)))
    found = []
    for name in names:
        value, place, remark = load_torch_file(files, name)
        found.append(contents_of(value, name, place, remark))
    return found


def _stage(ranks: Sequence[Contents], gated: bool) -> list[TensorEntry]:
    """The tensors of a stage: what its ranks have of each, put together."""
    held = [{each.name: each for each in contents.entries} for contents in ranks]
    whole = []
    for entry in ranks[0].entries:
        parts = [each[entry.name] for each in held if entry.name in each]
        cut = _ROWS.search(entry.name) or _COLUMNS.search(entry.name)
        if len(parts) > 1 and cut:
            entry = joined(entry.name, parts, 1 if _COLUMNS.search(entry.name) else 0)
            entry = replace(entry, made=_gates_first) if gated and _UP.search(entry.name) else entry
        whole.append(entry)
    return whole


def _renumbered(name: str, before: int) -> str:
    return _LAYER.sub(lambda found: str(int(found[0]) + before), name)


def _name(folder: str, rank: int, stage: int | None) -> str:
    return f"{folder}mp_rank_{rank:02d}{'' if stage is None else f'_{stage:03d}'}/model_optim_rng.pt"


def _gates_first(*values: Values) -> Values:
    """Each rank has its part of the gate's rows, then its part of the others."""
    halves = [np.split(each, 2) for each in values]
    return np.concatenate([each[half] for half in (0, 1) for each in halves])
