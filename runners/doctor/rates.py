"""How fast a device is at what a read is made of: measured, and kept for plans."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from deadbench.runners.planning.seconds import Rates, rates_file, stored
from deadbench.suite.storage import write_whole

_SECONDS = 0.05  # of which a rate is taken


def measured(device: torch.device) -> Rates:
    """The rates of a device, in a fifth of a second."""
    side = 8192 if device.type == "cuda" else 512
    flop = 2.0 * side**3
    found = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        square = torch.ones(side, side, dtype=dtype, device=device)
        found[dtype] = flop / _seconds(partial(torch.matmul, square, square), device)
    block = torch.ones(2**24, dtype=torch.uint8, device=device)
    copied = len(block) / _seconds(lambda: block.to("cpu", copy=True), device)
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    name, memory = (properties.name, float(properties.total_memory)) if properties else ("cpu", 0.0)
    return Rates(name, memory, found[torch.bfloat16], found[torch.float32], found[torch.float64], copied)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of one step, the first left out."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    wait()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < _SECONDS:
        step()
        wait()
        count += 1
    return (time.perf_counter() - started) / count


def keep(rates: list[Rates]) -> Path:
    """Store them, beside those of other devices."""
    file = rates_file()
    known = stored() | {each.device: each for each in rates}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps([asdict(each) for each in known.values()], indent=1).encode())
    return file
