"""One of two processes that shard the tensors of a safetensors file by FSDP2, train for a step and save what they have.

python -m tests.suite.checkpoints.formats.fsdp_ranks RANK FILE(rendezvous) SAFETENSORS OUT
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard


def as_modules(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Modules of the names in a state dict, which hold its tensors and compute nothing."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, torch.nn.Parameter(tensor))
    return root


def main(rank: int, meeting: str, source: str, out: str) -> None:
    """Save as a training of two ranks does: the model below `model`, AdamW's states and a step beside it."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    model = as_modules(load_file(source))
    for block in model.get_submodule("gpt_neox.layers").children():
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer, "step": 7}, checkpoint_id=out)
    dist.destroy_process_group()
    # Sharded tensors still hold the group: gloo's threads would meet an interpreter that is ending (pytorch #179291).
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
