"""Small models at random initialisation, whose weights all engines draw alike: what checks read of them."""

import json
from typing import Any

from deadbench.runners.doctor.node_checks import UnwellError
from deadbench.runners.doctor.read_checks import row_of
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import ModelJob, Overrides
from deadbench.suite.registry.loading import load_registry, own_registry
from deadbench.suite.schema import Row
from deadbench.suite.scratch import Scratch

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip
MAMBA = {
    "model_type": "mamba", "architectures": ["MambaForCausalLM"], "vocab_size": 512, "hidden_size": 64,
    "num_hidden_layers": 2, "state_size": 16, "conv_kernel": 4, "expand": 2, "time_step_rank": 4,
}  # fmt: skip
HYBRID = {
    "model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"], "vocab_size": 512,
    "hidden_size": 64, "intermediate_size": 128, "shared_intermediate_size": 128, "num_hidden_layers": 2,
    "layer_types": ["mamba", "attention"], "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 0,
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 64,
    "max_position_embeddings": 512,
}  # fmt: skip
NUMBERS = ("lambda_max", "lambda_mean", "lambda_min", "worst_block_ratio")
_APART = 1e-2  # relative: kernels of other engines and devices round elsewhere
# As the CPU reads them.
_STATE_SPACES = {
    "a small Mamba": (MAMBA, {"lambda_mean": 0.992173, "lambda_min": 0.367071}),
    "a small hybrid of Mamba and attention": (HYBRID, {"lambda_mean": 0.993616, "lambda_min": 0.167224}),
}
_ENGINES = ("torch", "streaming")


def small_row(config: dict[str, Any], engine: str, tensor_parallel: int = 1) -> Row:
    """The random read of 1024 tokens of what `config` describes, in this process."""
    with Scratch() as folder:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return row_of(random_job(str(folder), engine, 1024).over(tensor_parallel))


def random_job(source: str, engine: str, tokens: int) -> ModelJob:
    """The random read of a folder that has a configuration, in float32."""
    path = own_registry()
    asked = Overrides(tokens=tokens, input="tokens:random", dtype="float32", engine=engine)
    (job,) = build_jobs(load_registry(path), path, [source], None, ["random"], asked)
    return job


def is_known(row: Row, known: Row, how: str, whose: str) -> None:
    """Raise UnwellError where a row that was read `how` failed, or has other numbers than the `known` ones, `whose`."""
    if row["status"] != "ok":
        raise UnwellError(f"{how}: {row['error']}")
    for name, number in known.items():
        if not abs(row[name] - number) <= _APART * abs(number):
            raise UnwellError(f"{how}: {name} is {row[name]:.4g}, and {number:.4g} by {whose}")


def state_spaces() -> str:
    """State-space models, alone and beside attention, are read as the CPU reads them, by both engines."""
    for name, (config, known) in _STATE_SPACES.items():
        for engine in _ENGINES:
            is_known(small_row(config, engine), known, f"{name} by --engine {engine}", "the CPU")
    return f"{' and '.join(_STATE_SPACES)}, by {' and '.join(_ENGINES)}"
