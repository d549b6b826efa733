"""What is settled of a read before it runs: dtype, tokens, parameters."""

import json
from functools import cache
from typing import Any

from deadbench.runners.jobs.job import ReadJob
from deadbench.suite.architectures.build import build_config, count_parameters
from deadbench.suite.checkpoints.tensors import TensorEntry, stored_dtype


def dtype_name(read: ReadJob, config: Any, entries: dict[str, TensorEntry] | None) -> str:
    """The dtype of the forward pass: as asked, else that of the stored tensors, else the configuration's."""
    if read.dtype != "auto":
        return read.dtype
    declared = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return (stored_dtype(entries) if entries else None) or declared


def wanted_tokens(read: ReadJob, hidden_size: int) -> int:
    """The protocol's tokens for a model of that width."""
    rule = read.protocol.tokens
    return rule if isinstance(rule, int) else int(rule[:-1]) * hidden_size


@cache
def num_parameters(config_json: str) -> int:
    """Parameters of the published architecture, from the contents of config.json."""
    return count_parameters(build_config(json.loads(config_json)))
