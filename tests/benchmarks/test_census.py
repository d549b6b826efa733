"""The census: sources a second against a local server, beside one process of as many threads without Ray.

`make bench` takes 2 000 sources; `make test` a few, for what it asserts. Ray's own start is not counted.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from deadbench.runners.census.census import new_outcome, take_census
from deadbench.runners.census.worker import census_row
from deadbench.runners.results.store import ResultStore
from deadbench.suite.checkpoints.sources import locate
from tests.runners.many_checkpoints import serving, sparse_checkpoint

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*", "ignore:.use_:DeprecationWarning"),
]
NEOX = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 768, "vocab_size": 50304,
        "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}  # fmt: skip
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "vocab_size": 32000,
         "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 4096,
         "rms_norm_eps": 1e-6}  # fmt: skip
THREADS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Two published shapes, headers and all; the weights are holes in files."""
    root = tmp_path_factory.mktemp("census")
    final = "gpt_neox.final_layer_norm"
    sparse_checkpoint(root / "neox", NEOX, f"{final}.weight", f"{final}.bias", blocks=12)
    sparse_checkpoint(root / "llama", LLAMA, "model.norm.weight", None, blocks=16)
    with serving(root) as url:
        yield url


@pytest.mark.bench  # of few sources it is test_census
@pytest.mark.benchmark(group="census of checkpoints behind HTTP")
@pytest.mark.parametrize("how", ["census", "threads alone"])
def test_sources_a_second(benchmark, ray_session, server, tmp_path, how):
    count = 2000 if benchmark.enabled else 40
    sources = [f"{server}/{kind}-{i}" for i in range(count // 2) for kind in ("neox", "llama")]

    def census():
        outcome = new_outcome(count, 0)
        for _ in take_census(sources, ResultStore(str(tmp_path / json.dumps(outcome.run_id))), outcome, THREADS):
            pass
        return outcome.ok

    def threads_alone():
        with ThreadPoolExecutor(THREADS) as pool:
            rows = list(pool.map(lambda source: census_row(source, locate(source), "run"), sources))
        return sum(row["status"] == "ok" for row in rows)

    measured = census if how == "census" else threads_alone
    assert benchmark.pedantic(measured, rounds=1) == count
    if benchmark.enabled:
        benchmark.extra_info["sources a second"] = count / benchmark.stats.stats.mean
