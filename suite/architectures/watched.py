"""A process that tries something of a stranger's: started apart, and watched for time and memory while it answers.

It limits its own CPU time. Memory is watched and not refused: what is refused an allocation may go another way, which
where nothing is refused is not gone.
"""

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

START_SECONDS = 180.0  # on the clock, until a process has its libraries
_STARVED = 10  # times as long on the clock, while it computes: other work has the cores, and its CPU time is limited
_LOOK_SECONDS = 0.05  # at its memory
_IDLE_LOOKS = 20  # in a row at a process that waits: one may fall on a pause in its work


class LimitError(Exception):
    """What a process took too much of."""


def start(module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """Python with one module of ours, which finds nothing in the working folder and nothing on the Hub."""
    root = str(Path(str(sys.modules["deadbench"].__file__)).parents[1])
    path = os.pathsep.join(each for each in (root, os.environ.get("PYTHONPATH")) if each)
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **offline, "TOKENIZERS_PARALLELISM": "false"},
    )


def limit_cpu(seconds: int) -> None:
    """So much CPU time for this process, counted from here; no core file is left of it."""
    import resource  # which Windows lacks

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def say(running: "subprocess.Popen[bytes]", line: bytes) -> None:
    """Write a line to the process, which may have ended."""
    assert running.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        running.stdin.write(line + b"\n")
        running.stdin.flush()


def answer(
    running: "subprocess.Popen[bytes]", seconds: float, most_bytes: float = math.inf, idle_bytes: int = 0
) -> bytes | None:
    """The next line that the process writes; None where it ends before. It may take `most_bytes` more than when idle.

    Raises:
        LimitError: the time is over, or it has taken more memory.
    """
    assert running.stdout is not None
    until, found, idle = time.monotonic() + seconds, b"", 0
    while not found.endswith(b"\n"):
        ready, _, _ = select.select([running.stdout], [], [], _LOOK_SECONDS)
        piece = os.read(running.stdout.fileno(), 2**16) if ready else b""
        if ready and not piece:
            return None
        found += piece
        if resident(running) > idle_bytes + most_bytes:
            raise LimitError(f"{most_bytes / 2**30:.3g} GB of memory")
        late = time.monotonic() - until
        if late > 0 and not ready:
            idle = 0 if _computes(running) else idle + 1
            if idle >= _IDLE_LOOKS or late > (_STARVED - 1) * seconds:
                raise LimitError(f"{seconds:.0f} s")
    return found


def end(running: "subprocess.Popen[bytes]") -> int | None:
    """End the process; its exit status where it had ended by itself."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(1 if running.poll() is None else 0)
    code = running.poll()
    running.kill()
    running.wait()
    for pipe in (running.stdin, running.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    return code


def exhausted(code: int | None) -> bool:
    """Whether an exit status says that the CPU time was over."""
    return code == -signal.SIGXCPU


def resident(running: "subprocess.Popen[bytes]") -> int:
    """The bytes of memory that the process has."""
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(running.pid).memory_info().rss)
    return 0


def _computes(running: "subprocess.Popen[bytes]") -> bool:
    """Whether the process has work, be there a core for it or not; one that waits for something has none."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(running.pid).status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
    return False
