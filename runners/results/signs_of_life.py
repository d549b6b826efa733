"""Who gives a sign of life, and whether it is known to be gone: processes of this machine, by number and birth."""

import json
import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

import psutil


@cache
def _machine() -> str:
    """This boot of this machine, and in which container: where a process's number means the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _born(pid: int) -> float | None:
    """When a process of this machine began, by a clock that nobody sets; None where there is none of that number."""
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        return None if state == "Z" else float(fields[18])
    except (OSError, ValueError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def own_facts() -> dict[str, Any]:
    """Of this process: host, machine, number, birth."""
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "born": _born(os.getpid())}


def facts_of(beat: bytes | None) -> dict[str, Any]:
    """What a sign of life says; nothing where it is none."""
    try:
        facts = json.loads(beat or b"{}")
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def has_died(facts: dict[str, Any]) -> bool:
    """Whether a process of this machine is known to be gone; of another machine's it is never known."""
    pid = facts.get("pid")
    return facts.get("machine") == _machine() and isinstance(pid, int) and _born(pid) != facts.get("born")
