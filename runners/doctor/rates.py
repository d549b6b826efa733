"""How fast a device is at what a read is made of: measured, kept, and what follows for a model of some size."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from deadbench.suite.checkpoints.download_cache import cache_folder
from deadbench.suite.storage import write_whole

_SECONDS = 0.05  # of which a rate is taken


@dataclass(frozen=True)
class Rates:
    """Of one device: FLOP a second in matrix products, and bytes a second from it to the host."""

    device: str
    bfloat16: float
    float64: float
    copies: float

    def text(self) -> str:
        """In one line."""
        products = f"{self.bfloat16 / 1e12:.2g} TFLOP/s bfloat16, {self.float64 / 1e12:.2g} float64"
        return f"{products}, {self.copies / 1e9:.2g} GB/s to the host"


def measured(device: torch.device) -> Rates:
    """The rates of a device, in a fifth of a second."""
    side = 8192 if device.type == "cuda" else 512
    flop = 2.0 * side**3
    found = {}
    for dtype in (torch.bfloat16, torch.float64):
        square = torch.ones(side, side, dtype=dtype, device=device)
        found[dtype] = flop / _seconds(partial(torch.matmul, square, square), device)
    block = torch.ones(2**24, dtype=torch.uint8, device=device)
    copied = len(block) / _seconds(lambda: block.to("cpu", copy=True), device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Rates(name, found[torch.bfloat16], found[torch.float64], copied)


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


def rates_file() -> Path:
    """Where the rates of this user's devices are kept."""
    return cache_folder().parent / "rates.json"


def keep(rates: list[Rates]) -> Path:
    """Store them, beside those of other devices."""
    file = rates_file()
    known = stored() | {each.device: each for each in rates}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps([asdict(each) for each in known.values()], indent=1).encode())
    return file


def stored() -> dict[str, Rates]:
    """Those that were kept, by device; none where there are none that can be read."""
    try:
        listed = json.loads(rates_file().read_text(encoding="utf-8"))
        return {each["device"]: Rates(**each) for each in listed}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def projected(rates: Rates, parameters: float, hidden_size: int, num_blocks: int) -> tuple[float, float]:
    """(seconds of the forward pass, of the spectra) of a read of 8 D tokens with every tap, by arithmetic.

    2 FLOP a parameter and token; a Gram matrix 9/8 D^2 a token and tap; three decompositions of 9 D^3 a tap, at a tenth
    of the rate of products.
    """
    tokens, D = 8.0 * hidden_size, float(hidden_size)
    forward = 2 * parameters * tokens / (0.5 * rates.bfloat16)
    grams = (num_blocks + 1) * 9 / 8 * D**2 * tokens / (0.5 * rates.float64)
    decomposed = (num_blocks + 1) * 27 * D**3 / (0.1 * rates.float64)
    return forward, grams + decomposed
