"""What the spectra cost: beside the bare forward pass, beside storing everything, per token, and to finish.

`make bench` times them; `make test` runs small ones once, for what they assert.
"""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from deadbench.runners.engines.base import BATCH_TOKENS, Blocks
from deadbench.runners.engines.resident import TorchEngine
from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.kernel_test import live_norm
from deadbench.suite.architectures.locate import find_final_norm
from deadbench.suite.inputs.tokens import token_batches
from deadbench.suite.reads.final_norm import FinalNormRead
from deadbench.suite.reads.residual import ResidualRead
from deadbench.suite.spectra.covariance import CovarianceFactor
from deadbench.suite.spectra.solvers import add_gram, spaced_rows

SMALL_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 500}


def decaying(num_rows: int, hidden_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of a trained model's kind: singular values over five decades, correlated coordinates, a mean."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(hidden_size, hidden_size, generator=generator)).Q
    rows = torch.randn(num_rows, hidden_size, generator=generator) * torch.logspace(0, -5, hidden_size)
    return (rows @ mixing + 3).to(dtype)


@pytest.fixture(scope="module")
def gpt2(sized):
    """GPT-2 124M at random initialisation, its final norm, and 16 k tokens."""
    torch.manual_seed(0)
    config = build_config({"model_type": "gpt2"} | sized({}, SMALL_GPT2))
    model = build_model(config)
    final = find_final_norm(model)
    norm = model.get_submodule(final.path)
    inputs = token_batches(
        "tokens:random",
        vocab_size=config.vocab_size,
        num_tokens=sized(16_384, 1024),
        sequence_length=512,
        seed=0,
        tokenizer_folder=None,
        batch_tokens=BATCH_TOKENS,
    )
    return model, norm, live_norm(norm, final.behaviour, config.hidden_size), inputs


@pytest.mark.benchmark(group="GPT-2 124M, 16 k tokens, float32: forward pass with")
@pytest.mark.parametrize("reads", ["nothing", "final norm", "all blocks"])
def test_beside_the_bare_forward_pass(benchmark, gpt2, reads):
    model, norm, formula, inputs = gpt2
    batches, taps_of_all = inputs.batches, len(model.h) + 1
    engine = TorchEngine(torch.device("cpu"))

    def bare():
        with torch.no_grad():
            for batch in batches:
                model(**batch.model_inputs, use_cache=False)

    def read():
        final = FinalNormRead(norm, formula)
        stream = ResidualRead(model.config.hidden_size, inputs.num_tokens, "float32", "pre")
        stream.wanted = range(taps_of_all)
        taps = Blocks(list(model.h), lambda tap, acts, batch: stream.update(tap, acts, batch.mask_ST))
        spent = 0.0
        for batch, traffic in engine.passes(model, norm, batches, taps if reads == "all blocks" else None):
            started = time.perf_counter()
            final.update(traffic.input_BTD, traffic.output_BTD, batch.mask_ST)
            if reads == "all blocks":
                stream.update(traffic.num_block_calls, traffic.input_BTD, batch.mask_ST)
            spent += time.perf_counter() - started + traffic.seconds()[1]
        started = time.perf_counter()
        row, _ = final.finish()
        stream.end_pass()
        benchmark.extra_info["read_seconds"] = spent + time.perf_counter() - started
        return row, stream.finish()[1]

    bare()
    result = benchmark.pedantic(bare if reads == "nothing" else read, rounds=3)
    if result is not None:
        assert result[0]["num_tokens"] == inputs.num_tokens
        assert len(result[1]) == (taps_of_all if reads == "all blocks" else 0)


@pytest.mark.benchmark(group="spectrum of 16 k outputs of a LayerNorm, D = 768")
@pytest.mark.parametrize("route", ["streamed", "float64 SVD of all rows"])
def test_beside_the_direct_route(benchmark, sized, route):
    N, D = sized((16_384, 768), (1024, 64))
    stream = torch.randn(N, D) * torch.logspace(0, -2, D)
    rows = torch.nn.functional.layer_norm(stream, (D,), 0.5 + torch.rand(D))

    def streamed():
        accumulator = CovarianceFactor(D)
        for part in rows.split(BATCH_TOKENS):
            accumulator.update(part)
        return accumulator.finish().eigenvalues_D

    def direct():
        stored = torch.cat(list(rows.split(BATCH_TOKENS))).double()
        _, sigma, _ = torch.linalg.svd(stored - stored.mean(0), full_matrices=False)
        return (sigma.square() / len(stored)).numpy()

    eigenvalues = benchmark.pedantic(streamed if route == "streamed" else direct, rounds=3, warmup_rounds=1)
    assert eigenvalues[0] / eigenvalues[-1] > 1e9


MEMORY = """
import sys, torch
from deadbench.runners.jobs.events import peak_host_bytes
from deadbench.suite.spectra.covariance import CovarianceFactor
torch.linalg.svd(torch.randn(64, 64, dtype=torch.float64))
before, D = peak_host_bytes(), int(sys.argv[2])
batches = (torch.randn(4096, D, generator=torch.Generator().manual_seed(k)) for k in range(16))
if sys.argv[1] == "streamed":
    accumulator = CovarianceFactor(D)
    for batch in batches:
        accumulator.update(batch)
    print(accumulator.finish().eigenvalues_D[-1], end=" ")
else:
    stored = torch.cat(list(batches)).double()
    stored -= stored.mean(0)
    _, sigma, _ = torch.linalg.svd(stored, full_matrices=False)
    print(float(sigma[-1]) ** 2 / len(stored), end=" ")
print(peak_host_bytes() - before)
"""


@pytest.mark.subprocess
@pytest.mark.benchmark(group="64 k rows, D = 768: time, and peak memory in extra_info")
@pytest.mark.parametrize("route", ["streamed", "float64 SVD of all rows"])
def test_peak_memory(benchmark, sized, route):
    D = sized(768, 256)

    def measure():
        command = [sys.executable, "-c", MEMORY, route, str(D)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    smallest, peak = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["peak_bytes"] = int(peak)
    assert float(smallest) == pytest.approx((1 - (D / 65_536) ** 0.5) ** 2, rel=0.02)
    if route == "streamed":
        assert int(peak) < 65_536 * D * 4, "less than the rows themselves in float32"


@pytest.mark.benchmark(group="rows after the first: seconds of 4096, and extra_info")
@pytest.mark.parametrize("method", ["gram", "whitened-gram"])
@pytest.mark.parametrize("hidden_size", [768, 2048, 4096])
def test_cost_of_a_token(benchmark, sized, hidden_size, method):
    """Also as a share of the machine's float64 GEMM: cost / (2 D^2 flop / rate)."""
    hidden_size = sized(hidden_size, hidden_size // 16)
    rows = torch.randn(2 * hidden_size, hidden_size) if method == "gram" else decaying(2 * hidden_size, hidden_size)
    accumulator = CovarianceFactor(hidden_size)
    accumulator.update(rows)
    batch = rows[:4096]
    accumulator.update(batch)  # whitening is prepared once
    benchmark.pedantic(accumulator.update, args=(batch,), rounds=5)
    assert accumulator.method == method
    wide = batch.double()
    started = time.perf_counter()
    _ = wide.T @ wide
    gemm = time.perf_counter() - started
    if benchmark.stats is not None:
        benchmark.extra_info["us_per_token"] = 1e6 * benchmark.stats.stats.median / len(batch)
        benchmark.extra_info["in_gemms_of_2D2"] = benchmark.stats.stats.median / gemm


@pytest.mark.benchmark(group="Gram matrix of 1024 rows, D = 1024, float64")
@pytest.mark.parametrize("lie", ["one behind the other", "a line of the cache apart"])
def test_rows_apart(benchmark, sized, lie):
    D = sized(1024, 64)
    rows, upper = torch.randn(1024, D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
    if lie == "a line of the cache apart":
        rows = spaced_rows(rows.shape, rows.device).copy_(rows)
        assert rows.stride(0) > D
    benchmark.pedantic(add_gram, args=(upper, rows), rounds=20, warmup_rounds=2)
    assert bool(upper.diagonal().all())


@pytest.mark.benchmark(group="cost does not grow with the rows seen: 2048 more rows, D = 768")
@pytest.mark.parametrize("seen", [4_096, 65_536])
def test_cost_is_flat(benchmark, sized, seen):
    D = sized(768, 32)
    rows = decaying(4096, D)
    accumulator = CovarianceFactor(D)
    for _ in range(seen // 4096):
        accumulator.update(rows)
    benchmark.pedantic(accumulator.update, args=(rows[:2048],), rounds=5)
    assert accumulator.num_rows >= seen + 2048


@pytest.fixture(scope="module")
def full_4096(sized):
    D = sized(4096, 128)
    accumulator = CovarianceFactor(D)
    accumulator.update(decaying(2 * D, D))
    accumulator.merge(CovarianceFactor(D))  # settled: what is timed is the decomposition
    return accumulator


@pytest.mark.benchmark(group="finish, D = 4096")
@pytest.mark.parametrize("wanted", ["spectrum, directions, counts", "bottom direction alone"])
def test_finish(benchmark, full_4096, wanted):
    if wanted == "bottom direction alone":
        smallest, bottom_D = benchmark.pedantic(full_4096.bottom, rounds=1)
        assert np.linalg.norm(bottom_D) == pytest.approx(1)
        assert smallest > 0
    else:
        spectrum = benchmark.pedantic(full_4096.finish, rounds=1)
        assert spectrum.num_dead(1e-4) > 0
        assert spectrum.eigenvalues_D[-1] == pytest.approx(full_4096.bottom()[0], rel=1e-6)
