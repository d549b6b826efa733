"""vLLM's modules as its workers import them, without vLLM: what runs inside it can be tested everywhere."""

import sys
from types import ModuleType, SimpleNamespace

OURS = ("deadbench.runners.engines.vllm_worker", "deadbench.runners.engines.vllm_random_weights")


class Context:
    """The forward context that vLLM would give: `attn_metadata` None in a pass that only warms up."""

    attn_metadata: object = None

    def tokens(self, count: int, *, by_layer: bool = False) -> None:
        """The next pass has `count` rows that are tokens."""
        each = SimpleNamespace(num_actual_tokens=count)
        self.attn_metadata = {"layer 0": each, "layer 1": each} if by_layer else each

    def mamba_tokens(self, prefill: int, decode: int, *, attention: int | None = None) -> None:
        """The next pass has so many rows, as a Mamba layer is told; beside it a layer of attention, or none."""
        told = {"layer 0": SimpleNamespace(num_prefill_tokens=prefill, num_decode_tokens=decode)}
        if attention is not None:
            told["layer 1"] = SimpleNamespace(num_actual_tokens=attention)
        self.attn_metadata = told

    def warming_up(self) -> None:
        """The next pass has none."""
        self.attn_metadata = None


def pretend_vllm(monkeypatch, group: object = None, stage: object = None) -> Context:
    """Have `import vllm...` give fakes, in a tensor-parallel group of `group` (alone: None), until the test ends.

    `stage`: the pipeline's group, where there is one.
    """
    context, loaders = Context(), {}
    alone = SimpleNamespace(rank_in_group=0, world_size=1, cpu_group=None, is_last_rank=True)

    def register_model_loader(name):
        return lambda loader: loaders.setdefault(name, loader)

    contents = {
        "vllm": {},
        "vllm.distributed": {},
        "vllm.distributed.parallel_state": {
            "get_tp_group": lambda: group or alone,
            "get_pp_group": lambda: stage or alone,
            "get_world_group": lambda: group or alone,
        },
        "vllm.forward_context": {"get_forward_context": lambda: context},
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {"register_model_loader": register_model_loader, "loaders": loaders},
        "vllm.model_executor.model_loader.base_loader": {"BaseModelLoader": object},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for name in OURS:  # imported anew, with the fakes, and again without them by whoever comes next
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    return context
