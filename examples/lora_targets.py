"""LoRA that spends no rank on dead input directions.

    python examples/lora_targets.py ./my-checkpoint

A LoRA update `W + B A` of a linear map that a LayerNorm feeds sees `A y`. The part of A along the norm's dead direction
v sees the same number `v . beta` at every token: it can learn nothing but a bias. `dead_inputs` gives the dead
directions of each map; `project` takes them out of A, at initialisation or after every step.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deadbench.runners.results.directions_file import export_directions
from deadbench.suite.architectures.build import build_config
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.reads.dead_parameters import trace_published


def dead_inputs(source: str, directions: str) -> dict[str, Tensor]:
    """Dead input directions (D x m, orthonormal columns) of every linear map of a checkpoint that a norm feeds.

    Args:
        source: the checkpoint.
        directions: what `deadbench export SOURCE -o DIRECTIONS` wrote for it.
    """
    from safetensors.torch import load_file

    tensors = load_file(directions)
    model, wiring = trace_published(build_config(Checkpoint(source).config()))
    if wiring is None:
        raise ValueError(f"{source}: its forward pass cannot be followed")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # directions are named as in the bare model
    named = {path: f"{norm.removeprefix(prefix)}.dead_subspace" for path, norm in wiring.reads.items()}
    return {path: tensors[name] for path, name in named.items() if name in tensors}


def project(lora_a_RD: Tensor, dead_Dm: Tensor) -> Tensor:
    """The rows of a LoRA's A matrix (rank x D) without their part in the dead directions."""
    dead_Dm = dead_Dm.to(lora_a_RD)
    return lora_a_RD - (lora_a_RD @ dead_Dm) @ dead_Dm.T


def main() -> None:
    """List the maps of a checkpoint with the share of a random A that would be dead."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/lora_targets.py CHECKPOINT_FOLDER")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "directions.safetensors"
        export_directions(sys.argv[1], path)
        dead = dead_inputs(sys.argv[1], str(path))
    for name, dead_Dm in dead.items():
        a_RD = torch.from_numpy(np.random.default_rng(0).standard_normal((8, len(dead_Dm))))
        lost = 1 - (project(a_RD, dead_Dm).norm() / a_RD.norm()) ** 2
        print(f"{name}: {dead_Dm.shape[1]} dead of {len(dead_Dm)} input directions, {lost:.2%} of a random A")


if __name__ == "__main__":
    main()
