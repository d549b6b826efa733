"""Where training frameworks keep a model: in the folder that is given, or in the one below that their `latest` names.

Without that file, a folder of this machine that holds the weights of one step alone is that step's.
"""

import re
from pathlib import Path

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.neox import FIRST_LAYER, layer_files
from deadbench.suite.checkpoints.formats.zero3 import FIRST_RANK
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.errors import CheckpointError

_STEPS = re.compile(r"iter_\d{7,}|global_step\d+|release")
_POINTERS = {"latest": "{}", "latest_checkpointed_iteration.txt": "iter_{:0>7}"}
_DEEPSPEED, _MEGATRON = "mp_rank_00_model_states.pt", "mp_rank_00{}/model_optim_rng.pt"


def trainers_files(files: Files) -> tuple[str, tuple[str, ...], str] | None:
    """(format, files, the folder they are in) of a training framework; None where it is none.

    Raises:
        CheckpointError: a pointer to what is not there.
    """
    if found := _inside(files, ""):
        return found
    for pointer, form in _POINTERS.items():
        if files.has(pointer):
            told = files.read(pointer, 0, 200).decode("utf-8", "replace").strip()
            if not re.fullmatch(r"[\w-][\w.-]*", told):
                raise CheckpointError(f"{pointer}: names {shown(told)}, which is no folder of a checkpoint")
            folder = form.format(told) if told.isdigit() else told
            found = _inside(files, f"{folder}/")
            if found is None:
                raise CheckpointError(f"{pointer}: names {folder}, where no weights are; copy that folder too")
            return found
    found_in = [found for name in _steps(files) if (found := _inside(files, f"{name}/"))]
    return found_in[0] if len(found_in) == 1 else None  # of several, who says that there are no weights names them


def _steps(files: Files) -> list[str]:
    """The folders of steps in one of this machine, whose pointer was not copied with them."""
    folder: Path | None = getattr(files, "folder", None)
    below = () if folder is None else folder.iterdir()
    return sorted(path.name for path in below if _STEPS.fullmatch(path.name) and path.is_dir())


def _inside(files: Files, folder: str) -> tuple[str, tuple[str, ...], str] | None:
    found = _there(files, folder)
    return (*found, folder) if found else None


def _there(files: Files, folder: str) -> tuple[str, tuple[str, ...]] | None:
    if folder and files.has(f"{folder}.metadata"):
        return "torch.distributed.checkpoint", (f"{folder}.metadata",)
    if files.has(f"{folder}{FIRST_LAYER}"):
        return "gpt-neox", layer_files(files, folder)
    if files.has(f"{folder}{FIRST_RANK}"):
        return "deepspeed-zero3", (f"{folder}{FIRST_RANK}",)
    if files.has(f"{folder}{_DEEPSPEED}"):
        return "deepspeed", (f"{folder}{_DEEPSPEED}",)
    for stage in ("", "_000"):  # the latter of a pipeline
        if files.has(name := folder + _MEGATRON.format(stage)):
            return "megatron", (name,)
    return None
