"""DeepSpeed's checkpoints whose model is whole on every rank: one file of the model's states."""

from dataclasses import replace

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.torch_files import read_torch_file
from deadbench.suite.checkpoints.tensors import Contents


def read_deepspeed(files: Files, name: str) -> Contents:
    """The tensors of the model's states; of a model that is cut over ranks, those of the first.

    Raises:
        CheckpointError: as `read_torch_file` does.
    """
    contents = read_torch_file(files, name)
    second = name.replace("mp_rank_00", "mp_rank_01")
    if not files.has(second):
        return contents
    unfit = (
        f"the model is cut over tensor-parallel ranks ({second} is there), by rules that its training program alone "
        "knows; merge it there and give that"
    )
    return replace(contents, unfit=unfit)
