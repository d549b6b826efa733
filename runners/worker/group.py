"""Processes that do one read together, as ranks of a group."""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deadbench.runners.engines.tensor_parallel import PATIENCE, current_ranks
from deadbench.runners.jobs.events import Event, GroupBrokenError, Progress, Remark
from deadbench.runners.jobs.job import ModelJob, ReadJob
from deadbench.runners.worker.run import run_model
from deadbench.suite.ranks import Ranks
from deadbench.suite.read_specs import READ_SPECS

_WAITING = 1024  # ranks that may ask at once
_IN_STEP_SECONDS = 20  # after a failure, within which every rank must have come to the end of that read


@dataclass(frozen=True)
class RankGroup:
    """This process's place in its group; `store` is what all ranks can read and write."""

    ranks: Ranks
    store: Any

    def in_step(self, mark: str, failed: bool) -> bool:
        """Say that this rank is through with `mark`; after a failure, whether all ranks are."""
        self.store.set(f"{mark}/{self.ranks.rank}", "through")
        if not failed:
            return True
        try:
            keys = [f"{mark}/{rank}" for rank in range(self.ranks.size)]
            self.store.wait(keys, timedelta(seconds=_IN_STEP_SECONDS))
        except RuntimeError:
            return False
        return True


def join_group(rank: int, size: int, meeting: tuple[str, int]) -> RankGroup:
    """Become rank `rank` of `size`, at the address that rank 0 serves: NCCL where there are GPUs, else gloo."""
    host, port = meeting
    listening = _listening(host, port) if rank == 0 else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, size, is_master=rank == 0, timeout=timedelta(minutes=5), master_listen_fd=listening
    )
    os.environ["LOCAL_RANK"] = "0"  # Ray shows each actor its own devices only
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    return RankGroup(current_ranks(), store)


def _listening(host: str, port: int) -> int:
    """A socket at this address alone: by itself a store listens on all interfaces, and answers whoever asks."""
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(_WAITING)
        return listening.detach()


def run_rank(group: RankGroup, job: ModelJob, run_id: str, attempt: int) -> Iterator[Event]:
    """`run_model` on one rank or replica; only rank 0 tells what was read, and any rank that it failed alone.

    Raises:
        GroupBrokenError: after a failure that leaves the ranks out of step.
    """
    first = group.ranks.rank == 0
    for number, event in enumerate(_finished_or_progress(job, first, run_id, attempt)):
        if isinstance(event, Progress | Remark) or not _shared(event.job):
            yield event
            continue
        failed = event.row["status"] != "ok"
        if not group.in_step(json.dumps([attempt, *map(str, event.job.identity())]), failed):
            yield event
            raise GroupBrokenError(f"rank {group.ranks.rank} of {group.ranks.size} failed alone at event {number}")
        if first:
            yield event


def _shared(read: ReadJob) -> bool:
    """Whether the ranks do this read together; rank 0 alone does what needs no model, and what needs its head."""
    return READ_SPECS[read.read].divides


def _finished_or_progress(job: ModelJob, first: bool, run_id: str, attempt: int) -> Iterator[Event]:
    """The events of the reads that this rank takes part in: what needs no model is read by rank 0 alone."""
    alone = [] if first else [read.identity() for read in job.reads if not _shared(read)]
    return run_model(job.without(alone), run_id, attempt)
