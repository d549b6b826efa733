"""Torch tensor parallel: one rank of a group that shares a model, by torch.distributed and transformers' own plan.

The residual stream is replicated, so the ranks divide the taps among them and rank 0 reads the final norm; every
rank ends with the same rows and rank 0 tells them. Nothing here starts a process: a group is as many actors.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deadbench.runners.engines.base import Blocks, ForwardPass, Swept
from deadbench.runners.engines.deferred_init import DeferredInit, deferred_model
from deadbench.runners.engines.device import free_bytes
from deadbench.runners.engines.exchange import Exchange
from deadbench.runners.engines.resident import PartEngine, TorchEngine
from deadbench.suite.architectures.build import build_config
from deadbench.suite.architectures.parts import divisors, has_plan
from deadbench.suite.inputs.batches import Batch
from deadbench.suite.ranks import Ranks
from deadbench.suite.reads.rows import check_rows

PATIENCE = timedelta(hours=12)  # of a collective: a rank that dies is seen by the driver, and --timeout ends a silence
_PROBE_TOKENS = 32
CANARY_TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}  # of the largest value


def current_ranks() -> Ranks:
    """The group that this process is in: objects go by gloo, states of accumulators by NCCL where it is there."""
    size = dist.get_world_size()
    objects = dist.new_group(backend="gloo", timeout=PATIENCE)

    def gather(mine: Any) -> list[Any]:
        gathered: list[Any] = [None] * size
        dist.all_gather_object(gathered, mine, group=objects)
        return gathered

    nccl = dist.get_backend() == "nccl"
    device, group = (torch.device("cuda"), None) if nccl else (torch.device("cpu"), objects)
    exchange = Exchange(
        dist.get_rank(),
        gather,
        lambda piece, rank: dist.send(piece, rank, group=group),
        lambda piece, rank: dist.recv(piece, rank, group=group),
        device,
    )
    return Ranks(dist.get_rank(), size, gather, exchange.collect)


@dataclass
class ParallelEngine(PartEngine):
    """One rank's part of a model."""

    ranks: Ranks = field(default_factory=current_ranks)
    _raised: Exception | None = None

    def load_random(self, config: Any, seed: int, dtype: torch.dtype, *, published: bool = False) -> nn.Module:
        """The weights that `TorchEngine.load_random` draws, bit for bit, whatever the number of ranks.

        Every rank draws each full weight in turn, keeps its part and drops the rest: no checkpoint, and in memory one
        weight beside the rank's own share.
        """
        self._refuse(config)
        started = time.perf_counter()
        assert not published, "what needs the heads is read by one rank"
        template, drawn = deferred_model(config, seed)
        lock = threading.Lock()  # transformers loads with threads; one whole weight is in memory at a time
        state = {n: _Drawn(drawn, t, lock) if t.is_meta else t for n, t in template.state_dict().items()}
        model: Any = type(template)
        model = model.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **self._placement())
        self._check(model.eval(), config, dtype, lambda: TorchEngine(self.device).load_random(config, seed, dtype))
        self.load_seconds = time.perf_counter() - started
        return model  # type: ignore[no-any-return]

    def load_trained(self, folder: Path, dtype: torch.dtype, model_class: Any = None) -> nn.Module:
        """The checkpoint in `folder`, of which every rank reads its part.

        Raises:
            CheckpointError: weights that transformers cannot load, or that miss tensors of the architecture.
        """
        config = build_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        self._refuse(config)
        started = time.perf_counter()
        with self.ranks.together():
            model: nn.Module = self.from_pretrained(folder, dtype, model_class, **self._placement())
        self._check(model, config, dtype, lambda: TorchEngine(self.device).load_trained(folder, dtype))
        self.load_seconds = time.perf_counter() - started
        return model

    def passes(
        self, model: nn.Module, norm: nn.Module, batches: list[Batch], blocks: Blocks | None = None
    ) -> Iterator[tuple[Batch, ForwardPass] | Swept]:
        """As `TorchEngine.passes`; what a rank raises at a tap, all raise at the end of the forward pass."""
        watched = blocks and Blocks(blocks.modules, self._caught(blocks.on_input))
        for step in super().passes(model, norm, batches, watched):
            with self.ranks.together():
                if self._raised:
                    raise self._raised
            yield step

    def _caught(self, on_input: Callable[[int, Tensor, Batch], None]) -> Callable[[int, Tensor, Batch], None]:
        def call(tap: int, acts: Tensor, batch: Batch) -> None:
            try:
                on_input(tap, acts, batch)
            except Exception as error:  # an early end of this rank's pass would leave the others waiting
                self._raised = self._raised or error

        self._raised = None
        return call

    def _placement(self) -> dict[str, Any]:
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=self.ranks.size)}

    def _refuse(self, config: Any) -> None:
        """Raise ValueError where the model cannot be divided among the ranks."""
        found, size = self._resolved(config), self.ranks.size
        assert found.skeleton is not None
        part = found.skeleton.get_submodule(found.part)
        if not has_plan(part):
            raise ValueError(
                f"transformers has no tensor-parallel plan for {config.model_type!r}; give --tensor-parallel 1"
            )
        for name, count in divisors(part).items():
            if count % size:
                raise ValueError(f"--tensor-parallel {size} does not divide {name} {count} of {config.model_type!r}")

    def _check(self, model: nn.Module, config: Any, dtype: torch.dtype, whole: Callable[[], nn.Module]) -> None:
        """The canary: on a probe batch the sharded model is the unsharded one, where that fits beside it.

        Raises:
            ValueError: it is not, or rows of zeros or values that are not finite come out.
        """
        found = self._resolved(config)
        part = model.get_submodule(found.part)
        inputs = dict(found.form)
        if inputs.keys() == {"input_ids"}:
            highest = config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(min(8, highest - 1), highest, (1, _PROBE_TOKENS), generator=generator)
            inputs = {"input_ids": ids}
        inputs = self._on_device(part, inputs)
        with torch.no_grad():
            sharded = part(**inputs)[0]
        backend = dist.get_backend()
        self.detail = f"tensor parallel over {self.ranks.size} ranks ({backend}), transformers' plan"
        with self.ranks.together():
            check_rows(sharded.reshape(-1, sharded.shape[-1]), "after the final norm (sharding canary)")
            if self.ranks.rank == 0:
                self.detail += self._difference(
                    model, inputs, sharded, str(dtype).removeprefix("torch."), lambda: whole().get_submodule(found.part)
                )

    def _difference(
        self, model: nn.Module, inputs: dict[str, Any], sharded: Tensor, dtype: str, whole: Callable[[], nn.Module]
    ) -> str:
        cuda = self.device.type == "cuda"
        needed = sum(p.numel() * p.element_size() for p in model.parameters()) * 5 // 4
        host = sum(p.numel() for p in model.parameters()) * 4  # it is drawn there, in float32
        free = free_bytes(self.device) if cuda else psutil.virtual_memory().available // 2
        if cuda and host > psutil.virtual_memory().available // 2:
            return f"; not compared with the unsharded model, which takes {host / 1e9:.1f} GB of this node's memory"
        if needed > free:
            return f"; not compared with the unsharded model, which takes {needed / 1e9:.1f} of {free / 1e9:.1f} GB"
        with torch.no_grad():
            expected = whole()(**inputs)[0]
        worst = float((sharded - expected).abs().max() / expected.abs().max())
        if not worst <= CANARY_TOLERANCE[dtype]:
            raise ValueError(
                f"the model sharded over {self.ranks.size} ranks differs from the unsharded one by {worst:.1e} of the "
                f"largest value on a probe batch ({CANARY_TOLERANCE[dtype]:.0e} allowed); give --tensor-parallel 1"
            )
        return f"; differs from the unsharded model by {worst:.1e} of the largest value on {_PROBE_TOKENS} tokens"


@dataclass(frozen=True)
class _Drawn:
    """A random weight as transformers' loader takes a slice of a safetensors file: drawn when it is asked for."""

    values: DeferredInit
    weight: Tensor
    lock: threading.Lock

    def get_shape(self) -> list[int]:
        return list(self.weight.shape)

    def __getitem__(self, index: Any) -> Tensor:
        with self.lock:
            return self.values.value(self.weight)[index].clone()
