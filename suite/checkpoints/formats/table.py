"""The formats of checkpoints, a line each, in the order in which one counts where a folder has several."""

from collections.abc import Callable
from dataclasses import dataclass

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.dcp import read_dcp
from deadbench.suite.checkpoints.formats.deepspeed import read_deepspeed
from deadbench.suite.checkpoints.formats.gguf import MAGIC, read_gguf
from deadbench.suite.checkpoints.formats.megatron_ranks import read_megatron
from deadbench.suite.checkpoints.formats.neox import read_layer
from deadbench.suite.checkpoints.formats.safetensors import read_header
from deadbench.suite.checkpoints.formats.torch_files import TORCH_MAGIC, read_torch_file
from deadbench.suite.checkpoints.formats.zero3 import read_zero3
from deadbench.suite.checkpoints.no_weights import OTHER_LIBRARIES
from deadbench.suite.checkpoints.tensors import Contents


@dataclass(frozen=True)
class Format:
    """A format of files that hold weights.

    Attributes:
        name: in rows and messages.
        read: the contents of one file, by its header.
        file: the name of the one file that is looked for; None: a file has no fixed name.
        index: the name of the index that lists several.
        suffixes: of files under other names.
        magic: how a file begins, whatever it is called.
        scattered: the file that is opened says in which others the values lie.
        records: its files say what the architecture is.
    """

    name: str
    read: Callable[[Files, str], Contents]
    file: str | None = None
    index: str | None = None
    suffixes: tuple[str, ...] = ()
    magic: tuple[bytes, ...] = ()
    scattered: bool = False
    records: bool = False

    def is_there(self, files: Files) -> bool:
        """Whether a folder has the file of the format's own name."""
        return self.file is not None and files.has(self.file)


_SAFETENSORS, _TORCH = (".safetensors",), (".bin", ".pt", ".pth", ".pth.tar", ".ckpt")
FORMATS = (
    Format("safetensors", read_header, "model.safetensors", "model.safetensors.index.json", _SAFETENSORS),
    Format("torch", read_torch_file, "pytorch_model.bin", "pytorch_model.bin.index.json", _TORCH, TORCH_MAGIC),
    Format("torch.distributed.checkpoint", read_dcp, ".metadata", scattered=True),
    Format("gguf", read_gguf, suffixes=(".gguf",), magic=(MAGIC,), scattered=True, records=True),
)
# Of training frameworks, whose folders `trainers_files` knows.
FRAMEWORKS = (
    Format("deepspeed", read_deepspeed),
    Format("deepspeed-zero3", read_zero3, scattered=True),
    Format("megatron", read_megatron, scattered=True, records=True),
    Format("gpt-neox", read_layer, scattered=True),
)
WEIGHT_ENDINGS = (*(suffix for each in FORMATS for suffix in each.suffixes), ".distcp", *OTHER_LIBRARIES)
