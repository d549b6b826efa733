"""The device of a process: whether it is the one that was assigned, what is free and when it is where, its errors."""

import gc
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

# Words of the libraries' own errors, which reach us as text from other ranks and from vLLM's processes.
_NO_MEMORY = (
    "out of memory", "OutOfMemory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)  # fmt: skip
_LOST = (
    "CUDA error", "CUDA driver error", "HIP error", "NCCL error", "cusolver error", "CUSOLVER_STATUS", "CUBLAS_STATUS",
    "CUDNN_STATUS", "matrix products on",
)  # fmt: skip


class WrongDeviceError(ValueError):
    """torch does not have the GPUs that this process was given; on another node it may."""


def cause_of(error: BaseException) -> Literal["memory", "device", None]:
    """What of the device an error tells of: want of memory; a fault after which the process can use it no more; None.

    Example:
        >>> cause_of(RuntimeError("CUDA error: out of memory"))
        'memory'
        >>> cause_of(RuntimeError("HIP error: invalid device ordinal"))
        'device'
    """
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in text for word in _NO_MEMORY):
        return "memory"
    if isinstance(error, WrongDeviceError) or any(word in text for word in _LOST):
        return "device"
    return None


@dataclass(frozen=True)
class Moment:
    """A moment of what a device does. The CPU's is now; another device comes to it when it does, and nobody waits."""

    _clock: float = 0.0
    _event: Any = None

    @classmethod
    def on(cls, device: torch.device) -> "Moment":
        """The one after all that the device has been told to do."""
        if device.type == "cpu":
            return cls(time.perf_counter())
        event = _event(device)
        event.record()
        return cls(_event=event)

    def has_come(self) -> bool:
        """Whether the device has come to it."""
        return self._event is None or bool(self._event.query())

    def seconds_to(self, later: "Moment") -> float:
        """Seconds between two moments of one device; this waits for the later."""
        if self._event is None:
            return later._clock - self._clock
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1000


def _event(device: torch.device) -> Any:
    return torch.Event(device, enable_timing=True)


def pick_device() -> torch.device:
    """The accelerator that Ray gave this process, else the CPU.

    Raises:
        WrongDeviceError: Ray gave it GPUs and torch has others, or none.
    """
    check_assigned(assigned_gpus())
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assigned_gpus() -> int | None:
    """How many GPUs Ray gave this process; None where it is none of Ray's workers."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return None
    return len(ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))


def usable_gpus() -> int:
    """How many GPUs this process can compute on; torch's own count is NVML's, which an old driver answers too."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_assigned(assigned: int | None) -> None:
    """Raise WrongDeviceError where Ray gave this process GPUs, and torch has others than those."""
    found = usable_gpus()
    if not assigned or found == assigned:
        return
    built = torch.version.cuda or torch.version.hip
    if not built:
        why = f"torch {torch.__version__} is a CPU build; install torch for this node's GPUs"
    elif found > assigned:
        why = "CUDA_VISIBLE_DEVICES is not set for it; unset RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES on the nodes"
    else:
        why = f"the driver is too old for torch's CUDA {built}, or not there; update it, or install an older torch"
    raise WrongDeviceError(f"Ray gave this process {assigned} GPUs and torch has {found}: {why}")


def settle(share: float = 1.0) -> None:
    """Full float32 in products and convolutions, which floors assume; of a shared GPU no more than `share`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


def rounds_to_tf32() -> bool:
    """Whether products or convolutions of float32 on a GPU round to 11 bits."""
    return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


def free_bytes(device: torch.device) -> int:
    """What this process can still take where the model lives; torch's own cache is free, whatever the driver says."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + cached)


def give_back() -> None:
    """The memory of a model that was read: transformers' hooks close over the module, so it is a cycle."""
    gc.collect()
    cuda: Any = torch.cuda
    if cuda.is_available() and cuda.is_initialized():
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()
