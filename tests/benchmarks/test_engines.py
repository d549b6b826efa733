"""Engines side by side on one model: vLLM beside the torch engine, and a read on two ranks beside their bare forward.

`make bench` takes a Llama of 0.4 GB; `make test` a small one once, for what it asserts, and leaves vLLM beside torch to
`test_engines_agree`, which asserts the same and more. What is timed is measured in the engines' own processes and given
as `extra_info`: starting them is no part of it.
"""

import json
import multiprocessing
import socket
import time

import polars as pl
import pytest

from tests.runners.engines.test_engines_agree import read_apart
from tests.runners.engines.test_vllm import needs_vllm

pytestmark = pytest.mark.subprocess

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 256}  # fmt: skip
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
         "num_key_value_heads": 16, "vocab_size": 8192}  # fmt: skip


@pytest.fixture
def llama(sized):
    shape = sized(LARGE, SMALL)
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512} | shape


def tokens_per_second(config, folder, engine):
    """Of the read's passes, in a process of its own: (tokens a second, depth)."""
    D = config["hidden_size"]
    model = {"id": "m", "input": "tokens:random", "dtype": "float32", "config": config}
    content = {"protocols": {"standard": {"tokens": 4 * D}}, "suites": {}, "models": [model]}
    (folder / "models.yaml").write_text(json.dumps(content))
    read_apart(folder / "models.yaml", folder / f"{engine} {time.time_ns()}", engine, 1)
    (row,) = pl.concat([pl.read_parquet(f) for f in sorted(folder.glob(f"{engine} */reads/*.parquet"))[-1:]]).to_dicts()
    assert row["status"] == "ok", row["error"]
    return row["num_tokens"] / row["forward_seconds"], row["depth"]


@needs_vllm
@pytest.mark.bench
@pytest.mark.benchmark(group="one read by vLLM and by torch, processes of their own; tokens/s are of the passes")
def test_vllm_beside_torch(benchmark, llama, tmp_path):
    of_torch, depth = tokens_per_second(llama, tmp_path, "torch")
    of_vllm, vllm_depth = benchmark.pedantic(tokens_per_second, args=(llama, tmp_path, "vllm"), rounds=1)
    assert vllm_depth == pytest.approx(depth, abs=1e-3), "not the same model"
    benchmark.extra_info |= {"torch tokens/s": of_torch, "vLLM tokens/s, hooks included": of_vllm}


def pass_seconds(rank, meeting, config, rounds, answers):
    """On one rank: best seconds of a forward pass over 4D tokens, bare and with every tap read."""
    import torch

    from deadbench.runners.engines.base import Blocks
    from deadbench.runners.engines.tensor_parallel import ParallelEngine
    from deadbench.runners.worker.group import join_group
    from deadbench.suite.architectures.build import build_config
    from deadbench.suite.architectures.parts import block_list
    from deadbench.suite.inputs.tokens import token_batches
    from deadbench.suite.reads.residual import ResidualRead

    torch.set_num_threads(1)
    group = join_group(rank, 2, meeting)
    built, D = build_config(config), config["hidden_size"]
    engine = ParallelEngine(torch.device("cpu"), ranks=group.ranks)
    model = engine.load_random(built, 0, torch.float32)
    final = engine.resolved.final.path
    norm, modules = model.get_submodule(final), list(model.get_submodule(block_list(model, final)[0]).children())
    inputs = token_batches("tokens:random", vocab_size=built.vocab_size, num_tokens=4 * D, sequence_length=256, seed=0,
                           tokenizer_folder=None, batch_tokens=1024)  # fmt: skip
    best, taps = {"bare": float("inf"), "read": float("inf")}, 0
    for _ in range(rounds):
        for how in best:
            stream = ResidualRead(D, inputs.num_tokens, "float32", "pre", "cpu", group.ranks)
            stream.wanted = range(len(modules) + 1)
            blocks = Blocks(modules, lambda tap, acts, batch, stream=stream: stream.update(tap, acts, batch.mask_ST))
            started = time.perf_counter()
            for _ in engine.passes(model, norm, inputs.batches, blocks if how == "read" else None):
                pass
            best[how] = min(best[how], time.perf_counter() - started)
            taps = max(taps, len(stream._taps))
    answers.put((rank, best, taps))


@pytest.mark.benchmark(group="random weights of a model that is held whole, drawn")
@pytest.mark.parametrize("how", ["as it is built", "by all cores"])
def test_random_weights(benchmark, llama, how):
    import torch

    from deadbench.runners.engines.random_weights import drawn_side_by_side
    from deadbench.suite.architectures.build import build_config, build_model

    config = build_config(llama)

    def as_built():
        torch.manual_seed(0)
        return build_model(config).to(torch.float32)

    def by_all_cores():
        return drawn_side_by_side(lambda: build_model(config), 0, torch.device("cpu"), torch.float32)

    model = benchmark.pedantic(as_built if how == "as it is built" else by_all_cores, rounds=3)
    assert sum(p.numel() for p in model.parameters() if not p.is_meta) == sum(
        p.numel() for p in as_built().parameters()
    )


@pytest.mark.bench  # at a small size it is test_two_ranks of the worker
@pytest.mark.benchmark(group="two ranks (gloo): forward pass with every tap read beside the bare pass")
def test_reads_on_two_ranks_beside_their_bare_forward(benchmark, llama):
    spawn = multiprocessing.get_context("spawn")

    def both_ranks():
        with socket.socket() as free:
            free.bind(("", 0))
            meeting = ("127.0.0.1", free.getsockname()[1])
        answers = spawn.Queue()
        rounds = 3 if benchmark.enabled else 1
        ranks = [spawn.Process(target=pass_seconds, args=(r, meeting, llama, rounds, answers)) for r in range(2)]
        for process in ranks:
            process.start()
        told = sorted((answers.get(timeout=500) for _ in ranks), key=lambda answer: answer[0])
        for process in ranks:
            process.join()
        return told

    told = benchmark.pedantic(both_ranks, rounds=1)
    blocks = llama["num_hidden_layers"]
    assert [taps for _, _, taps in told] == [-(-blocks // 2), blocks // 2], "the ranks divide the taps"
    bare, read = (max(best[how] for _, best, _ in told) for how in ("bare", "read"))
    benchmark.extra_info |= {"bare s": bare, "with reads s": read, "overhead": read / bare - 1}
