"""The processes of one model on their node: marked, ended for certain, and asked what they died of."""

import faulthandler
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "DEADBENCH_GROUP"  # in the environment of whatever an actor starts, wherever that has got to
_POLITE_SECONDS, _PATIENT_SECONDS = 3.0, 30.0


@dataclass(frozen=True)
class Ended:
    """What is left of a model on a node, and what its process left in writing; `signal` in faulthandler's words."""

    survivors: tuple[str, ...] = ()
    signal: str | None = None
    out_of_memory: bool = False


def mark_process(token: str) -> None:
    """Mark this process, and let it write down a fatal signal: who finds it dead reads that."""
    os.environ[MARK] = token
    box = _black_box(token, os.getpid()).open("w", encoding="utf-8")
    box.write(f"oom kills before: {_oom_kills()}\n")
    box.flush()
    faulthandler.enable(file=box, all_threads=False)  # keeps the file open as long as the process lives


def end_processes(token: str, pid: int, born: float) -> Ended:
    """End what carries `token` in its environment, and the actor `pid` itself; says what outlived that."""
    box = _black_box(token, pid)
    try:
        signal, out_of_memory = _read_box(box.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        signal, out_of_memory = None, False
    survivors = _end(token, pid, born)
    box.unlink(missing_ok=True)
    return Ended(tuple(survivors), signal, out_of_memory)


def _end(token: str, pid: int, born: float) -> list[str]:
    deadline = time.monotonic() + _PATIENT_SECONDS
    polite = time.monotonic() + _POLITE_SECONDS
    asked: set[int] = set()
    while left := _marked(token) + _same_process(pid, born):
        now = time.monotonic()
        if now > deadline:
            return [f"process {p.pid}" for p in left]
        for process in left:
            try:
                if now > polite:
                    process.kill()
                elif process.pid not in asked and process.pid != pid:
                    process.terminate()
                    asked.add(process.pid)
            except psutil.Error:
                continue
        time.sleep(0.05)
    return []


def _marked(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _same_process(pid: int, born: float) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        alive = process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return []
    return [process] if alive else []


def _black_box(token: str, pid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"deadbench-{token}-{pid}"


def _read_box(text: str) -> tuple[str | None, bool]:
    """(the fatal signal, whether the kernel's out-of-memory killer has been at work since the process began)."""
    fatal = re.search(r"^Fatal Python error: (.+)$", text, re.MULTILINE)
    before = re.match(r"oom kills before: (\d+)", text)
    now = _oom_kills()
    return fatal[1].lower() if fatal else None, bool(before and now is not None and now > int(before[1]))


def _oom_kills() -> int | None:
    """How often the kernel's out-of-memory killer has struck: in this container, else on this machine."""
    for file in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        try:
            counters = dict(line.split() for line in Path(file).read_text(encoding="ascii").splitlines())
            return int(counters["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return None
