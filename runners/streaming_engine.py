"""Block streaming: a model that does not fit, run one block at a time over all the tokens.

Every batch has its own forward pass of the model's own code, as a greenlet. At a block's call it stops and hands the
call over; once all batches stand before that block its weights are loaded, every call is made, the weights are
dropped, and the passes go on to the next block. Nothing is known of any architecture, and every batch sees the same
operations in the same order as in a resident model. In memory: one block, what is outside the blocks, and the
stream of every batch, which goes to disk past a budget.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from greenlet import greenlet
from torch import Tensor, nn

from runners.deferred_init import deferred_model
from runners.torch_engine import Blocks, ForwardPass, TorchEngine
from suite.architecture import build_config, build_model, locate_final_norm
from suite.inputs import Batch

_PARKED_SHARE = 4  # of the memory that is free, waiting streams take one part in so many before they go to disk

Values = Callable[[str], Tensor]


@dataclass(frozen=True)
class Swept:
    """Every batch has entered block call number `call` of `num_calls` and left it: its tap is complete."""

    call: int
    num_blocks: int


@dataclass
class StreamingEngine(TorchEngine):
    """One model on one device, of which one block is there at a time.

    Attributes:
        parked_bytes: how much of the batches' streams may wait in memory; None: a part of what is free.
    """

    parked_bytes: float | None = None
    _blocks: dict[nn.Module, "_Block"] = field(default_factory=dict)
    _folder: Any = None

    def load_random(self, config: Any, seed: int, dtype: torch.dtype) -> nn.Module:
        """The weights that `TorchEngine.load_random` draws, bit for bit; those of blocks when they are wanted."""
        started = time.perf_counter()
        final_norm = locate_final_norm(config).path
        model, drawn = deferred_model(config, seed)
        deferred = {name: tensor for name, tensor in _tensors(model) if tensor.is_meta}
        self._place(model, final_norm, lambda name: drawn.value(deferred[name]), dtype)
        self.load_seconds = time.perf_counter() - started
        self.detail = "blocks streamed; random weights drawn block by block, equal to those of the resident model"
        return model

    def load_trained(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """The checkpoint in `folder`; blocks stay there, only tensors that must be converted are written anew.

        Raises:
            CheckpointError: weights that transformers cannot load, or that miss tensors of the architecture.
        """
        from accelerate.hooks import remove_hook_from_submodules

        started = time.perf_counter()
        config = build_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        final_norm = locate_final_norm(config).path
        empty = build_model(config, "meta")
        paths = _streamed_paths(empty)
        inside = tuple(f"{path}." for path in paths)
        device_map = {name: "cpu" for name, _ in _tensors(empty) if not name.startswith(inside)}
        self._folder = tempfile.TemporaryDirectory(prefix="deadbench-")
        model = self.from_pretrained(
            folder, dtype, device_map=device_map | dict.fromkeys(paths, "disk"), offload_folder=self._folder.name
        )
        stored = _offloaded(model)
        remove_hook_from_submodules(model)
        self._place(model, final_norm, lambda name: stored[name], None)
        self.load_seconds = time.perf_counter() - started
        self.detail = "blocks streamed from the checkpoint"
        return model

    def passes(
        self, model: nn.Module, norm: nn.Module, batches: list[Batch], blocks: Blocks | None = None
    ) -> Iterator[Any]:
        """As `TorchEngine.passes`, in one sweep over the blocks; `Swept` after each, before its batches come out.

        The seconds of the first batch are those of the sweep; `blocks.on_input` is called block by block.
        """
        taps = {module: None for module in (blocks.modules if blocks else ())}
        captured: dict[str, Tensor] = {}

        def capture(module: nn.Module, args: Any, output: Any) -> None:
            captured["input"] = args[0].detach()
            captured["output"] = (output[0] if isinstance(output, tuple) else output).detach()

        clock = _Clock()
        runs = [_Run(batch, model, self._on_device(model, batch.model_inputs)) for batch in batches]
        with contextlib.ExitStack() as stack:
            parked = stack.enter_context(_Parked(self._parked_budget()))
            stack.callback(norm.register_forward_hook(capture).remove)
            stack.enter_context(_handed_over(self._blocks))
            stack.callback(lambda: [run.kill() for run in runs])
            calls = 0
            for run in runs:
                with torch.no_grad(), clock.model():
                    run.go_on(None)
                if run.finished:  # a model without blocks
                    yield run.batch, clock.forward_pass(captured, 0)
                else:
                    parked.put(run)
            while not all(run.finished for run in runs):
                module = _same_block(runs)
                tapped = module in taps
                with self._loaded(module, clock):
                    for run in runs:
                        parked.take(run)
                        call = run.call
                        assert call is not None
                        if tapped and blocks is not None:
                            with clock.taps():
                                blocks.on_input(calls, call.stream().detach(), run.batch)
                        with torch.no_grad(), clock.model():
                            run.go_on(self._blocks[module].forward(*call.args, **call.kwargs))
                            if self.device.type == "cuda":
                                torch.cuda.synchronize(self.device)
                        if run.finished:
                            yield run.batch, clock.forward_pass(captured, calls + tapped)
                        else:
                            parked.put(run)
                calls += tapped
                if tapped:
                    yield Swept(calls, len(taps))

    def release(self) -> None:
        """Give cached accelerator memory back, and the folder of converted tensors."""
        super().release()
        if self._folder is not None:
            self._folder.cleanup()

    def _parked_budget(self) -> float:
        if self.parked_bytes is not None:
            return self.parked_bytes
        cuda = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if cuda else psutil.virtual_memory().available
        return float(free) / _PARKED_SHARE

    def _place(self, model: nn.Module, final_norm: str | None, values: Values, dtype: torch.dtype | None) -> None:
        """Bring everything outside the blocks to the device, and note what each block lacks."""

        def ready(tensor: Tensor) -> Tensor:
            return tensor.detach().to(self.device, dtype if tensor.is_floating_point() else None)

        blocks = {path: _Block(model.get_submodule(path), values, ready) for path in _streamed_paths(model)}
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
            _put(owner, attribute, placed[id(tensor)])
        self._blocks = {block.module: block for block in blocks.values()}

    @contextlib.contextmanager
    def _loaded(self, module: nn.Module, clock: "_Clock") -> Iterator[None]:
        with clock.model():
            self._blocks[module].load()
        try:
            yield
        finally:
            self._blocks[module].drop()


class _Block:
    """A block of which the large tensors come and go."""

    def __init__(self, module: nn.Module, values: Values, ready: Callable[[Tensor], Tensor]):
        self.module, self.forward = module, module.forward
        self.absent: list[tuple[nn.Module, str, str]] = []
        self._values, self._ready = values, ready
        self._placeholders: list[Tensor] = []

    def load(self) -> None:
        self._placeholders = [getattr(owner, attribute) for owner, attribute, _ in self.absent]
        for owner, attribute, name in self.absent:
            _put(owner, attribute, self._ready(self._values(name)))

    def drop(self) -> None:
        for (owner, attribute, _), placeholder in zip(self.absent, self._placeholders, strict=True):
            _put(owner, attribute, placeholder)


@dataclass(frozen=True)
class _Call:
    """A block's call that waits for its weights."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def stream(self) -> Tensor:
        stream = self.args[0] if self.args else self.kwargs.get("hidden_states")
        if not isinstance(stream, Tensor):
            raise ValueError(f"{type(self.module).__name__} is not called with a stream of hidden states")
        return stream


class _Run:
    """The forward pass of one batch, which stops at each block's call."""

    def __init__(self, batch: Batch, model: nn.Module, inputs: dict[str, Any]):
        self.batch = batch
        self.call: _Call | None = None
        self._pass = greenlet(lambda: _without_result(model, inputs))

    def go_on(self, result: Any) -> None:
        """Run to the next block's call, `result` being what the last one returns."""
        self.call = None
        self.call = self._pass.switch(result) if self._pass else self._pass.switch()

    @property
    def finished(self) -> bool:
        return bool(self._pass.dead)

    def kill(self) -> None:
        if self._pass:
            self._pass.throw()


def _without_result(model: nn.Module, inputs: dict[str, Any]) -> None:
    model(**inputs)


@contextlib.contextmanager
def _handed_over(blocks: dict[nn.Module, _Block]) -> Iterator[None]:
    """Inside, a block's forward does not run: it gives its call to who started the greenlet, and waits."""
    main = greenlet.getcurrent()

    def instead(module: nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: main.switch(_Call(module, args, kwargs))

    for module in blocks:
        module.forward = instead(module)
    try:
        yield
    finally:
        for module in blocks:
            del module.forward


class _Parked:
    """Streams of batches that wait: in memory up to a budget, then in files of the system's temporary folder."""

    def __init__(self, budget_bytes: float):
        self._budget, self._resident, self._files = budget_bytes, 0, 0
        self._held: dict[int, int] = {}
        self._away: dict[int, tuple[Tensor, Path]] = {}

    def __enter__(self) -> "_Parked":
        self._folder = tempfile.TemporaryDirectory(prefix="deadbench-")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._folder.cleanup()

    def put(self, run: _Run) -> None:
        """Count a waiting run's stream; past the budget, write it and give its memory back."""
        assert run.call is not None
        stream = run.call.stream()
        storage = stream.untyped_storage()
        if self._resident + storage.nbytes() <= self._budget or not storage.resizable():
            self._held[id(run)] = storage.nbytes()
            self._resident += storage.nbytes()
            return
        path = Path(self._folder.name) / str(id(run))
        _bytes_of(stream).cpu().clone().numpy().tofile(path)
        storage.resize_(0)
        self._away[id(run)] = (stream, path)

    def take(self, run: _Run) -> None:
        """Have the stream of a run back in memory."""
        self._resident -= self._held.pop(id(run), 0)
        if id(run) in self._away:
            stream, path = self._away.pop(id(run))
            content = torch.from_numpy(np.fromfile(path, np.uint8))
            stream.untyped_storage().resize_(len(content))
            _bytes_of(stream).copy_(content)
            path.unlink()


class _Clock:
    """Seconds in the model and in the taps since a batch last came out."""

    def __init__(self) -> None:
        self._seconds = {"model": 0.0, "taps": 0.0}

    @contextlib.contextmanager
    def _running(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - started

    def model(self) -> contextlib.AbstractContextManager[None]:
        return self._running("model")

    def taps(self) -> contextlib.AbstractContextManager[None]:
        return self._running("taps")

    def forward_pass(self, captured: dict[str, Tensor], calls: int) -> ForwardPass:
        """The pass of the batch that has just come out."""
        model, taps = self._seconds["model"], self._seconds["taps"]
        self._seconds = {"model": 0.0, "taps": 0.0}
        return ForwardPass(captured.pop("input"), captured.pop("output"), model, taps, calls)


def _same_block(runs: list[_Run]) -> nn.Module:
    modules = {run.call.module if run.call else None for run in runs}
    if len(modules) != 1 or None in modules:
        raise ValueError("the batches do not pass through the same blocks; such a model cannot be streamed")
    (module,) = modules
    assert module is not None
    return module


def _streamed_paths(model: nn.Module) -> list[str]:
    """The entries of every outermost ModuleList that hold weights: decoder's blocks, encoder's, a vision tower's."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    entries = [(f"{path}.{name}", m) for path in outermost for name, m in model.get_submodule(path).named_children()]
    return [path for path, module in entries if any(True for _ in module.parameters())]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, shared ones by each."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _put(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
    if attribute in owner._parameters:
        owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[attribute] = tensor


def _bytes_of(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))  # type: ignore[call-overload, no-any-return]


def _offloaded(model: nn.Module) -> Any:
    """accelerate's loader of the tensors that stay on disk, by full name."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            weights = getattr(each, "weights_map", None)
            if weights is not None:
                return getattr(weights, "dataset", weights)
    return {}
