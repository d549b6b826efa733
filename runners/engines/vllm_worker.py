"""What runs inside vLLM's workers: hooks that read the stream where it is.

Nothing of size N x D leaves a worker: the accumulators live here, and finished rows come back as Arrow bytes. Methods
of `StreamReader` join vLLM's own worker class, so their names carry a prefix.
"""

import json
import pickle
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_pp_group, get_tp_group, get_world_group
from vllm.forward_context import get_forward_context

import deadbench.runners.engines.vllm_random_weights  # noqa: F401 - registers its loader, in every worker
from deadbench.runners.engines.device import free_bytes, settle
from deadbench.suite.architectures.norms import EffectiveNorm, FinalNorm, effective_norm
from deadbench.suite.architectures.parts import block_list
from deadbench.suite.inputs.batches import check_distinct
from deadbench.suite.ranks import Ranks
from deadbench.suite.reads.columns import scale_columns
from deadbench.suite.reads.final_norm import FinalNormRead
from deadbench.suite.reads.residual import ResidualRead
from deadbench.suite.schema import Row, to_table
from deadbench.suite.spectra.questions import Questions

_REPRODUCED = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 8e-2}  # of the largest value; a wrong input is off by 1


class StreamReader:
    """Reads the final norm and the taps of the model that this worker runs."""

    model_runner: Any

    def deadbench_free(self) -> int:
        """Bytes that accumulators can take where this worker's part of the model lives."""
        return free_bytes(_device(self.model_runner.get_model()))

    def deadbench_begin(self, sought: bytes, num_tokens: int, dtype: str, stride: int) -> None:
        """Hook the model; the pass that follows is a probe, in which the final norm and the blocks are found.

        `sought` is the final norm and its module as transformers builds it, pickled by the parent process: here vLLM
        has put its own layers into transformers' classes. Each `stride`-th tap is read, and the last; 0: none.
        """
        settle()
        final, replay = pickle.loads(sought)
        self._hooked_read = _HookedRead(self.model_runner.get_model(), final, replay, num_tokens, dtype, stride)

    def deadbench_pass(self, first: int, count: int) -> None:
        """The taps `first` to `first + count - 1` are read in the pass that follows; the final norm in the first."""
        self._hooked_read.start(first, count)

    def deadbench_end_pass(self) -> bytes:
        """Decompose the taps of the pass; JSON of how many there are, or of what went wrong."""
        return json.dumps(self._hooked_read.end()).encode()

    def deadbench_finish(self) -> list[bytes]:
        """Arrow tables reads, spectra and blocks of rank 0; nothing from other ranks."""
        return self._hooked_read.finish()


class _HookedRead:
    """One read of one model, by hooks, in one worker."""

    def __init__(self, model: nn.Module, final: FinalNorm, replay: nn.Module, num_tokens: int, dtype: str, stride: int):
        group, stage, world = get_tp_group(), get_pp_group(), get_world_group()
        self.model, self.num_tokens, self.dtype = model, num_tokens, dtype
        # The ranks of a stage have the same blocks, and share their taps; what is told goes to all.
        gather = lambda mine: _gather(world, mine)  # noqa: E731
        self.ranks = Ranks(group.rank_in_group, group.world_size, gather, stages=stage.world_size)
        self.last_stage = stage.is_last_rank
        self.final, self.replay = final, replay
        assert self.final.hidden_size is not None
        self.questions = Questions(_device(model))
        self.stream = ResidualRead(
            self.final.hidden_size,
            num_tokens,
            dtype,
            str(self.final.placement),
            _device(model),
            self.ranks,
            stride=stride,
            questions=self.questions,
        )
        self.measured: FinalNormRead | None = None
        self.formula: EffectiveNorm | None = None
        self.norm: nn.Module | None = None
        self.summed = False
        self.detail = self.hooked = ""
        self.first_pass, self.rows, self.error = True, 0, ""
        self.num_blocks = 0
        self._blocks_path: str | None = None
        self._candidates: dict[str, list[Tensor]] = {}
        self._recorded: list[tuple[str, Any, Any]] = []
        self.handles = [model.register_forward_hook(self._guarded(self._after_model), with_kwargs=True)]
        width = self.final.hidden_size
        for name, module in model.named_modules() if self.last_stage else ():
            if any(True for _ in module.children()) or all(p.shape != (width,) for p in module.parameters()):
                continue
            self.handles.append(module.register_forward_pre_hook(self._keep_input(name), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._keep_output(name), with_kwargs=True))

    def start(self, first: int, count: int) -> None:
        if not self.detail:
            self._hook_blocks()
        self.stream.wanted = range(first, first + count)
        self.first_pass, self.rows, self.error = first == 0, 0, ""

    def end(self) -> dict[str, Any]:
        try:
            with self.ranks.together():
                if self.error:
                    raise ValueError(self.error)
                if self.rows != self.num_tokens:
                    raise ValueError(f"vLLM ran {self.rows} rows for {self.num_tokens} tokens")
                if self.first_pass and self.measured is not None and not self.ranks.rank:
                    check_distinct(self.measured.distinct.count(), self.rows, self.stream.hidden_size)
            self.stream.end_pass()
        except Exception as error:
            return {"error": f"{error}"}
        return {"taps": self.num_blocks + 1, "detail": self.detail}

    def finish(self) -> list[bytes]:
        for handle in self.handles:
            handle.remove()
        if self.ranks.rank or self.measured is None:
            return []  # another stage has the final norm, or another rank tells
        columns, final_spectrum = self.measured.finish()
        stream_columns, blocks, spectra = self.stream.finish()
        rows: dict[str, list[Row]] = {
            "reads": [scale_columns(self.measured.norm, self.dtype) | columns | stream_columns],
            "spectra": [final_spectrum, *spectra],
            "blocks": blocks,
            "samples": [self.measured.samples(columns["lambda_mean"])],
        }
        return [_packed(to_table(name, rows[name])) for name in rows]

    def _guarded(self, hook: Any) -> Any:
        """An exception inside a pass would end vLLM's engine: it is kept until the pass is over."""

        def call(*args: Any) -> None:
            try:
                if not self.error and _num_rows() is not None:
                    hook(*args)
            except Exception as error:
                self.error = f"{error}" or type(error).__name__

        return call

    def _keep_input(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.norm is None or module is self.norm:  # the fused add may be in place
                self._candidates[name] = [t.clone() for t in _stream_tensors(args, kwargs, self.stream.hidden_size)]

        return self._guarded(hook)

    def _keep_output(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.norm is None:
                self._recorded.append((name, module, _first(output)))
            elif module is self.norm:
                self._recorded = [(name, module, _first(output))]

        return self._guarded(hook)

    def _after_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        num_rows = _num_rows()
        if not self.last_stage:
            self.questions.settle()
            self.rows += num_rows or 0
            return
        top = _first(output)
        if self.norm is None:
            self._find_norm(top)
            return
        name, _, normed = self._recorded[-1]
        entered = _flat(self._entered(self._candidates[name]))[:num_rows]
        left = _flat(normed)[:num_rows]
        self._recorded = []
        if self.first_pass and self.ranks.rank == 0 and self.measured is not None:
            # The standard is the replay by transformers' module; vLLM's own kernel is the model as executed.
            self.measured.update(entered, left.double() if left.dtype == torch.float32 else left)
        last = left if self.final.placement == "post" else entered
        self.stream.update(self.num_blocks, last, is_last=True)
        self.questions.settle()
        self.rows += len(left)

    def _entered(self, candidates: list[Tensor]) -> Tensor:
        return candidates[0] + candidates[1] if self.summed and len(candidates) > 1 else candidates[0]

    def _find_norm(self, top: Tensor) -> None:
        """The module whose output the model returns; then whether h or h + r is what it normalises."""
        makers = [entry for entry in self._recorded if entry[2].shape == top.shape and torch.equal(entry[2], top)]
        makers = makers or [e for e in self._recorded if torch.equal(_flat(e[2]), _flat(top))]
        if not makers:
            raise ValueError(f"no module of vLLM's {type(self.model).__name__} makes its last hidden state")
        name, module, normed = makers[-1]
        formula, replay = self._formula(module)
        num_rows = _num_rows()
        expected = _flat(normed)[:num_rows].cpu().double()
        candidates = self._candidates[name]
        errors = {}
        for summed in (False, True)[: len(candidates)]:
            self.summed = summed
            found = formula(_flat(self._entered(candidates))[:num_rows])
            errors[summed] = float((found - expected).abs().max() / expected.abs().max())
        self.summed = min(errors, key=lambda summed: errors[summed])
        if not errors[self.summed] <= _REPRODUCED[self.dtype]:
            raise ValueError(f"vLLM's {name} ({type(module).__name__}) is not the final norm of the configuration")
        self.norm, self.formula, self.measured = (
            module,
            formula,
            FinalNormRead(replay, formula, device=self.stream.device, questions=self.questions),
        )
        self._recorded, self._candidates = [], {}
        self._blocks_path, _ = block_list(self.model, name) if self.stream.stride else (None, 0)
        self.hooked = f"{type(self.model).__name__}; hooked {name} ({type(module).__name__})"

    def _hook_blocks(self) -> None:
        """Hook those of this stage, where the last stage, which has the norm, says that they are."""
        told = (self._blocks_path, self.summed, self.hooked) if self.norm is not None else None
        found = [each for each in self.ranks.share(told) if each is not None]
        if not found:
            return  # why, `error` says
        blocks_path, self.summed, hooked = found[-1]
        blocks = list(self.model.get_submodule(blocks_path).children()) if blocks_path else []
        self.num_blocks = len(blocks)  # with those that are on other stages
        for tap, block in enumerate(blocks):
            if any(True for _ in block.parameters()):
                hook = self._guarded(self._before_block(tap))
                self.handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        stages = f" in {self.ranks.stages} stages" if self.ranks.stages > 1 else ""
        self.detail = (
            f"{hooked} and {self.num_blocks} blocks{stages}, stream {'h + r' if self.summed else 'h'}; "
            f"replayed by transformers' {type(self.replay).__name__}"
        )

    def _before_block(self, tap: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            entered = self._entered(_stream_tensors(args, kwargs, self.stream.hidden_size))
            self.stream.update(tap, _flat(entered)[: _num_rows()])

        return hook

    def _formula(self, module: nn.Module) -> tuple[EffectiveNorm, nn.Module]:
        """The norm as a formula, and transformers' own module, both with vLLM's parameters."""
        behaviour, D = self.final.behaviour, self.stream.hidden_size
        replay, values = self.replay, {}
        for name in (behaviour.scale_parameter, behaviour.shift_parameter):
            if name is not None:
                value = getattr(module, name).detach().cpu().reshape(D).double()
                getattr(replay, name).data.copy_(value)
                values[name] = value.numpy()
        scale_D, shift_D = (values.get(str(n)) for n in (behaviour.scale_parameter, behaviour.shift_parameter))
        return effective_norm(behaviour, scale_D, shift_D, D), replay


def _gather(group: Any, mine: Any) -> list[Any]:
    gathered: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(gathered, mine, group=group.cpu_group)
    return gathered


def _num_rows() -> int | None:
    """Rows of this pass that are tokens; None in a pass that only warms up.

    What Mamba and linear attention are told has no `num_actual_tokens`; their prefill and decode tokens are all.
    """
    metadata = get_forward_context().attn_metadata
    if metadata is None:
        return None
    told = list(metadata.values()) if isinstance(metadata, dict) else [metadata]
    for each in told:
        if (count := getattr(each, "num_actual_tokens", None)) is not None:
            return int(count)
    return int(told[0].num_prefill_tokens + told[0].num_decode_tokens)


def _stream_tensors(args: Any, kwargs: Any, hidden_size: int) -> list[Tensor]:
    """h and, where there is one, r."""
    given = (*args, *kwargs.values())
    return [t for t in given if isinstance(t, Tensor) and t.is_floating_point() and t.shape[-1] == hidden_size]


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _flat(acts: Tensor) -> Tensor:
    return acts.reshape(-1, acts.shape[-1])


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed
