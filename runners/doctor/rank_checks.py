"""Whether processes can be a group: what they reduce together, a model that they share, and what a killed one leaves.

Those of one node are processes of the process that examines it, each with one of its GPUs; on a CPU there are two.
"""

import contextlib
import hashlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deadbench.runners.cluster.network import free_port, use_interface_of
from deadbench.runners.doctor.lines import Line, line_of
from deadbench.runners.doctor.node_checks import NotHereError, UnwellError
from deadbench.runners.doctor.read_checks import TWIN, is_the_twin, twin_job
from deadbench.runners.engines.device import free_bytes, pick_device
from deadbench.runners.jobs.events import Finished
from deadbench.runners.worker.group import join_group, run_rank
from deadbench.suite.errors import one_line
from deadbench.suite.schema import Row

_ANSWER_SECONDS = 90.0  # of one step of all ranks; the first has the import of torch
_FREE_SECONDS = 30.0  # after which what a killed process held must be free
_SHARED_BY = (4, 2)  # ranks that can share the twin, which has four heads
_ROUNDS = 5
_HERE = "127.0.0.1"
_Meeting = tuple[str, int]


class Reduced(NamedTuple):
    """What one rank has of sums over all: a hash of their bits, and bytes reduced a second."""

    digest: str
    rate: float


def reduced(rank: int, size: int, meeting: _Meeting, address: str = _HERE) -> Reduced:
    """As rank `rank` of `size`, on the interface of `address`: sum what each has drawn."""
    use_interface_of(address)
    group = join_group(rank, size, meeting)
    try:
        device = pick_device()
        elements = 2**26 if device.type == "cuda" else 2**20
        drawn = torch.randn(elements, generator=torch.Generator().manual_seed(rank)).to(device)
        dist.all_reduce(drawn)
        digest = hashlib.sha256(drawn.cpu().numpy().tobytes()).hexdigest()
        started = time.perf_counter()
        for _ in range(_ROUNDS):
            dist.all_reduce(drawn)
        last = float(drawn[-1])  # waits for a GPU
        seconds = time.perf_counter() - started
        assert last == last, "sums of normal numbers are numbers"
        group.ranks.gather(None)  # rank 0 serves the meeting: it leaves last
        return Reduced(digest, _ROUNDS * drawn.nbytes / seconds)
    finally:
        dist.destroy_process_group()


def agreed(found: list[Reduced], where: str) -> str:
    """That all ranks have the same sums, and how fast.

    Raises:
        UnwellError: they have not.
    """
    digests = [each.digest for each in found]
    if unlike := [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise UnwellError(f"sums of rank {', '.join(unlike)} are not those of rank 0; what links them corrupts data")
    rate = min(each.rate for each in found)
    return f"{len(found)} ranks {where} sum at {rate / 1e9:.2g} GB/s, to the same bits"


def rank_lines(node: str, num_gpus: int) -> Iterator[Line]:
    """The lines of a group on this node, over `num_gpus`, or without any on the CPU."""
    names = ("reduce", "tensor parallel", "killed rank")
    if num_gpus == 1:
        for name in names:
            yield Line(node, name, "skipped", "one GPU has no group")
        return
    with _started(num_gpus) as group:
        for name, check in zip(names, (group.reduce, group.tensor_parallel, group.killed), strict=True):
            yield line_of(node, name, check)


@contextlib.contextmanager
def _started(num_gpus: int) -> "Iterator[Group]":
    """A rank on each GPU, or two on the CPU, which are gone afterwards."""
    spawn, size = multiprocessing.get_context("spawn"), num_gpus or 2
    meetings = [(_HERE, free_port(_HERE)) for _ in range(2)]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
    group = Group([], [], num_gpus > 0)
    try:
        for rank in range(size):
            ours, theirs = spawn.Pipe()
            arguments = (theirs, rank, size, meetings, shown[rank] if num_gpus else None)
            process = spawn.Process(target=_be_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            group.pipes.append(ours)
            group.processes.append(process)
        yield group
    finally:
        for process in group.processes:
            process.kill()
            process.join()


@dataclass
class Group:
    """Ranks on this node, as processes that go from one step to the next and say by a pipe what came of it."""

    pipes: list[Connection]
    processes: list[Any]
    on_gpus: bool
    _fell: bool = False

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.pipes)

    def told(self, ranks: int) -> list[Any]:
        """What each of the first `ranks` says of its next step.

        Raises:
            NotHereError: they have failed before.
            UnwellError: one fails, dies or says nothing.
        """
        if self._fell:
            raise NotHereError("the ranks did not come so far")
        self._fell, until = True, time.monotonic() + _ANSWER_SECONDS
        said: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes[:ranks])}
        while waiting:
            ready = wait(list(waiting), max(0.0, until - time.monotonic()))
            if not ready:
                silent = min(waiting.values())
                told = f"rank {silent} of {self.size} said nothing for {_ANSWER_SECONDS:g} s"
                raise UnwellError(f"{told}; see that the interface lo is up")
            for pipe in ready:  # whoever fails is told, while others wait for it
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                said[rank] = self._received(rank)
        self._fell = False
        return [said[rank] for rank in range(ranks)]

    def _received(self, rank: int) -> Any:
        try:
            error, value = self.pipes[rank].recv()
        except EOFError as ended:
            self.processes[rank].join()
            code = self.processes[rank].exitcode
            raise UnwellError(f"rank {rank} of {self.size} died (exit code {code})") from ended
        if error is not None:
            raise UnwellError(f"rank {rank} of {self.size}: {error}")
        return value

    def reduce(self) -> str:
        """Sums over all ranks have the same bits on each."""
        return agreed(self.told(self.size), "here")

    def tensor_parallel(self) -> str:
        """A model that ranks share is read as by one."""
        sharing = shared_by(self.size)
        row: Row = self.told(sharing)[0]
        is_the_twin(row, f"{TWIN} shared by {sharing} ranks")
        return f"depth {row['depth']:.2f} by {sharing} ranks"

    def killed(self) -> str:
        """What a process held is free when it is killed."""
        held = self.told(self.size)[-1]
        device = torch.device("cuda", self.size - 1) if self.on_gpus else None
        before = free_bytes(device) if device else 0
        self.processes[-1].kill()
        self.processes[-1].join(_FREE_SECONDS)
        until = time.monotonic() + _FREE_SECONDS
        while device and free_bytes(device) - before < held / 2:
            if time.monotonic() > until:
                raise UnwellError(
                    f"a killed process's memory is not free after {_FREE_SECONDS:g} s; something outlives it on GPU "
                    f"{device.index}"
                )
            time.sleep(0.2)
        if self.processes[-1].exitcode is None:
            raise UnwellError(f"a killed process is there after {_FREE_SECONDS:g} s; its driver or file system hangs")
        return "gone, and its memory free"


def shared_by(size: int) -> int:
    """How many of `size` ranks share the twin."""
    return next(each for each in _SHARED_BY if each <= size)


def _be_rank(to: Connection, rank: int, size: int, meetings: list[_Meeting], gpu: str | None) -> None:
    """One rank: each step's (error, value), then whatever it holds until it is killed."""
    if gpu is None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        try:
            to.send((None, reduced(rank, size, meetings[0])))
            if rank < shared_by(size):
                to.send((None, _share(rank, shared_by(size), meetings[1])))
            held = torch.ones(2**28 if gpu is not None else 2**20, dtype=torch.float32, device=pick_device())
            to.send((None, held.nbytes))
        except Exception as error:
            to.send((one_line(error, 300), None))
        to.recv()


def _share(rank: int, size: int, meeting: _Meeting) -> Row | None:
    """Read the twin as one of `size` ranks that share it; rank 0 has the row."""
    group = join_group(rank, size, meeting)
    job = twin_job("torch").over(size)
    rows = [event.row for event in run_rank(group, job, "doctor", 1) if isinstance(event, Finished)]
    group.ranks.gather(None)
    dist.destroy_process_group()
    return rows[0] if rows else None
