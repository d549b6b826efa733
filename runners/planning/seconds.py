"""How long a read would take: counted work over a device's rates. No more than arithmetic; nothing is timed here.

Rates are what `deadbench doctor` measured and kept, else those of a data sheet, and who asks is told which.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deadbench.runners.planning.hardware import Cluster
from deadbench.suite.checkpoints.download_cache import cache_folder

_PRODUCTS = 0.5  # of the rate of large matrix products, which a forward pass and Gram matrices reach
_DECOMPOSED = {"gpu": 0.05, "cpu": 0.4}  # of that in float64, which decompositions reach
_EIGH = 9.0  # FLOP of eigenpairs of a symmetric matrix, in D^3 (Golub, Van Loan, 8.3)
_CHOLESKY, _QR_OF_D, _QR_OF_2D = 1 / 3, 4 / 3, 10 / 3  # the same of factors of a matrix, and of D and 2 D rows
# Of a site, by the dearest route that such reads take where few directions are dead; docs/costs.md has all of them.
_FACTORS = {"random": 3 * _CHOLESKY + _QR_OF_D, "trained": 3 * _CHOLESKY + 2 * _QR_OF_D + 2 * _QR_OF_2D}
_COLUMNS = 70  # of a site that are solved one after another, each as long as D steps of
_STEP_SECONDS = {"gpu": 1e-7, "cpu": 0.0}  # which wait for each other
_DRAWN = 1e8  # random weights a second, which one thread draws; where a model is held whole, several do
_DISK = 1e9  # bytes a second of a checkpoint
_LONGEST_NAME = 200  # of a device, in the file that is kept
_ALIKE = 0.1  # of their memory, by which GPUs of one kind differ: 80 GB are 85e9 bytes


@dataclass(frozen=True)
class Rates:
    """Of one device: its bytes of memory (0: the host), FLOP a second of products, bytes a second to the host."""

    device: str
    memory: float
    bfloat16: float
    float32: float
    float64: float
    copies: float

    def text(self) -> str:
        """In one line."""
        products = f"{self.bfloat16 / 1e12:.2g} TFLOP/s bfloat16, {self.float32 / 1e12:.2g} float32"
        return f"{products}, {self.float64 / 1e12:.2g} float64, {self.copies / 1e9:.2g} GB/s to the host"

    def products(self, dtype: str | None) -> float:
        """FLOP a second of a forward pass in `dtype`."""
        rate = {"float64": self.float64, "float32": self.float32}.get(str(dtype), self.bfloat16)
        return _PRODUCTS * rate

    @property
    def kind(self) -> str:
        """`gpu` or `cpu`."""
        return "gpu" if self.memory else "cpu"

    def decompositions(self) -> float:
        """FLOP a second of decompositions in float64."""
        return _DECOMPOSED[self.kind] * self.float64


# Data sheets' dense rates (TFLOP/s of bfloat16 or float16, float32 without TF32, float64), the slower of a size's GPUs.
_BUILT_IN = tuple(
    Rates(name, gigabytes * 1e9, bfloat16 * 1e12, float32 * 1e12, float64 * 1e12, copies * 1e9)
    for name, gigabytes, bfloat16, float32, float64, copies in (
        ("an H200", 141, 989, 67, 67, 50),
        ("an A100", 80, 312, 19.5, 19.5, 25),
        ("an L40S", 48, 362, 91, 1.4, 25),
        ("an A100", 40, 312, 19.5, 19.5, 25),
        ("an A10", 24, 125, 31, 0.98, 25),
        ("a T4", 16, 65, 8.1, 0.25, 12),
    )
)
_BUILT_IN_CPU = Rates("two CPU cores", 0.0, 1e11, 1e11, 5e10, 5e9)


@dataclass(frozen=True)
class Work:
    """What is counted of one read, `random` or `trained`.

    Tokens of all passes and of one, FLOP of a token, taps, width, random weights, stored bytes, and devices that share
    it.
    """

    read: str
    passed_tokens: float
    num_tokens: float
    flop_per_token: float
    num_taps: int
    hidden_size: int
    drawn: float
    loaded_bytes: float
    dtype: str | None
    devices: int


@dataclass(frozen=True)
class Seconds:
    """Of the three steps that rows have, too: `load_seconds`, `forward_seconds`, `spectrum_seconds`."""

    load: float
    forward: float
    spectra: float

    @property
    def total(self) -> float:
        """One after another."""
        return self.load + self.forward + self.spectra

    @property
    def loaded(self) -> float:
        """Those after loading."""
        return self.forward + self.spectra

    @property
    def most(self) -> str:
        """The step that takes longest."""
        return "load" if self.load > max(self.forward, self.spectra) else self.most_once_loaded

    @property
    def most_once_loaded(self) -> str:
        """That of those after loading."""
        return "forward" if self.forward >= self.spectra else "spectra"


def projected(work: Work, rates: Rates) -> Seconds:
    """The seconds of a read.

    Each token's FLOP once a pass; a Gram matrix 9/8 D^2 a token and tap, and of the final norm; the eigenpairs of each,
    and factors. Devices share both; weights are drawn, or come from a disk, once.
    """
    D, sites = float(work.hidden_size), work.num_taps + 1
    grams = sites * 9 / 8 * D**2 * work.num_tokens / (_PRODUCTS * rates.float64)
    decomposed = sites * (_EIGH + _FACTORS[work.read]) * D**3 / rates.decompositions()
    decomposed += sites * _COLUMNS * D * _STEP_SECONDS[rates.kind]
    forward = work.flop_per_token * work.passed_tokens / rates.products(work.dtype)
    load = work.drawn / _DRAWN + work.loaded_bytes / _DISK + (work.loaded_bytes / rates.copies if rates.memory else 0.0)
    return Seconds(load, forward / work.devices, (grams + decomposed) / work.devices)


def rates_file() -> Path:
    """Where the rates of this user's devices are kept."""
    return cache_folder().parent / "rates.json"


def stored() -> dict[str, Rates]:
    """Those that were kept, by device; none where there are none that can be read."""
    try:
        listed = json.loads(rates_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    found = [_kept(entry) for entry in listed] if isinstance(listed, list) else []
    return {each.device: each for each in found if each is not None}


def _kept(entry: Any) -> Rates | None:
    """The rates in an entry of the file, if it names a device and all are positive numbers."""
    try:
        device, memory, *rates = (entry.pop(field.name) for field in fields(Rates))
        memory, *rates = map(float, (memory, *rates))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None
    named = isinstance(device, str) and device.isprintable() and 0 < len(device) <= _LONGEST_NAME and not entry
    fast = min(rates) > 0 and memory >= 0 and math.isfinite(sum(rates) + memory)
    return Rates(device, memory, *rates) if named and fast else None


def rates_of(cluster: Cluster) -> tuple[Rates, str]:
    """Rates of the devices of a cluster's largest node, and where they are from, in words.

    Kept ones of a GPU with the same memory; of the CPU only where the cluster is not an assumed one.
    """
    node = cluster.largest
    memory = node.gpu_bytes if node.gpus else 0.0
    for each in stored().values():
        if abs(each.memory - memory) <= _ALIKE * memory and not (cluster.assumed and not memory):
            return each, f"rates of {each.device}, which deadbench doctor measured"
    known = _BUILT_IN_CPU if not memory else min(_BUILT_IN, key=lambda each: abs(each.memory - memory))
    return known, f"built-in rates of {known.device}; deadbench doctor measures your own"
