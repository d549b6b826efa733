"""Block streaming: a model that does not fit, run one block at a time over all the tokens.

Every batch has its own forward pass of the model's own code, as a greenlet. At a block's call it stops and hands the
call over; once all batches stand before that block its weights are loaded, every call is made, the weights are
dropped, and the passes go on to the next block. Nothing is known of any architecture, and every batch sees the same
operations in the same order as in a resident model. In memory: one block, what is outside the blocks, and the
stream of every batch, which goes to disk past a budget.
"""

import contextlib
import json
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pyarrow as pa
import torch
from torch import Tensor, nn

from deadbench.runners.engines.base import Blocks, ForwardPass, Swept
from deadbench.runners.engines.block_weights import Block, Coming, Values, put
from deadbench.runners.engines.deferred_init import deferred_model
from deadbench.runners.engines.resident import PartEngine
from deadbench.runners.engines.stepped_pass import BlockCall, Parked, SteppedPass, handed_over, same_block
from deadbench.runners.engines.sweep_clock import Clock
from deadbench.runners.engines.sweep_state import Packed
from deadbench.suite.architectures.build import build_config
from deadbench.suite.architectures.parts import streamed_paths
from deadbench.suite.inputs.batches import Batch
from deadbench.suite.scratch import Scratch

_PARKED_SHARE = 4  # of the memory that is free, waiting streams take one part in so many before they go to disk


@dataclass(eq=False)
class StreamingEngine(PartEngine):
    """One model on one device, of which one block is there at a time.

    Attributes:
        parked_bytes: how much of the batches' streams may wait in memory; None: a part of what is free.
    """

    tap_by_tap: ClassVar[bool] = True

    parked_bytes: float | None = None
    _blocks: dict[nn.Module, Block] = field(default_factory=dict)
    _coming: Coming | None = None
    _reads_ahead: bool = False
    _begun: Iterable[pa.RecordBatch] | None = None

    def load_random(self, config: Any, seed: int, dtype: torch.dtype, *, published: bool = False) -> nn.Module:
        """The weights that `TorchEngine.load_random` draws, bit for bit; those of blocks when they are wanted."""
        started = time.perf_counter()
        self._resolved(config)
        model, drawn = deferred_model(config, seed)
        deferred = {name: tensor for name, tensor in _tensors(model) if tensor.is_meta}
        self._place(model, lambda name: drawn.value(deferred[name]), dtype)
        self.load_seconds = time.perf_counter() - started
        self._reads_ahead = self.device.type == "cuda"
        self.detail = "blocks streamed; random weights drawn block by block, equal to those of the resident model"
        return model

    def load_trained(self, folder: Path, dtype: torch.dtype, model_class: Any = None) -> nn.Module:
        """The checkpoint in `folder`; blocks stay there, only tensors that must be converted are written anew.

        Raises:
            CheckpointError: weights that transformers cannot load, or that miss tensors of the architecture.
        """
        from accelerate.hooks import remove_hook_from_submodules

        started = time.perf_counter()
        config = build_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        empty = self._resolved(config).skeleton
        assert empty is not None
        paths = streamed_paths(empty)
        inside = tuple(f"{path}." for path in paths)
        device_map = {name: "cpu" for name, _ in _tensors(empty) if not name.startswith(inside)}
        converted = Scratch()
        weakref.finalize(self, converted.close)
        with warnings.catch_warnings():  # accelerate would have modules, and a root's own parameters are in none
            warnings.filterwarnings("ignore", message="The following device_map keys")
            model: nn.Module = self.from_pretrained(
                folder,
                dtype,
                model_class,
                device_map=device_map | dict.fromkeys(paths, "disk"),
                offload_folder=str(converted.path),
            )
        stored = _offloaded(model)
        remove_hook_from_submodules(model)
        self._place(model, lambda name: stored[name], None)
        self.load_seconds = time.perf_counter() - started
        self._reads_ahead = True
        self.detail = "blocks streamed from the checkpoint"
        return model

    def passes(
        self, model: nn.Module, norm: nn.Module, batches: list[Batch], blocks: Blocks | None = None
    ) -> Iterator[tuple[Batch, ForwardPass] | Swept]:
        """As `TorchEngine.passes`, in one sweep over the blocks; `Swept` after each batch, once it has come out.

        The seconds of the sweep are told by `Swept`; `blocks.on_input` is called block by block.

        Raises:
            StateError: the model does not come to the place that it was to go on from.
        """
        taps = dict.fromkeys(blocks.modules if blocks else ())
        num_blocks = sum(module in self._blocks for module in model.modules())
        captured: dict[str, Tensor] = {}

        def capture(module: nn.Module, args: Any, output: Any) -> None:
            captured["input"] = args[0].detach()
            captured["output"] = (output[0] if isinstance(output, tuple) else output).detach()

        clock = Clock(self.device)
        runs = [SteppedPass(batch, model, self._on_device(model, batch.model_inputs)) for batch in batches]
        with contextlib.ExitStack() as stack:
            parked = stack.enter_context(Parked(self._parked_budget()))
            stack.callback(norm.register_forward_hook(capture).remove)
            stack.enter_context(handed_over(self._blocks))
            self._coming = stack.enter_context(Coming(self._blocks, model, ahead=self._reads_ahead))
            for run in runs:
                stack.callback(run.kill)
            for run in runs:  # all of them, whatever is done: what a model draws, it draws batch by batch
                with torch.no_grad(), clock.model():
                    run.go_on(None)
                if run.finished:  # a model without blocks
                    yield run.batch, clock.forward_pass(captured, 0)
                else:
                    parked.put(run)
            self._bring_back(runs, parked)
            while standing := [run for run in runs if not run.finished]:
                done = min(len(run.called) for run in standing)
                behind = [run for run in standing if len(run.called) == done]
                module = same_block(behind)
                tapped, tap = module in taps, sum(each in taps for each in behind[0].called)
                with self._loaded(module, clock):
                    for left, run in zip(range(len(behind) - 1, -1, -1), behind, strict=True):
                        parked.take(run)
                        if tapped and blocks is not None:
                            with clock.taps():
                                blocks.on_input(tap, run.standing().stream().detach(), run.batch)
                        with torch.no_grad(), clock.model():
                            run.go_on(self._called(run.standing()))
                        if run.finished:
                            yield run.batch, clock.forward_pass(captured, tap + tapped)
                        else:
                            parked.put(run)
                        yield Swept(
                            done + (not left),
                            max(done + 1, num_blocks),  # one block may be called many times
                            len(runs) - left if left else 0,
                            len(runs),
                            *clock.so_far(wait=not left),
                            lambda: _states(runs, parked),
                        )

    def go_on_from(self, sweep: Iterable[pa.RecordBatch]) -> None:
        """Have the next passes, over the same batches, begin where a sweep has told that it stood."""
        self._begun = sweep

    def _bring_back(self, runs: list[SteppedPass], parked: Parked) -> None:
        """Where a sweep goes on, each of `runs` to the place it had; those that are not told of had come out."""
        sweep, self._begun = self._begun, None
        if sweep is None:
            return
        left = {*range(len(runs))}
        for state in sweep:
            packed = Packed(state, self.device)
            left -= {packed.run}
            parked.take(runs[packed.run])
            with torch.no_grad():
                runs[packed.run].come_to(packed)
            parked.put(runs[packed.run])
        for number in left:
            parked.take(runs[number])
            runs[number].kill()

    def _called(self, call: BlockCall) -> Any:
        """What the block's own forward returns."""
        return self._blocks[call.module].forward(*call.args, **call.kwargs)

    def _parked_budget(self) -> float:
        if self.parked_bytes is not None:
            return self.parked_bytes
        cuda = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if cuda else psutil.virtual_memory().available
        return float(free) / _PARKED_SHARE

    def _place(self, model: nn.Module, values: Values, dtype: torch.dtype | None) -> None:
        """Bring everything outside the blocks to the device, and note what each block lacks."""

        def ready(tensor: Tensor) -> Tensor:
            return tensor.detach().to(self.device, dtype if tensor.is_floating_point() else None)

        blocks = {path: Block(model.get_submodule(path), values, ready) for path in streamed_paths(model)}
        final_norm = self.resolved.final_in_whole.path if self.resolved else None
        placed: dict[int, Tensor] = {}
        for name, tensor in list(_tensors(model)):
            owner_path, _, attribute = name.rpartition(".")
            owner = model.get_submodule(owner_path)
            block = next((blocks[path] for path in blocks if name.startswith(f"{path}.")), None)
            if block is not None and tensor.is_meta and owner_path != final_norm:
                block.absent.append((owner, attribute, name))
                continue
            if id(tensor) not in placed:
                placed[id(tensor)] = ready(values(name) if tensor.is_meta else tensor)
            put(owner, attribute, placed[id(tensor)])
        self._blocks = {block.module: block for block in blocks.values()}

    @contextlib.contextmanager
    def _loaded(self, module: nn.Module, clock: Clock) -> Iterator[None]:
        assert self._coming is not None
        try:
            with clock.model():
                self._coming.load(module)
            yield
        finally:
            self._blocks[module].drop()


def _states(runs: list[SteppedPass], parked: Parked) -> Iterator[pa.RecordBatch]:
    """Of those that have not come out, one after another: what waits on disk is in memory meanwhile."""
    for number, run in enumerate(runs):
        if not run.finished:
            parked.take(run)
            yield run.state(number)
            parked.put(run)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, shared ones by each."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _offloaded(model: nn.Module) -> Any:
    """accelerate's loader of the tensors that stay on disk, by full name."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            weights = getattr(each, "weights_map", None)
            if weights is not None:
                return getattr(weights, "dataset", weights)
    return {}
