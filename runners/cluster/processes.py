"""The processes of one model on their node: marked, ended for certain, and asked what they died of."""

import contextlib
import faulthandler
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "DEADBENCH_GROUP"  # in the environment of whatever an actor starts, wherever that has got to
_LOG_BYTES = 64_000  # of the end of a log
_RAYS = re.compile(r"\[[^\]]* [A-Z] \d+ \d+\]|\*\*\* |PC: @|\s*@ +0x|:(actor|task|job)_(name|id|repr):")
_NEW = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW
_POLITE_SECONDS, _PATIENT_SECONDS = 3.0, 30.0
_YOUNG_SECONDS = 5.0  # of a process, in which its environment may not be there yet
_KERNEL = 2  # what the kernel's own threads are children of, which have none


@dataclass(frozen=True)
class Ended:
    """What is left of a model on a node, and what its process left in writing.

    `signal` in faulthandler's words; `last_line`: the last that the process wrote to its stderr.
    """

    survivors: tuple[str, ...] = ()
    signal: str | None = None
    out_of_memory: bool = False
    last_line: str | None = None


def together(parts: Iterable[Ended]) -> Ended:
    """What is known of several, as one."""
    every = list(parts)
    return Ended(
        tuple(survivor for each in every for survivor in each.survivors),
        next((each.signal for each in every if each.signal), None),
        any(each.out_of_memory for each in every),
        next((each.last_line for each in every if each.last_line), None),
    )


def mark_process(token: str) -> None:
    """Mark this process, and let it write down a fatal signal: who finds it dead reads that."""
    os.environ[MARK] = token
    box = os.fdopen(os.open(_black_box(token, os.getpid()), _NEW, 0o600), "w", encoding="utf-8")
    box.write(f"oom kills before: {_oom_kills()}\nstderr: {_log_of_stderr()}\n")
    box.flush()
    faulthandler.enable(file=box, all_threads=False)  # keeps the file open as long as the process lives


def end_processes(token: str, actors: Sequence[tuple[int, float]] = ()) -> Ended:
    """End what carries `token` in its environment, and `actors`, each (process id, when it began); says what outlived.

    What was written down under `token` is read of every process, known or not: one that died at once never said its id.
    """
    boxes, told = _black_boxes(token), list[Ended]()
    for box in boxes:
        with contextlib.suppress(OSError):
            told.append(Ended((), *_read_box(box.read_text(encoding="utf-8", errors="replace"))))
    survivors = _end(token, actors)
    for box in boxes:
        box.unlink(missing_ok=True)
    return together([Ended(tuple(survivors)), *told])


def _end(token: str, actors: Sequence[tuple[int, float]]) -> list[str]:
    deadline = time.monotonic() + _PATIENT_SECONDS
    polite = time.monotonic() + _POLITE_SECONDS
    asked = {pid for pid, _ in actors}  # by who calls
    while True:
        left, now = _marked(token) + [p for actor in actors for p in _same_process(*actor)], time.monotonic()
        if not left and (now > polite or not _any_begins()):
            return []
        if now > deadline:
            return [f"process {p.pid}" for p in left]
        for process in left:
            try:
                if now > polite:
                    process.kill()
                elif process.pid not in asked:
                    process.terminate()
                    asked.add(process.pid)
            except psutil.Error:
                continue
        time.sleep(0.05)


def _any_begins() -> bool:
    """Whether a process has just begun whose environment is not there yet: it may be marked in a moment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            young = time.time() - process.create_time() < _YOUNG_SECONDS
            ours = process.ppid() != _KERNEL and process.status() != psutil.STATUS_ZOMBIE
            if young and ours and not process.environ():
                return True
    return False


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


def _black_boxes(token: str) -> list[Path]:
    """Those of `token` that this user's processes have left; another's, or what is no plain file, is not for us."""
    found = []
    for path in sorted(Path(tempfile.gettempdir()).glob(f"deadbench-{token}-*")):
        with contextlib.suppress(OSError):
            if stat.S_ISREG((status := path.lstat()).st_mode) and status.st_uid == os.getuid():
                found.append(path)
    return found


def _read_box(text: str) -> tuple[str | None, bool, str | None]:
    """(the fatal signal, whether the kernel's out-of-memory killer has been at work since, the last line of stderr)."""
    fatal = re.search(r"^Fatal Python error: (.+)$", text, re.MULTILINE)
    before = re.match(r"oom kills before: (\d+)", text)
    now = _oom_kills()
    killed = bool(before and now is not None and now > int(before[1]))
    log = re.search(r"^stderr: (/.+?) from (\d+)$", text, re.MULTILINE)
    return fatal[1].lower() if fatal else None, killed, _last_line(Path(log[1]), int(log[2])) if log else None


def _log_of_stderr() -> str:
    """`FILE from BYTE`: where this process's stderr goes to, and how much is there already; "" where it is no file."""
    try:
        path, size = Path(f"/proc/{os.getpid()}/fd/2").readlink(), os.fstat(2).st_size
        return f"{path} from {size}" if path.is_file() else ""
    except OSError:
        return ""


def _last_line(log: Path, start: int) -> str | None:
    """The last line in `log` from the byte `start` on that is not Ray's own; None where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - _LOG_BYTES))
            lines = file.read(_LOG_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    own = [line.strip() for line in lines if line.strip() and not _RAYS.match(line)]
    return own[-1] if own else None


def _oom_kills() -> int | None:
    """How often the kernel's out-of-memory killer has struck: in this container, else on this machine."""
    for file in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        try:
            counters = dict(line.split() for line in Path(file).read_text(encoding="ascii").splitlines())
            return int(counters["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return None
