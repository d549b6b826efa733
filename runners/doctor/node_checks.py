"""What a node must be: one function a check over its `Facts`, and the table of them."""

import sys
from collections.abc import Callable
from ipaddress import ip_address

from deadbench.runners.cluster.node_versions import differences
from deadbench.runners.doctor.facts import Facts

_LEAST_MEMORY, _LEAST_SHARED, _LEAST_DISK = 4e9, 64e6, 2e9
_LEAST_FILES = 1024
_FREE_GPU = 0.9  # of its memory, where nothing of ours runs: less is another's, or a process that was left over
_VLLM = "0.32."


class UnwellError(ValueError):
    """What is wrong, and what to do, in one line."""


class NotHereError(ValueError):
    """Why a check says nothing on this machine."""


def versions(found: Facts, here: dict[str, str | None]) -> str:
    """Python, Ray, deadbench, torch and transformers are those of the driver."""
    refused, doubtful = differences(found.node, here, found.versions)
    if refused or doubtful:
        raise UnwellError("; ".join([*refused, *doubtful]) + "; install the same on every node")
    return ", ".join(f"{name} {version}" for name, version in found.versions.items())


def gpus(found: Facts, here: dict[str, str | None]) -> str:
    """torch has the GPUs that the process was given."""
    have = len(found.gpus)
    if have == found.given:
        sizes = ", ".join(f"{gpu.name} of {gpu.total / 1e9:.0f} GB" for gpu in found.gpus)
        return sizes or f"none; torch {found.torch} computes on the CPU"
    built = f"torch {found.torch}, " + (f"built for {found.built}" if found.built else "a CPU build")
    if not found.built:
        todo = "install torch for this node's GPUs"
    elif have < found.given:
        todo = (
            f"driver {found.driver or 'not found'} is too old for that, or sees less: update it, or take an older torch"
        )
    else:
        todo = "unset RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
    raise UnwellError(f"{found.given} GPUs were given and torch has {have} ({built}); {todo}")


def gpu_memory(found: Facts, here: dict[str, str | None]) -> str:
    """Nothing else is on the GPUs."""
    if not found.gpus:
        raise NotHereError("no GPU")
    taken = [gpu for gpu in found.gpus if gpu.free < _FREE_GPU * gpu.total]
    if taken:
        free, total = taken[0].free / 1e9, taken[0].total / 1e9
        raise UnwellError(f"{len(taken)} GPUs are in use ({free:.0f} of {total:.0f} GB free); end what is left on them")
    return f"{min(gpu.free for gpu in found.gpus) / 1e9:.0f} GB free on each"


def threads(found: Facts, here: dict[str, str | None]) -> str:
    """A process has its part of the node's CPUs as threads."""
    part = max(1, (found.cpus - 1) // max(1, found.num_gpus))
    if 2 * found.threads < part:
        raise UnwellError(
            f"{found.threads} of {found.cpus} CPUs compute ({part} would be this process's part); unset "
            "OMP_NUM_THREADS, or start Ray with this node's CPUs"
        )
    return f"{found.threads} of {found.cpus} CPUs"


def memory(found: Facts, here: dict[str, str | None]) -> str:
    """Host memory to load into."""
    return _enough(found.memory, _LEAST_MEMORY, "of host memory are free", "end other processes, or take a larger node")


def shared_memory(found: Facts, here: dict[str, str | None]) -> str:
    """/dev/shm, through which Ray and ranks exchange."""
    if found.shared is None:
        raise UnwellError("/dev/shm is not there; mount it (docker run --shm-size=2g)")
    return _enough(found.shared, _LEAST_SHARED, "are free in /dev/shm", "enlarge it (docker run --shm-size=2g)")


def disk(found: Facts, here: dict[str, str | None]) -> str:
    """Room for what is spilled and unpacked."""
    return _enough(found.disk, _LEAST_DISK, "are free in the temporary folder", "make room, or set TMPDIR")


def cache(found: Facts, here: dict[str, str | None]) -> str:
    """Room for checkpoints from the web, and for measured rates."""
    todo = "set DEADBENCH_CACHE to a folder on another disk"
    if found.cache is None:
        raise UnwellError(f"nothing can be written where checkpoints are kept; {todo}")
    return _enough(found.cache, _LEAST_DISK, "are free where checkpoints are kept", f"make room, or {todo}")


def open_files(found: Facts, here: dict[str, str | None]) -> str:
    """As many as Ray's connections and vLLM's processes take."""
    if found.files < _LEAST_FILES:
        raise UnwellError(
            f"a process may have {found.files} files open, and {_LEAST_FILES} are the least; ulimit -n 65536 (docker "
            "run --ulimit nofile=65536)"
        )
    return "any number" if found.files == sys.maxsize else f"{found.files} at most"


def network(found: Facts, here: dict[str, str | None]) -> str:
    """Ranks would meet where Ray does, and other nodes can come there."""
    if found.address is None:
        raise NotHereError("no Ray was joined")
    if found.num_nodes > 1 and ip_address(found.address).is_loopback:
        raise UnwellError(
            f"Ray's address of this node is {found.address}, which no other node reaches: its hostname resolves to it; "
            "mend /etc/hosts, or ray start --node-ip-address"
        )
    if found.gloo_address != found.address:
        raise UnwellError(
            f"ranks would listen at {found.gloo_address} and Ray's address is {found.address}; set "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface of the latter"
        )
    return found.address


def vllm(found: Facts, here: dict[str, str | None]) -> str:
    """vLLM is the one that hooks were written for, and whole."""
    if found.vllm is None:
        raise NotHereError("vLLM is not installed")
    if found.vllm_lacks is not None:
        raise UnwellError(f"vLLM {found.vllm} lacks {found.vllm_lacks}; install it anew")
    if not found.vllm.startswith(_VLLM):
        raise UnwellError(f"vLLM {found.vllm} is not {_VLLM}x; pip install 'deadbench[vllm]'")
    return f"vLLM {found.vllm}; not started here"


def _enough(found: float, least: float, what: str, todo: str) -> str:
    size = f"{found / 1e9:.1f} GB {what}"
    if found < least:
        raise UnwellError(f"{size}, and {least / 1e9:.1f} are the least; {todo}")
    return size


# By the name of its line.
NODE_CHECKS: dict[str, Callable[[Facts, dict[str, str | None]], str]] = {
    "versions": versions,
    "gpus": gpus,
    "gpu memory": gpu_memory,
    "threads": threads,
    "memory": memory,
    "shared memory": shared_memory,
    "disk": disk,
    "cache": cache,
    "open files": open_files,
    "network": network,
    "vllm": vllm,
}
