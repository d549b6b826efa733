"""Random weights for vLLM: a loader of its own, registered where this is imported, in every worker."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from deadbench.runners.engines.deferred_init import deferred_model
from deadbench.suite.architectures.build import build_config

RANDOM_FORMAT = "deadbench_random"


@register_model_loader(RANDOM_FORMAT)
class RandomLoader(BaseModelLoader):  # type: ignore[misc,unused-ignore]
    """transformers' own random initialisation, one weight at a time: the weights of the torch engine, bit for bit.

    vLLM's `dummy` format is no initialisation: every tensor, scales included, is uniform on ±1e-3.
    """

    def download_model(self, model_config: Any) -> None:
        """Nothing is downloaded."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Stream full tensors; vLLM's own loaders fuse and shard them."""
        extra = self.load_config.model_loader_extra_config
        raw, seed = extra["config"], int(extra["seed"])
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                model.load_weights(random_weights(raw, seed))  # type: ignore[operator]
        finally:
            torch.set_default_dtype(before)


def random_weights(raw_config: dict[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name in a checkpoint of the published architecture, value) of every weight that the bare model has.

    A head that is not tied to the embedding is zero: nothing that is read comes after the final norm.
    """
    import transformers

    bare, drawn = deferred_model(build_config(raw_config), seed)
    published: Any = getattr(transformers, raw_config["architectures"][0])
    config = build_config(raw_config)
    with torch.device("meta"):
        whole = published(config)
    prefix = f"{whole.base_model_prefix}." if hasattr(whole, whole.base_model_prefix) else ""
    for name, tensor in bare.state_dict().items():
        yield prefix + name, drawn.value(tensor) if tensor.is_meta else tensor
    tied = config.get_text_config().tie_word_embeddings
    for name, tensor in whole.state_dict().items():
        if not name.startswith(prefix) and not tied:
            yield name, torch.zeros(tensor.shape)
