"""One model, every engine of the registry, one row; on two devices too, where an engine shares a model.

A LayerNorm and an RMSNorm model are drawn from a seed by each engine for itself: no checkpoint passes between them. A
trained one is loaded by each. CI reads small ones; `pytest -m full` with this file two of about 1 GB (about 8 GB of
memory).
"""

import json
import multiprocessing
import os
import socket

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from deadbench.runners.engines.registry import ENGINES
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker.run import run_model
from deadbench.suite.registry.loading import load_registry
from tests.conftest import save_tiny
from tests.runners.engines.test_tensor_parallel import table
from tests.runners.engines.test_vllm import HAS_VLLM

pytestmark = [pytest.mark.vllm, pytest.mark.subprocess, pytest.mark.timeout(1800)]

# Engines order their sums differently: float32 rounding, grown over the blocks. A kernel's depth is rounding itself.
RELATIVE, DECADES = 3e-4, 0.4
SHAPES = {
    "small": ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
               "vocab_size": 256}, 512),
    "1 GB": ({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
              "vocab_size": 32768}, 1536),
}  # fmt: skip
FAMILIES = {
    "gpt_neox": {"architectures": ["GPTNeoXForCausalLM"]},
    "llama": {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2},
}
WAYS = {name: (name, 1) for name in ENGINES} | {
    f"{name} on two": (name, 2) for name, spec in ENGINES.items() if spec.tensor_parallel
}
STANDARD = "torch"
# The id of a saved llama: of gpt_neox vLLM's transformers backend, within this process, leaves layers in its classes.
TRAINED = "trained"


def read(registry, out, engine, degree, place=None):
    """Every model of the registry by one engine, in this process; `place`: (rank, address) in a group of two."""
    import torch

    from deadbench.runners.worker.group import join_group, run_rank

    torch.set_num_threads(max(1, 2 // degree))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(degree > 1))
    registered = load_registry(registry)
    overrides = Overrides(engine=engine, tensor_parallel=degree)
    jobs = build_jobs(registered, registry, [m.id for m in registered.models if m.config], None, ["random"], overrides)
    if degree == 1 and any(m.id == TRAINED for m in registered.models):
        jobs += build_jobs(registered, registry, [TRAINED], None, ["trained"], overrides)
    store, group = ResultStore(str(out)), join_group(place[0], 2, place[1]) if place else None
    for job in jobs:
        job = job.over(degree)
        for event in run_rank(group, job, "run", 1) if group else run_model(job, "run", 1):
            if isinstance(event, Finished) and not (place and place[0]):
                store.write(event.tables)


def read_here(registry, out, engine, degree):
    """`read` in this process, in which the torch engines leave nothing behind."""
    import torch

    threads = torch.get_num_threads()
    read(registry, out, engine, degree)
    torch.set_num_threads(threads)


def read_apart(registry, out, engine, degree):
    """`read` in processes of its own: what vLLM leaves in a process does not meet the next one."""
    spawn = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("", 0))
        meeting = ("127.0.0.1", free.getsockname()[1])
    ranks = degree > 1 and ENGINES[engine].tensor_parallel == "ranks"
    places = [(rank, meeting) for rank in range(2)] if ranks else [None]
    processes = [spawn.Process(target=read, args=(registry, out, engine, degree, place)) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0, f"{engine}, {degree}"


@pytest.fixture(scope="module", params=["small", pytest.param("1 GB", marks=pytest.mark.full)])
def rows(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("agree")
    size, tokens = SHAPES[request.param]
    models = [
        {"id": name, "input": "tokens:random", "dtype": "float32",
         "config": {"model_type": name, "max_position_embeddings": 256} | size | family}
        for name, family in FAMILIES.items()
    ]  # fmt: skip
    if request.param == "small":
        saved = {"model_type": "llama", "max_position_embeddings": 256} | size | FAMILIES["llama"]
        save_tiny(folder / TRAINED, saved)
        models.append({"id": TRAINED, "source": TRAINED, "input": "tokens:random", "dtype": "float32"})
    content = {"protocols": {"standard": {"tokens": tokens, "sequence_length": 128}}, "suites": {}, "models": models}
    (folder / "models.yaml").write_text(json.dumps(content))
    found = {}
    for name, (engine, degree) in WAYS.items():
        if ENGINES[engine].missing() is None:
            way = read_here if ENGINES[engine].in_process and degree == 1 else read_apart
            way(folder / "models.yaml", folder / name, engine, degree)
            found[name] = table(folder / name, "reads"), table(folder / name, "blocks")
            with pl.Config(tbl_cols=-1, fmt_float="full"):
                shown = ["model", "status", "alignment", "depth", "lambda_mean", "worst_block_ratio", "forward_seconds"]
                print(name, found[name][0].select(shown))
    return found


def test_the_rows_of_all_engines_agree(rows):
    every, every_blocks = rows[STANDARD]
    assert set(every["status"]) == {"ok"}, every["error"].drop_nulls().to_list()
    names = ["model", "family", "num_tokens", "num_distinct_inputs", "kernel_exact", "num_dead_1e6", "blocks_preserved"]
    numbers = ["lambda_mean", "lambda_max", "lambda_second", "lambda_control", "worst_block_ratio", "scale_harmonic"]
    depths = ["depth", "depth_exact", "depth_as_executed"]
    assert {*every["family"]} == {"layernorm", "rmsnorm"}
    for name, (reads, blocks) in rows.items():
        engine, degree = WAYS[name]
        assert (set(reads["engine"]), set(reads["tensor_parallel"])) == ({engine}, {degree}), name
        expected, expected_blocks = (each.filter(each["model"].is_in(reads["model"])) for each in (every, every_blocks))
        assert len(reads) == len(every) if degree == 1 else len(reads) == len(FAMILIES)
        assert (len(blocks) > len(reads)) == ENGINES[engine].taps
        rms = expected["family"] == "rmsnorm"
        assert_frame_equal(expected.select(names), reads.select(names))
        assert_frame_equal(expected.select(numbers), reads.select(numbers), rel_tol=RELATIVE)
        assert_frame_equal(expected.select("alignment"), reads.select("alignment"), abs_tol=RELATIVE)
        for depth in depths:
            apart = (expected[depth] - reads[depth]).abs()
            assert apart.max() < DECADES, name
            assert apart.filter(rms).max() < 1e-3, name
        which = ["model", "block", "state", "rank_limited", "preserved"]
        assert_frame_equal(expected_blocks.select(which), blocks.select(which))
        sigmas = ["sigma_min", "sigma_max"]
        assert_frame_equal(expected_blocks.select(sigmas), blocks.select(sigmas), rel_tol=RELATIVE)


def test_each_row_says_how_it_was_made(rows):
    said = {name: " ".join(reads["engine_detail"]) for name, (reads, _) in rows.items()}
    assert "resident on one device" in said["torch"]
    assert "tensor parallel over 2 ranks (gloo)" in said["torch on two"]
    assert "drawn block by block" in said["streaming"]
    if HAS_VLLM:
        assert "LlamaForCausalLM; hooked model.norm" in said["vllm on two"]
