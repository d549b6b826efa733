"""The parameters-only read of a live module: its norms as they stand, and what the architecture makes of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from deadbench.runners.jobs.events import Rows
from deadbench.runners.jobs.resolved import Configuration, num_parameters, published, published_wiring
from deadbench.suite.architectures.build import count_parameters, published_class
from deadbench.suite.architectures.kernel_test import live_norm, own_vectors, plain_copy, plain_type, probe
from deadbench.suite.architectures.live import Sites, named_module, part_read, placement_of
from deadbench.suite.architectures.norms import FinalNorm, NormBehaviour
from deadbench.suite.architectures.objectives import objective
from deadbench.suite.architectures.parts import block_list
from deadbench.suite.architectures.stored_names import unwrapped
from deadbench.suite.atlas.lookup import lookup
from deadbench.suite.errors import ArchitectureError
from deadbench.suite.reads.columns import architecture_columns, scale_columns
from deadbench.suite.reads.norms_table import dissected, norms_in
from deadbench.suite.schema import Row


def own_parameters(
    root: nn.Module,
    sites: Sites | None,
    final_norm: str | nn.Module | None,
    blocks: str | nn.Module | Sequence[nn.Module] | None,
) -> Rows:
    """The rows of the read `parameters`, of `root` as it stands; nothing is run.

    Raises:
        ArchitectureError: the final norm is not told, and can be told neither by its configuration nor by `sites`.
    """
    part, raw = part_read(root), configuration(root)
    modules = {unwrapped(path): module for path, module in part.named_modules()}
    final = sites.final if sites is not None else _final(part, raw, final_norm, blocks)
    norm_module = modules[str(final.path)]
    assert final.hidden_size is not None
    norm = live_norm(plain_copy(norm_module), final.behaviour, final.hidden_size)
    scale = own_vectors(norm_module).get(str(final.behaviour.scale_parameter))
    dtype = None if scale is None else str(scale.dtype).removeprefix("torch.")
    row = architecture_columns(final) | scale_columns(norm, dtype)
    row |= {"dtype": dtype} | published_columns(root, final)

    whole = {unwrapped(path): module for path, module in root.named_modules()}

    def vectors_of(path: str, behaviour: NormBehaviour) -> tuple[NDArray[np.float64] | None, ...] | None:
        module = whole.get(path, modules.get(path.removeprefix(base)))
        if module is None:
            return None
        values = plain_copy(module)
        names = (behaviour.scale_parameter, behaviour.shift_parameter)
        return tuple(None if n is None else getattr(values, n).detach().cpu().double().numpy() for n in names)

    if raw is not None:
        config = Configuration(raw)
        model, (wiring, _) = published(config), published_wiring(config)
        base = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    else:
        model, wiring, base = root, None, _prefix(root, part)
    blocks_path, _ = block_list(model.get_submodule(base.rstrip(".")), final.path)
    listed: Any = norms_in(dissected(model, wiring, final, base, blocks_path), final, vectors_of)  # type: ignore[arg-type]
    norms = [each for each, _ in listed]
    counted = [each["dead_parameters"] for each in norms if each["dead_parameters"] is not None]
    row["dead_parameters"] = sum(counted) if counted else None
    row["dead_parameters_share"] = sum(counted) / row["num_parameters"] if counted else None
    return {"reads": [row], "norms": norms}


def published_columns(root: nn.Module, final: FinalNorm) -> Row:
    """What a row says of the whole model beside what is read: its parameters, what it is for, its norm's full name."""
    raw, scale = configuration(root), final.behaviour.scale_parameter
    return {
        "final_norm_tensor": f"{_prefix(root, part_read(root))}{final.path}.{scale}" if scale else None,
        "num_parameters": count_parameters(root) if raw is None else num_parameters(Configuration(raw)),
        "objective": None if raw is None else objective(raw),
    }


def _prefix(root: nn.Module, part: nn.Module) -> str:
    """Of the paths in the part that is read."""
    return next((f"{unwrapped(path)}." for path, module in root.named_modules() if module is part and path), "")


def configuration(root: nn.Module) -> dict[str, Any] | None:
    """The contents of the config.json that transformers would save with `root`; None where it is none of its models."""
    config: Any = getattr(root, "config", None)
    if not hasattr(config, "to_dict") or not hasattr(root, "base_model_prefix"):
        return None
    raw: dict[str, Any] = config.to_dict()
    if part_read(root) is not root or published_class(config) is None:
        raw["architectures"] = [plain_type(root).__name__]
    return raw if raw.get("model_type") else None


def _final(
    part: nn.Module,
    raw: dict[str, Any] | None,
    told: str | nn.Module | None,
    blocks: str | nn.Module | Sequence[nn.Module] | None,
) -> FinalNorm:
    if told is not None:
        path, norm = named_module(told, part, "final_norm")
        vectors = own_vectors(norm)
        width = len(next(iter(vectors.values()))) if vectors else 0
        behaviour = probe(norm, width)
        if not behaviour.known:
            raise ArchitectureError(f"{path} ({type(norm).__name__}) is neither LayerNorm nor RMSNorm; give another")
        listed, placement = placement_of(part, path, norm, blocks)
        return FinalNorm(unwrapped(path), behaviour, placement, width, len(listed) or None)
    known = lookup(raw) if raw is not None else None
    if raw is not None and (known is None or known.path is None or known.hidden_size is None):
        from deadbench.runners.jobs.resolved import resolved_without_weights

        known = resolved_without_weights(Configuration(raw), "text", "encoder").final_in_whole
    if known is None or known.path is None:
        raise ArchitectureError(
            f"{type(part).__name__}: without a batch the final norm of a module that is none of transformers' cannot "
            "be told; give final_norm, its path"
        )
    return replace(known)
