"""Torch tensor parallel over architectures: two ranks of plain processes (gloo) give the rows of one, each block too.

Without Ray: a group starts once for all models. What comes back is compared to float32 rounding; along a kernel, where
rounding is all there is, to a third of a decade.
"""

import json
import multiprocessing
import re
import socket
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker.run import run_model
from deadbench.suite.registry.loading import load_registry
from tests.conftest import save_tiny
from tests.runners.engines.test_tensor_parallel import table

pytestmark = pytest.mark.subprocess

RELATIVE, DECADES = 1e-4, 0.35
TEXT = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WITH_KV = TEXT | {"num_key_value_heads": 2}
TOWER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
# One without a plan, then LayerNorm, then RMSNorm, of which two are the text towers of models that also see.
ARCHITECTURES = {
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4,
             "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": TEXT | {"architectures": ["GPTNeoXForCausalLM"]},
    "cohere": WITH_KV | {"architectures": ["CohereForCausalLM"]},
    "starcoder2": WITH_KV | {"architectures": ["Starcoder2ForCausalLM"]},
    "phi": TEXT | {"architectures": ["PhiForCausalLM"]},
    "olmo": WITH_KV | {"architectures": ["OlmoForCausalLM"]},
    "llama": WITH_KV | {"architectures": ["LlamaForCausalLM"]},
    "qwen2": WITH_KV | {"architectures": ["Qwen2ForCausalLM"]},
    "olmo2": WITH_KV | {"architectures": ["Olmo2ForCausalLM"]},
    "gemma2": WITH_KV | {"architectures": ["Gemma2ForCausalLM"], "head_dim": 8, "sliding_window": 16},
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 4, "image_token_index": 120,
        "text_config": WITH_KV | {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 16},
        "vision_config": TOWER | {"model_type": "siglip_vision_model"},
        "boi_token_index": 121, "eoi_token_index": 122,
    },
    "gemma4": {
        "architectures": ["Gemma4ForConditionalGeneration"], "audio_config": None, "image_token_id": 120,
        "boi_token_id": 121, "eoi_token_id": 122, "audio_token_id": 123, "video_token_id": 124,
        "text_config": WITH_KV | {
            "model_type": "gemma4_text", "num_global_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16,
            "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_k_eq_v": True,
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "enable_moe_block": False,
        },
        "vision_config": TOWER | {"model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 8,
                                  "patch_size": 4, "position_embedding_size": 64, "pooling_kernel_size": 2},
    },
}  # fmt: skip
WITHOUT_PLAN = "gpt2"
# Checkpoints that are not what their config.json says: what it is changed to, and what the row's error then says.
UNTRUE = {
    "llama-wider": ({"intermediate_size": 96}, r"does not match config.json: .*mlp"),
    "llama-deeper": ({"num_hidden_layers": 3}, r"the weights lack \d+ tensors of LlamaModel, layers.2"),
    "llama-shallower": ({"num_hidden_layers": 1}, r"layers.1.* is of a block that the configuration does not have"),
}


def write_registry(folder: Path) -> Path:
    models = []
    for name, config in ARCHITECTURES.items():
        save_tiny(folder / name, config | {"model_type": name})
        models.append({"id": name, "source": name, "input": "tokens:random", "dtype": "float32"})
    for name, (said, _) in UNTRUE.items():
        config = save_tiny(folder / name, ARCHITECTURES["llama"] | {"model_type": "llama"}) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | said))
        models.insert(1, {"id": name, "source": name, "input": "tokens:random", "dtype": "float32"})
    suites = {"all": {"protocol": "standard", "models": [m["id"] for m in models], "reads": ["trained"]}}
    content = {"protocols": {"standard": {"tokens": "8D"}}, "suites": suites, "models": models}
    (folder / "models.yaml").write_text(json.dumps(content))
    return folder / "models.yaml"


def read_all(registry: Path, out: Path, rank: int, meeting: tuple[str, int] | None) -> None:
    """Every model of the registry: in this process, or as rank `rank` of two."""
    import torch

    from deadbench.runners.worker.group import join_group, run_rank

    torch.set_num_threads(1)
    store = ResultStore(str(out))
    degree = 1 if meeting is None else 2
    group = None if meeting is None else join_group(rank, 2, meeting)
    for job in build_jobs(load_registry(registry), registry, [], "all", None, Overrides(tensor_parallel=1)):
        job = job.over(degree)
        events = run_model(job, "one", 1) if group is None else run_rank(group, job, "two", 1)
        for event in events:
            if isinstance(event, Finished) and rank == 0:
                store.write(event.tables)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    registry = write_registry(folder)
    with socket.socket() as free:
        free.bind(("", 0))
        meeting = ("127.0.0.1", free.getsockname()[1])
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=read_all, args=(registry, folder / "2", rank, meeting)) for rank in range(2)]
    for process in ranks:
        process.start()
    read_all(registry, folder / "1", 0, None)
    for process in ranks:
        process.join(600)
        assert process.exitcode == 0
    return folder / "1", folder / "2"


def test_rows_of_two_ranks_are_those_of_one(both):
    one, two = (table(out, "reads").filter(~pl.col("model").is_in(list(UNTRUE))) for out in both)
    assert set(one["status"]) == {"ok"}, one["error"].drop_nulls().to_list()
    two = two.filter(pl.col("model") != WITHOUT_PLAN)
    one = one.filter(pl.col("model") != WITHOUT_PLAN)
    assert len(two) == len(ARCHITECTURES) - 1 >= 8
    assert set(two["status"]) == {"ok"}, two["error"].drop_nulls().to_list()
    names = ["model", "family", "final_norm", "num_tokens", "kernel_exact", "protocol_hash"]
    assert_frame_equal(one.select(names), two.select(names))
    numbers = ["lambda_mean", "lambda_max", "lambda_second", "lambda_control", "worst_block_ratio", "scale_harmonic"]
    assert_frame_equal(one.select(numbers), two.select(numbers), rel_tol=RELATIVE)
    assert_frame_equal(one.select("alignment"), two.select("alignment"), abs_tol=RELATIVE)
    for name in ("depth", "depth_exact", "depth_as_executed"):
        assert (one[name] - two[name]).abs().max() < DECADES
        rms = one["family"] == "rmsnorm"
        assert (one[name] - two[name]).filter(rms).abs().max() < RELATIVE


def test_blocks_of_two_ranks_are_those_of_one(both):
    one, two = (table(out, "blocks").filter(pl.col("model") != WITHOUT_PLAN) for out in both)
    names = ["model", "block", "state", "rank_limited", "preserved"]
    assert_frame_equal(one.select(names), two.select(names))
    assert_frame_equal(one.select("sigma_min", "sigma_max"), two.select("sigma_min", "sigma_max"), rel_tol=RELATIVE)


@pytest.mark.parametrize("name", list(UNTRUE))
def test_a_checkpoint_that_is_not_what_its_config_says_is_a_failed_row_and_the_group_goes_on(both, name):
    for out in both:
        (row,) = table(out, "reads").filter(model=name).to_dicts()
        assert row["status"] == "failed"
        assert re.search(UNTRUE[name][1], row["error"]), row["error"]


def test_an_architecture_without_a_plan_is_a_failed_row_and_the_group_goes_on(both):
    (row,) = table(both[1], "reads").filter(model=WITHOUT_PLAN).to_dicts()
    assert row["status"] == "failed"
    assert row["error"] == "transformers has no tensor-parallel plan for 'gpt2'; give --tensor-parallel 1"
