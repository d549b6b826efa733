"""One of two processes that train a model together and look at it; the first writes what it saw.

python -m tests.runners.live.ranks RANK FILE(rendezvous) OUT KIND
"""

import json
import os
import sys

import torch
import torch.distributed as dist

import deadbench
from tests.runners.live.models import Gpt


def main(rank: int, meeting: str, out: str, kind: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Gpt()
    ids_ST = torch.load(f"{out}/ids.pt")
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in model.h:
            fully_shard(block)
        if kind == "fsdp-norm":
            fully_shard(model.ln_f)
        wrapped = fully_shard(model)
    # The first rank has one batch more: all must still run forward equally often.
    mine = [ids_ST[:4], ids_ST[4:8], ids_ST[8:10]] if rank == 0 else [ids_ST[10:13], ids_ST[13:]]
    before = [type(p).__name__ for p in wrapped.parameters()]
    reading = deadbench.measure(wrapped, mine, reads=("parameters", "trained"), blocks="h")
    assert [type(p).__name__ for p in wrapped.parameters()] == before
    assert (reading.row is None) == (rank == 1)
    told = []
    for useless in ([], [(ids_ST, ids_ST, ids_ST)]):  # of one rank: the other must not wait for it in a forward pass
        try:
            deadbench.measure(wrapped, useless if rank else mine)
        except ValueError as error:
            told.append(str(error))
    logits, _ = wrapped(ids_ST[:2])
    logits.sum().backward()  # and it goes on
    if rank == 0:
        rows = {"reads": reading.rows, "blocks": reading.blocks, "norms": reading.norms, "told": told}
        with open(f"{out}/{kind}.json", "w", encoding="utf-8") as file:
            json.dump(rows, file, default=str)
    dist.barrier()
    dist.destroy_process_group()
    # Sharded tensors still hold the group: gloo's threads would meet an interpreter that is ending (pytorch #179291).
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
