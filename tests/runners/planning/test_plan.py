"""The plan against arithmetic by hand, and its memory against what a read was measured to take."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from deadbench.runners.engines.registry import EngineSpec
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import Overrides, Unreached
from deadbench.runners.planning.assign import place_jobs
from deadbench.runners.planning.hardware import PROCESS_BYTES, PlanError, parse_cluster
from deadbench.runners.planning.needs import needs
from deadbench.runners.planning.plan import make_plan
from deadbench.runners.planning.sizes import measure
from deadbench.suite.architectures.build import build_config
from deadbench.suite.architectures.norms import FinalNorm, NormBehaviour
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT


def neox(D, L, heads, vocabulary):
    return {
        "model_type": "gpt_neox", "hidden_size": D, "intermediate_size": 4 * D, "num_hidden_layers": L,
        "num_attention_heads": heads, "vocab_size": vocabulary,
    }  # fmt: skip


COMMAND_R = {
    "model_type": "cohere", "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40,
    "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 256000,
}  # fmt: skip
MODELS = {
    "pythia-1.4b": {"config": neox(2048, 24, 16, 50304)},
    "pythia-6.9b": {"config": neox(4096, 32, 32, 50432)},
    "command-r": {"config": COMMAND_R, "dtype": "bfloat16"},
}


@pytest.fixture
def registry(tmp_path):
    models = [{"id": name, "input": "tokens:random"} | entry for name, entry in MODELS.items()]
    path = tmp_path / "models.yaml"
    path.write_text(json.dumps({"protocols": {"standard": {}}, "suites": {}, "models": models}))
    return path


def jobs_of(path, models=tuple(MODELS), **overrides):
    return build_jobs(load_registry(path), path, list(models), None, ["random"], Overrides(**overrides))


def test_sizes_are_those_counted_by_hand():
    size = measure(build_config(neox(64, 3, 4, 500)), 256)
    block = 12 * 64**2 + 13 * 64  # QKV, output, two of the MLP; their biases and two norms
    assert (size.largest_block, size.outside_blocks) == (block, 500 * 64 + 128)
    assert size.parameters == 3 * block + size.outside_blocks
    assert (size.num_taps, size.hidden_size) == (4, 64)
    assert size.divisors == {"num_attention_heads": 4, "intermediate_size": 256}
    need = needs(size, "random", 2, 640)
    assert (need.weights, need.resident_load) == (2 * size.parameters, 4 * size.parameters + 2 * 500 * 64)
    assert need.stream == 640 * 64 * 2
    # The MLP's inner activations and their GELU, of 4096 tokens, are all that is alive there beside the stream.
    assert 4 * 4096 * 64 * 9 <= size.activation_bytes <= 4 * 4096 * 64 * 20


@pytest.mark.parametrize(
    ("shape", "engines", "ranks"),
    [
        ("1x24GB", ["streaming", "streaming", "torch"], [1, 1, 1]),
        ("8x80GB", ["torch", "streaming", "torch"], [2, 1, 1]),
        ("2x8x141GB", ["torch", "torch", "torch"], [1, 1, 1]),
        ("8x24GB", ["torch", "torch", "torch"], [8, 2, 1]),
        ("0x24GB", ["streaming", "streaming", "streaming"], [1, 1, 1]),
    ],
)
def test_placements_on_assumed_clusters(registry, shape, engines, ranks):
    plan = make_plan(jobs_of(registry), parse_cluster(shape))
    assert [row.model for row in plan] == ["command-r", "pythia-6.9b", "pythia-1.4b"], "largest first"
    assert [row.engine for row in plan] == engines
    assert [row.tensor_parallel for row in plan] == ranks
    assert [row.problem for row in plan] == [None] * 3
    assert plan[0].weight_bytes == pytest.approx(70e9, rel=0.01)
    cluster = parse_cluster(shape).largest
    for row in plan:
        limit = cluster.gpu_bytes if cluster.gpus else cluster.host_bytes
        assert (row.peak_bytes if cluster.gpus else row.peak_host_bytes) <= limit
        assert row.tensor_parallel == 1 or 64 % row.tensor_parallel == 0


def test_taps_that_are_not_read_take_neither_memory_nor_passes(registry):
    overrides = {"engine": "torch", "accumulator_gb": 1.5}
    plans = {
        taps: make_plan(jobs_of(registry, ["pythia-6.9b"], taps=taps, **overrides), parse_cluster("1x80GB"))[0]
        for taps in ("all", "every:8", "none")
    }
    tap, decomposed = 16 * 4096**2, 40 * 4096**2
    assert [row.passes for row in plans.values()] == [17, 3, 1], "two taps a pass: of 33, of 0, 8, 16, 24, 32, of none"
    assert [row.accumulator_bytes for row in plans.values()] == [2 * tap + decomposed, 2 * tap + decomposed, decomposed]
    for cluster, peak, held in (("0x64GB", "peak_host_bytes", 2), ("1x64GB", "peak_bytes", 3)):
        every, none = (
            make_plan(jobs_of(registry, ["pythia-6.9b"], taps=taps, engine="streaming"), parse_cluster(cluster))[0]
            for taps in ("all", "none")
        )
        assert getattr(every, peak) - getattr(none, peak) == held * tap, "on a GPU one is decomposed beside the next"
        assert every.accumulator_bytes == held * tap + decomposed


def test_checkpoints_and_waiting_streams_are_counted_as_disk(registry):
    D, tokens = 4096, 8 * 4096
    tap, stream = 16 * D**2, 4 * tokens * D

    def planned(cluster, **overrides):
        (row,) = make_plan(jobs_of(registry, ["pythia-6.9b"], **overrides), parse_cluster(cluster))
        return row.disk_bytes

    assert planned("1x80GB", taps="none") == 2 * 2 * tap, "the final norm's, and again while it is replaced"
    assert planned("1x80GB", engine="torch", accumulator_gb=1.5) == 2 * 4 * tap
    assert planned("0x200GB", engine="streaming") == 2 * (4 * tap + stream)
    need = needs(measure(build_config(neox(64, 3, 4, 500)), 256), "random", 4, 640)
    assert need.swept(0.25 * need.stream) - need.swept(need.stream) == 0.75 * need.stream, "those that find no room"
    large = replace(need, block=1e9)
    assert large.streamed(ahead=True) - large.streamed() == 1e9
    assert planned("1x80GB", engine="vllm") is None


def test_a_small_model_takes_a_part_of_a_gpu_that_holds_it_whole(registry):
    jobs = jobs_of(registry, ["pythia-1.4b", "pythia-6.9b"])
    for shape, shares in (("8x40GB", [0.25, 1]), ("8x141GB", [0.125, 0.5])):
        cluster = parse_cluster(shape)
        rows = sorted(make_plan(jobs, cluster), key=lambda row: row.model)
        assert [row.gpus for row in rows] == shares
        for row in rows:
            assert row.passes == 1 or row.gpus == 1, "a share is not bought with another pass"
            assert row.peak_bytes <= row.gpus * cluster.largest.gpu_bytes
        assert [job.gpu_share for job in place_jobs(jobs, cluster)[0]] == shares
    assert [job.gpu_share for job in place_jobs(jobs, parse_cluster("0x500GB"))[0]] == [1, 1]


def test_what_cannot_fit_says_why_and_what_would(registry):
    (row,) = make_plan(jobs_of(registry, ["command-r"]), parse_cluster("1x6GB"))
    assert "4.2 GB outside the blocks, 1.6 GB a block" in row.problem
    (row,) = make_plan(jobs_of(registry, ["pythia-6.9b"], engine="streaming"), parse_cluster("1x2GB"))
    assert "--dtype bfloat16" in row.problem
    placed, problems = place_jobs(jobs_of(registry, ["command-r", "pythia-1.4b"]), parse_cluster("0x12GB"))
    assert placed[0].reads[0].error in problems[0]
    assert (placed[1].reads[0].engine, placed[1].reads[0].error) == ("streaming", None)


def test_a_functional_read_is_whole_on_one_device(registry):
    jobs = build_jobs(load_registry(registry), registry, ["pythia-1.4b"], None, ["functional"], Overrides())
    (row,) = make_plan(jobs, parse_cluster("8x80GB"))
    assert (row.engine, row.gpus, row.tensor_parallel, row.dtype, row.problem) == ("torch", 1, 1, "float64", None)
    (row,) = make_plan(jobs, parse_cluster("1x8GB"))
    assert "holds the whole model" in row.problem
    placed, problems = place_jobs(jobs, parse_cluster("0x8GB"))
    assert placed[0].reads[0].error in problems[0]


def one_row(path, model, shape, degree=None, **overrides):
    jobs = build_jobs(
        load_registry(path),
        path,
        [model],
        None,
        ["random"],
        Overrides(tensor_parallel=degree, **overrides),
        assumed=True,
    )
    (row,) = make_plan(jobs, parse_cluster(shape))
    return row


def test_a_degree_that_is_asked_for_is_taken_or_refused(registry):
    row = one_row(registry, "pythia-6.9b", "8x80GB", 4)
    assert (row.gpus, row.tensor_parallel, row.problem) == (4, 4, None)
    whole = one_row(registry, "pythia-6.9b", "8x80GB", 1, engine="torch")
    assert (whole.gpus, whole.tensor_parallel) == (1, 1)
    assert row.peak_bytes < whole.peak_bytes
    assert "the cluster has 2 GPUs" in one_row(registry, "pythia-6.9b", "2x80GB", 4).problem
    assert "each of 2 devices needs" in one_row(registry, "command-r", "2x24GB", 2).problem
    shared = one_row(registry, "pythia-1.4b", "0x24GB", 2)
    assert (shared.gpus, shared.tensor_parallel, shared.problem) == (0, 2, None), "two processes of one machine"
    # Asked not to divide it, the plan does not.
    assert one_row(registry, "command-r", "8x24GB", 1).engine == "streaming"
    assert one_row(registry, "command-r", "8x24GB", 1).tensor_parallel == 1


def test_vllm_is_planned_where_it_is_not_installed(registry, monkeypatch):
    monkeypatch.setattr("deadbench.runners.engines.registry.find_spec", lambda package: None)
    row = one_row(registry, "command-r", "8x80GB", engine="vllm")
    assert (row.engine, row.gpus, row.problem) == ("vllm", 2, None)
    assert "give" not in (row.note or "")
    assert "do not fit" in one_row(registry, "command-r", "1x24GB", engine="vllm").problem


def test_over_nodes_vllm_has_a_stage_on_each_unless_it_has_none_of_the_architecture(registry, monkeypatch):
    monkeypatch.setattr("deadbench.runners.engines.registry.find_spec", lambda package: None)
    row = one_row(registry, "command-r", "2x2x48GB", 4, engine="vllm")
    assert (row.engine, row.gpus, row.tensor_parallel, row.problem) == ("vllm", 4, 4, None)
    assert row.note.startswith("2 stages, each on a node whose 2 GPUs share its blocks: 2 divides 64 heads")
    assert one_row(registry, "command-r", "2x2x48GB", 3, engine="vllm").problem == (
        "--tensor-parallel 3: over several nodes each gives all of its 2 GPUs; give 2"
    )
    asked = []
    monkeypatch.setattr(
        EngineSpec, "why_not_over_nodes", lambda self, config: asked.append(config) or "on one node alone"
    )
    assert one_row(registry, "command-r", "2x2x48GB", 4, engine="vllm").problem == "on one node alone"
    assert asked[0]["model_type"] == "cohere"
    assert one_row(registry, "command-r", "4x80GB", 4, engine="vllm").problem is None
    assert len(asked) == 1, "one node needs no stages"


def test_without_transformers_plan_the_way_over_several_gpus_is_vllm(tmp_path):
    bloom = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 4096, "n_layer": 30,
             "n_head": 32, "vocab_size": 250880}  # fmt: skip
    models = [{"id": "bloom", "input": "tokens:random", "dtype": "float16", "config": bloom}]
    path = tmp_path / "models.yaml"
    path.write_text(json.dumps({"protocols": {"standard": {}}, "suites": {}, "models": models}))
    row = one_row(path, "bloom", "8x12GB")
    assert (row.engine, row.gpus) == ("streaming", 1)
    assert row.note.endswith("--engine vllm shares it over 2 GPUs")
    row = one_row(path, "bloom", "8x12GB", engine="vllm")
    assert (row.engine, row.gpus, row.problem) == ("vllm", 2, None)
    assert "no tensor-parallel plan" in one_row(path, "bloom", "8x12GB", 2).problem


# The text towers of the registry's two largest models look at values in their forward passes, which meta tensors lack.
# One period of their layers shows it; what the whole depth counts is also held by the registry's parameter counts.
@pytest.mark.slow
@pytest.mark.parametrize(
    "depth", [pytest.param("one period", id="one period"), pytest.param("whole", id="whole", marks=pytest.mark.full)]
)
@pytest.mark.parametrize(
    ("model", "period", "layers", "parameters", "divisors"),
    [
        ("gemma-4-31b", 6, 60, 31.3e9,
         {"num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 21504}),
        ("qwen3.5-35b-a3b", 4, 40, 34.6e9, {"num_attention_heads": 16, "num_key_value_heads": 2}),
    ],
    ids=["gemma-4-31b", "qwen3.5-35b-a3b"],
)  # fmt: skip
def test_the_largest_models_are_measured(model, period, layers, parameters, divisors, depth):
    config = load_registry(ROOT / "models.yaml").model(model).config
    assert config["text_config"]["num_hidden_layers"] == layers
    if depth != "whole":
        config = config | {"text_config": config["text_config"] | {"num_hidden_layers": period}}
    size = measure(build_config(config), 256)
    if depth == "whole":
        assert size.parameters == pytest.approx(parameters, rel=0.01)
    assert size.num_taps == 1 + (layers if depth == "whole" else period)
    assert {name: size.divisors.get(name) for name in divisors} == divisors
    assert size.activation_bytes < 4e9


@pytest.mark.slow
def test_every_model_of_the_paper_has_a_place_on_24_gb():
    path = ROOT / "models.yaml"
    jobs = build_jobs(load_registry(path), path, [], "paper", ["random"], Overrides(), assumed=True)
    plan = make_plan(jobs, parse_cluster("1x24GB"))
    assert len(plan) == 14
    assert [row.problem for row in plan] == [None] * 14
    assert all(row.peak_bytes <= 24e9 for row in plan)
    streamed = {row.model for row in plan if row.engine == "streaming"}
    assert streamed == {"c4ai-command-r-v01", "starcoder2-15b", "gemma-4-31b", "olmo-2-1124-7b"}


def test_what_cannot_be_reached_is_sized_by_the_registry(registry, deadbench):
    content = json.loads(registry.read_text())
    content["models"] = [{"id": "far", "source": "nobody/far", "input": "tokens:random", **MODELS["pythia-1.4b"]}]
    registry.write_text(json.dumps(content))
    arguments = ["plan", "far", "--registry", registry, "--reads", "parameters,trained", "--json"]
    code, out, _ = deadbench(*arguments, "--assume", "1x24GB")
    parameters, trained = json.loads(out)["reads"]
    assert (code, parameters["problem"], trained["problem"]) == (0, None, None)
    assert "cannot be reached from here" in parameters["note"]
    assert trained["note"] == "sized by the registry's configuration"
    assert trained["weight_bytes"] == pytest.approx(5.2e9, rel=0.02)
    code, out, _ = deadbench(*arguments)  # here it would fail
    assert code == 1
    assert all("not in the cache" in row["problem"] for row in json.loads(out)["reads"])


@pytest.mark.parametrize("error", ["the server is silent", Unreached("the server is silent")])
def test_what_could_not_be_opened_is_not_waited_for_once_more(registry, monkeypatch, error):
    job, cluster = jobs_of(registry, ["pythia-1.4b"])[0], parse_cluster("1x80GB")
    read = replace(job.reads[0], error=error, model=job.reads[0].model.model_copy(update={"config": None}))
    monkeypatch.setattr(type(read), "opened", lambda self, revision: pytest.fail("it is opened again"))
    (row,) = make_plan([replace(job, reads=(read,))], cluster)
    assert row.problem == "the server is silent"


def test_reads_that_are_there_already_are_said_to_be(registry, deadbench, tmp_path):
    jobs = build_jobs(load_registry(registry), registry, ["pythia-1.4b"], None, ["random"], Overrides())
    identity = jobs[0].reads[0].identity()
    (row,) = make_plan(jobs, parse_cluster("1x80GB"), {identity})
    assert (row.note, row.problem) == ("already there", None)
    code, out, _ = deadbench(
        "plan", "pythia-1.4b", "--registry", registry, "--reads", "random", "--assume", "1x80GB", "--json", "--out",
        tmp_path / "none",
    )  # fmt: skip
    assert (code, json.loads(out)["reads"][0]["note"]) == (0, None)
    assert not (tmp_path / "none").exists(), "a dry run makes no folder"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--engine", "vlm"], "--engine 'vlm' cannot be run by this version; choose auto, torch"),
        (["--dtype", "int8"], "--dtype 'int8' is unknown"),
        (["--tensor-parallel", "3"], "3 devices do not divide its 16 attention heads; choose one of 1, 2, 4, 8, 16"),
    ],
)
def test_plan_refuses_what_run_refuses(registry, deadbench, arguments, told):
    code, out, err = deadbench("plan", "pythia-1.4b", "--registry", registry, "--assume", "8x80GB", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert told in err


LARGE = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
         "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip


@pytest.mark.parametrize(
    ("come", "asked", "gpus", "note", "problem"),
    [
        (None, "16", 16, None, "--tensor-parallel 16: the cluster has 4 GPUs"),
        ("3x4x40GB", "16", 16, "4 stages, each on a node whose 4 GPUs share its blocks", None),
        ("2x4x40GB", "16", 16, None, "--tensor-parallel 16: the cluster has 12 GPUs, with those of nodes to come"),
        ("3x8x40GB", "16", 16, "2 stages, each on a node whose 8 GPUs", None),
        ("4x40GB", None, 8, "2 stages, each on a node whose 4 GPUs", None),
    ],
)  # fmt: skip
def test_a_model_is_planned_on_nodes_that_an_autoscaler_may_add(
    deadbench, tmp_path, monkeypatch, come, asked, gpus, note, problem
):
    for name, answer in (("missing", lambda spec: None), ("why_not", lambda spec, config: None),
                         ("why_not_over_nodes", lambda spec, config: None)):  # fmt: skip
        monkeypatch.setattr(EngineSpec, name, answer)
    path = tmp_path / "models.yaml"
    model = {"id": "m", "input": "tokens:random", "config": LARGE, "dtype": "bfloat16"}
    path.write_text(json.dumps({"protocols": {"standard": {}}, "suites": {}, "models": [model]}))
    given = ["--autoscale", come] if come else []
    given += ["--tensor-parallel", asked] if asked else []
    code, out, err = deadbench("plan", "m", "--registry", path, "--reads", "random", "--engine", "vllm",
                               "--assume", "4x40GB", *given, "--json")  # fmt: skip
    told = json.loads(out)
    (row,) = told["reads"]
    assert (code, row["gpus"], row["problem"]) == (int(problem is not None), gpus, problem), err
    if note:
        assert row["note"].startswith(note)
        assert row["note"].endswith("; when nodes have come")
        assert told["cluster"] == f"4x40GB, and {come} to come"


def test_plan_takes_the_arguments_of_run(deadbench, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no name is cut
    _, run, _ = deadbench("run", "--help")
    _, planned, _ = deadbench("plan", "--help")
    flags = {word.strip(",|│ ") for word in run.split() if word.startswith("--")}
    ours = {"--timeout", "--max-retries", "--checkpoint-interval", "--log-format"}
    assert flags - ours <= {word.strip(",|│ ") for word in planned.split()}


@pytest.mark.parametrize(
    "shape",
    [
        "8",
        "8x80",
        "x8x80GB",
        "0x8x80GB",
        "8x0GB",
        "-1x80GB",
        "1000000x8x80GB",
        f"8x{'9' * 400}GB",
        f"{'9' * 5000}x80GB",
    ],
)
def test_a_cluster_that_is_none(shape):
    with pytest.raises(PlanError, match="--assume"):
        parse_cluster(shape)


MEASURED = """
import json, sys, transformers, warnings
from pathlib import Path
from deadbench.runners.jobs.job import Overrides, Unreached
from deadbench.runners.engines.registry import EngineSpec
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import peak_host_bytes
from deadbench.runners.planning.plan import place
from deadbench.runners.planning.hardware import this_machine
from deadbench.runners.jobs.events import Finished
from deadbench.runners.worker.run import run_model
from deadbench.suite.registry.loading import load_registry
from tests.runners.planning.test_plan import neox
from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.locate import find_final_norm
import deadbench.runners.worker.forward, torch
path = Path(sys.argv[1])
overrides = Overrides(tokens=1100, engine=sys.argv[2])
(job,) = build_jobs(load_registry(path), path, ["m"], None, ["random"], overrides)
planned = place(job.reads[0], this_machine())
find_final_norm(build_model(build_config(neox(64, 1, 4, 99)))); torch.linalg.eigh(torch.eye(600, dtype=torch.float64))
overhead = peak_host_bytes()
*_, last = run_model(job, "run", 1)
assert last.row["status"] == "ok", last.row["error"]
print(json.dumps([planned.engine, planned.peak_host_bytes, overhead, last.row["peak_host_bytes"]]))
"""


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("config", "engine"),
    [
        pytest.param(neox(512, 12, 8, 120_000), "torch", id="0.4 GB"),
        pytest.param(neox(512, 24, 8, 100_000), "streaming", id="0.6 GB streamed"),
        pytest.param(neox(1024, 12, 16, 100_000), "torch", id="1 GB", marks=pytest.mark.full),
        pytest.param(neox(1024, 24, 16, 50_000), "streaming", id="1.4 GB streamed", marks=pytest.mark.full),
    ],
)
def test_planned_memory_is_within_15_percent_of_the_measured_peak(config, engine, tmp_path):
    model = {"id": "m", "input": "tokens:random", "config": config, "dtype": "float32"}
    (tmp_path / "models.yaml").write_text(json.dumps({"protocols": {"standard": {}}, "suites": {}, "models": [model]}))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURED, str(tmp_path / "models.yaml"), engine],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    planned_engine, planned, overhead, peak = json.loads(run.stdout.splitlines()[-1])
    assert planned_engine == engine
    assert planned - PROCESS_BYTES == pytest.approx(peak - overhead, rel=0.15)
    assert planned == pytest.approx(peak, rel=0.15)


def test_a_norm_of_what_is_pooled_is_named_where_nothing_can_be_planned(monkeypatch):
    pooled = FinalNorm("fc_norm", NormBehaviour("layernorm"), "pre", 32, 2, 1, "fc_norm normalises what is pooled")
    none = FinalNorm(None, NormBehaviour("none"), None, None, 2, reason="it ends in a map", pooled=pooled)
    monkeypatch.setattr("deadbench.runners.planning.sizes.locate_final_norm", lambda config, part: none)
    config = build_config({"model_type": "gpt2", "vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4})
    with pytest.raises(ValueError, match="^fc_norm normalises what is pooled$"):
        measure(config, 8)
