"""Block streaming beside the resident model: seconds of one read's passes, and the peak memory of a process of each.

`make bench` times a 0.8 GB model; `make test` runs a small one once and in its own process, for what it asserts.
"""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

SMALL = {"hidden_size": 256, "num_hidden_layers": 24, "vocab_size": 1000}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 16, "vocab_size": 8192}


def one_pass(engine, shape):
    """(seconds, bytes above those before, sum of the squares of what the norm puts out), in this process."""
    import torch

    from deadbench.runners.engines.base import Swept
    from deadbench.runners.engines.registry import make_engine
    from deadbench.runners.jobs.events import peak_host_bytes
    from deadbench.suite.architectures.build import build_config, build_model
    from deadbench.suite.architectures.locate import find_final_norm, locate_final_norm
    from deadbench.suite.inputs.tokens import token_batches

    D = shape["hidden_size"]
    raw = {"model_type": "gpt_neox", "intermediate_size": 4 * D, "num_attention_heads": D // 64} | shape
    made, config = make_engine(engine), build_config(raw)
    tiny = build_config(raw | {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1})
    find_final_norm(build_model(tiny))
    final = locate_final_norm(config).path
    before = peak_host_bytes()
    batches = token_batches(
        "tokens:random", vocab_size=config.vocab_size, num_tokens=2 * D, sequence_length=256, seed=0,
        tokenizer_folder=None, batch_tokens=256,
    ).batches  # fmt: skip
    started = time.perf_counter()
    model = made.load_random(config, 0, torch.float32)
    norm = model.get_submodule(final)
    steps = (step for step in made.passes(model, norm, batches) if not isinstance(step, Swept))
    total = sum(float(traffic.output_BTD.double().square().sum()) for _, traffic in steps)
    return time.perf_counter() - started, peak_host_bytes() - before, total


def one_pass_apart(engine, shape):
    """`one_pass` in a process of its own, whose peak memory is that of this pass."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.test_streaming", engine, json.dumps(shape)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.benchmark(group="random init and one pass over 2D tokens, GPT-NeoX of 0.8 GB, process of its own")
@pytest.mark.parametrize("engine", ["torch", "streaming"])
def test_block_streaming_beside_resident(benchmark, sized, engine):
    shape, run, rounds = sized((LARGE, one_pass_apart, 3), (SMALL, one_pass, 1))
    seconds, peak, total = benchmark.pedantic(run, args=(engine, shape), rounds=rounds)
    resident_seconds, resident_peak, resident_total = run("torch", shape)
    assert total == resident_total, "not the same model"
    if benchmark.enabled:
        benchmark.extra_info |= {
            "seconds of resident": seconds / resident_seconds,
            "peak GB above an idle process": peak / 1e9,
            "peak of resident": peak / resident_peak,
        }
    if benchmark.enabled and engine == "streaming":
        assert peak <= resident_peak / 4


def sweep_and_bare_loop(shape, dtype):
    """(seconds of a sweep over streamed blocks, of the same blocks called one after the other), by one process's CPUs.

    CPU seconds: what else the machine does counts little. The taps are not read.
    """

    from deadbench.runners.engines.registry import make_engine
    from deadbench.suite.architectures.build import build_config
    from deadbench.suite.inputs.tokens import token_batches

    D = shape["hidden_size"]
    config = build_config(
        {"model_type": "gpt_neox", "intermediate_size": 4 * D, "num_attention_heads": D // 64} | shape
    )
    batches = token_batches(
        "tokens:random", vocab_size=config.vocab_size, num_tokens=2 * D, sequence_length=256, seed=0,
        tokenizer_folder=None, batch_tokens=1024,
    ).batches  # fmt: skip
    seconds = []
    for engine in ("streaming", "torch"):
        made = make_engine(engine)
        model = made.load_random(config, 0, dtype)
        started = time.process_time()
        for _ in made.passes(model, model.final_layer_norm, batches):
            pass
        seconds.append(time.process_time() - started)
    return seconds


@pytest.mark.bench
@pytest.mark.benchmark(group="one sweep over 2D tokens by streamed random blocks beside a bare loop, GPT-NeoX")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sweep_beside_a_bare_loop(benchmark, sized, dtype):
    import torch

    shape, rounds = sized(({"hidden_size": 2048, "num_hidden_layers": 4, "vocab_size": 2048}, 3), (SMALL, 1))
    found = []
    benchmark.pedantic(lambda: found.append(sweep_and_bare_loop(shape, getattr(torch, dtype))), rounds=rounds)
    sweep, bare = (min(each) for each in zip(*found, strict=True))
    benchmark.extra_info |= {"CPU seconds of the sweep, of the loop's": sweep / bare}


if __name__ == "__main__":
    print(json.dumps(one_pass(sys.argv[1], json.loads(sys.argv[2]))))
