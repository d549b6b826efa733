"""Whether vLLM has an architecture: vLLM itself is asked, in a process of its own.

Importing it takes many seconds and changes the process that does, and its list alone does not say what its
transformers backend takes.
"""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

from deadbench.suite.errors import message
from deadbench.suite.scratch import Scratch

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked child would not carry the mark by which it is found and ended
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a sequence of the longest length and the one token that is generated
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # A worker reads and draws weights while vLLM waits for it: --timeout says how long a silence may be, not vLLM.
    "VLLM_ENGINE_READY_TIMEOUT_S": "43200",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "43200",
}


def why_vllm_cannot(raw_config: dict[str, Any]) -> str | None:
    """Why the installed vLLM does not run the architecture that `raw_config` names, in one line; None if it does."""
    try:
        name = vllm_architecture(raw_config)
    except ValueError as error:
        return str(error)
    return _ask_apart(json.dumps(raw_config | {"architectures": [name]}, sort_keys=True))[0]


def why_not_over_nodes(raw_config: dict[str, Any]) -> str | None:
    """Why the installed vLLM does not run the architecture in stages, in one line; None if it does."""
    described = raw_config | {"architectures": [vllm_architecture(raw_config)]}
    return _ask_apart(json.dumps(described, sort_keys=True))[1]


def vllm_architecture(raw_config: dict[str, Any]) -> str:
    """The class with a language model's head, by which vLLM knows an architecture.

    Raises:
        ValueError: it has none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from deadbench.suite.architectures.objectives import stated_architectures

    stated: list[str | None] = [
        name
        for name in stated_architectures(raw_config.get("architectures"))
        if name.endswith(("ForCausalLM", "LMHeadModel"))
    ]
    name = (stated or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(raw_config["model_type"])])[0]
    if name is None:
        raise ValueError(f"vLLM runs language models, and {raw_config['model_type']!r} is none; give --engine torch")
    return str(name)


@cache
def _ask_apart(config_json: str) -> tuple[str | None, str | None]:
    """(why vLLM does not run it, why not in stages)."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
        return apart.submit(_ask, config_json).result()


def _ask(config_json: str) -> tuple[str | None, str | None]:
    os.environ.update(ENVIRONMENT)
    from vllm.config import ModelConfig

    names = json.loads(config_json)["architectures"]
    with Scratch() as folder:
        (folder / "config.json").write_text(config_json, encoding="utf-8")
        try:
            model = ModelConfig(model=str(folder), skip_tokenizer_init=True, hf_overrides={"architectures": names})
            if not model.registry.is_pp_supported_model(names, model):
                return None, f"vLLM runs {names[0]} on one node alone; give at most its GPUs, or --engine torch"
        except Exception as error:
            return refusal(error), refusal(error)
    return None, None


def refusal(error: Exception) -> str:
    """What vLLM says when it does not take a model, without its list of all that it takes."""
    text = message(error, None)
    text = text.partition("Value error, ")[2] or text
    return text.partition(" Supported architectures:")[0].partition(" [type=")[0][:300]
