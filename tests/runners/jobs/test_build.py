"""From names and flags to jobs; the key changes exactly when the numbers would."""

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from deadbench.runners.jobs import job as jobs_module
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import JobError, Overrides, read_step
from deadbench.runners.jobs.opening import unreachable
from deadbench.suite.errors import CheckpointError
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, TINY_NEOX, save_tiny
from tests.runners.many_checkpoints import serving

PATH = ROOT / "models.yaml"
REGISTRY = load_registry(PATH)


def jobs(models=(), suite=None, reads=None, **overrides):
    return build_jobs(REGISTRY, PATH, list(models), suite, reads, Overrides(**overrides))


def only(models, read="random", **overrides):
    (job,) = jobs(models, reads=[read], **overrides)
    return job.reads[0]


def test_the_quick_suite_reads_what_its_entries_say():
    by_model = {job.model_id: job for job in jobs()}
    assert {read.read for read in by_model["gpt2"].reads} == {"random"}
    twin = by_model["twin-layernorm"].reads
    assert [r.read for r in twin].count("random") == 1
    assert [r.revision for r in twin if r.read == "trained"] == [f"step{s}" for s in (0, 16, 128, 512, 2048, 4096)]
    assert {r.protocol.tokens for r in twin} == {"4D"}
    assert by_model["gpt2"].reads[0].input == "tokens:random"


def test_models_named_without_a_suite_run_under_the_standard_protocol():
    assert only(["gpt2"]).protocol_name == "standard"
    (job,) = jobs(["gpt2"], suite="quick")
    assert (job.reads[0].protocol_name, job.reads[0].input) == ("quick", "tokens:random")


@pytest.mark.parametrize(
    "changed",
    [{"tokens": 999}, {"dtype": "bfloat16"}, {"input": "tokens:random"}, {"taps": "none"}, {"seed": 1}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_numbers_changes_the_identity(changed):
    plain, other = only(["twin-layernorm"]), only(["twin-layernorm"], **changed)
    assert plain.identity() != other.identity()
    assert plain.identity() == only(["twin-layernorm"]).identity()
    if "seed" not in changed:
        assert other.protocol_name == f"standard[{next(iter(changed))}={next(iter(changed.values()))}]"


def test_taps_are_part_of_a_read_of_the_stream_alone():
    """All of them, however that is said, is the read that it always was."""
    plain = only(["twin-layernorm"])
    for same in ("all", "every:1"):
        assert only(["twin-layernorm"], taps=same).identity() == plain.identity()
    assert only(["twin-layernorm"], taps="all").protocol_name == "standard"
    hashes = {only(["twin-layernorm"], taps=taps).protocol_hash for taps in ("none", "every:2", "every:3", "all")}
    assert len(hashes) == 4
    assert only(["twin-layernorm"], taps="every:2").protocol.tap_stride == 2
    for read in ("parameters", "functional"):
        one, other = (only(["twin-layernorm"], read, taps=taps) for taps in (None, "none"))
        assert one.identity() == other.identity()


def test_an_input_file_counts_by_content(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "b.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "c.npy", np.ones((2, 2), int))
    a, b, c = (only(["gpt2"], input=f"tokens:{tmp_path / name}.npy").protocol_hash for name in "abc")
    assert a == b != c


def test_the_input_of_a_suites_entry_given_by_flag_is_the_same_protocol(tmp_path):
    """By content: under another path, and without naming the suite; another file is another protocol."""
    np.save(tmp_path / "ids.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "copy.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "other.npy", np.ones((2, 2), int))
    entry = f"tokens:{tmp_path / 'ids.npy'}"
    path = tmp_path / "models.yaml"
    path.write_text(
        "protocols: {standard: {tokens: 8D, sequence_length: 32}, other: {tokens: 8D, sequence_length: 16}}\n"
        f"suites: {{mine: {{protocol: standard, models: [{{model: gpt2, input: '{entry}'}}]}}}}\n"
        "models:\n  - {id: gpt2, source: openai-community/gpt2, config: {model_type: gpt2}}\n"
    )

    def built(models=(), suite=None, **overrides):
        (job,) = build_jobs(load_registry(path), path, list(models), suite, ["random"], Overrides(**overrides))
        return job.reads[0].protocol_name, job.reads[0].identity()

    by_entry = built(suite="mine")
    assert by_entry[0] == "standard"
    for spec in (entry, f"tokens:{tmp_path / 'copy.npy'}"):
        assert built(["gpt2"], input=spec) == built(suite="mine", input=spec) == by_entry
    other = f"tokens:{tmp_path / 'other.npy'}"
    assert built(["gpt2"], input=other)[0] == f"standard[input={other}]"
    assert built(["gpt2"], input="text") == built(["gpt2"]), "as is what it reads anyway"
    assert built(["gpt2"], input=entry, tokens=99)[0] == "standard[tokens=99]"


def test_a_parameters_read_does_not_depend_on_the_input():
    plain = only(["twin-layernorm"], "parameters")
    other = only(["twin-layernorm"], "parameters", tokens=999, input="tokens:random")
    assert (plain.identity(), plain.engine, plain.input) == (other.identity(), None, None)


def test_a_changed_checkpoint_is_another_read(tmp_path):
    folder = save_tiny(tmp_path / "m")
    before = only([str(folder)], "trained", input="tokens:random").identity()
    save_tiny(folder, seed=1)
    assert only([str(folder)], "trained", input="tokens:random").identity() != before


def test_finished_reads_leave_the_job():
    (job,) = jobs(["twin-rmsnorm"])
    rest = job.without([r.identity() for r in job.reads[:5]])
    assert rest.reads == job.reads[5:]


def test_a_missing_checkpoint_fails_as_a_row_of_its_own(tmp_path):
    content = "protocols: {standard: {}}\nsuites: {}\nmodels: [{id: m, source: series, checkpoints: [step1, step2]}]\n"
    (tmp_path / "models.yaml").write_text(content)
    save_tiny(tmp_path / "series" / "step1")
    path = tmp_path / "models.yaml"
    (job,) = build_jobs(load_registry(path), path, ["m"], None, ["trained"], Overrides(input="tokens:random"))
    assert [r.error is None for r in job.reads] == [True, False]
    assert "the checkpoints are step1" in job.reads[1].error


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"suite": "nope"}, "suite 'nope' is unknown; choose quick"),
        ({"models": ["gpt2"], "reads": ["rando"]}, "read 'rando' is unknown; choose parameters, random, trained"),
        ({"models": ["/no/such"]}, "no such directory"),
        ({"models": ["gpt2"], "input": "nope"}, "gpt2: input 'nope' is unknown"),
        ({"models": ["gpt2"], "input": "image"}, "gpt2: input 'image' does not fit"),
        ({"models": ["vit-base-patch16-224"], "input": "text"}, "does not fit a model that reads image"),
    ],
)
def test_requests_that_cannot_be_met(kwargs, message):
    with pytest.raises(JobError, match=message):
        jobs(**kwargs)


def test_a_series_beside_a_revision_is_read_where_it_is_asked_for(tmp_path):
    for step in (10, 2, 4):
        save_tiny(tmp_path / "run" / f"step{step}")
    path = tmp_path / "models.yaml"
    suites = "{all: {protocol: standard, checkpoints: true, models: [m]}, one: {protocol: standard, models: [m]}}"
    model = "{id: m, source: run, revision: step4, checkpoints: {listed: 'NAME{step}'}}"
    text = f"protocols: {{standard: {{}}}}\nsuites: {suites}\nmodels: [{model}]\n"

    def read(name="step", **how):
        path.write_text(text.replace("NAME", name))
        models, suite = (["m"], None) if "suite" not in how else ([], how.pop("suite"))
        (job,) = build_jobs(load_registry(path), path, models, suite, ["parameters"], Overrides(), **how)
        return [(r.revision, r.error) for r in job.reads]

    assert read() == read(suite="one") == [("step4", None)]
    assert read(suite="all") == read(every_checkpoint=True) == [(f"step{s}", None) for s in (2, 4, 10)]
    assert read("ckpt", suite="all") == [("step4", "run: no checkpoint matches 'ckpt{step}'")]


def registry_of(tmp_path, models):
    path = tmp_path / "models.yaml"
    path.write_text(
        f"protocols: {{standard: {{}}}}\nsuites: {{all: {{protocol: standard, models: [{', '.join(models)}]}}}}\n"
    )
    with path.open("a") as file:
        file.write(
            "models:\n" + "".join(f"  - {{id: {name}, source: '{source}'}}\n" for name, source in models.items())
        )
    return load_registry(path), path


@pytest.mark.subprocess
def test_gated_and_missing_models_are_told_before_anything_runs(tmp_path, monkeypatch, deadbench):
    """A gated repository lists everything, so that only reading a file tells."""
    save_tiny(tmp_path / "kinds" / "open")
    shutil.copytree(tmp_path / "kinds" / "open", tmp_path / "kinds" / "gated")
    with serving(tmp_path / "kinds") as url:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        models = {"open": "org/open-1", "gated": "org/gated-1", "missing": "org/none-1"}
        registry, path = registry_of(tmp_path, models)
        built = build_jobs(registry, path, [], "all", ["parameters", "trained"], Overrides(input="tokens:random"))
        code, printed, _ = deadbench("plan", "--registry", path, "--suite", "all", "--reads", "parameters")
    told = unreachable(built)
    assert [line.partition(":")[0] for line in told] == ["gated", "missing"]
    assert "gated or private (401): accept its licence" in told[0]
    assert "no such repository" in told[1]
    assert [read.error is None for job in built for read in job.reads] == [True, True, False, False, False, False]
    assert code == 1
    assert "cannot run" in printed


def test_models_are_opened_side_by_side(tmp_path, monkeypatch):
    """One after another the first would wait for the others for ever."""
    together = threading.Barrier(4, timeout=20)

    class Slow:
        def __init__(self, source, *_, **__):
            self.source = source

        def config(self):
            together.wait()
            raise CheckpointError(f"{self.source}: seen")

    monkeypatch.setattr(jobs_module, "open_checkpoint", Slow)
    registry, path = registry_of(tmp_path, {name: f"org/{name}" for name in "abcd"})
    built = build_jobs(registry, path, [], "all", ["parameters"], Overrides())
    assert unreachable(built) == [f"{name}: org/{name}: seen" for name in "abcd"]


@pytest.mark.subprocess
def test_a_source_with_a_password_is_named_without_it(tmp_path, monkeypatch):
    save_tiny(tmp_path / "m" / "neox")
    with serving(tmp_path / "m") as url:
        source = url.replace("://", "://me:hunter2@") + "/neox-1?sig=abcdef"
        (job,) = jobs([source], reads=["parameters"])
        from deadbench.runners.worker.run import run_model

        *_, finished = run_model(job, "run", 1)
    assert finished.row["status"] == "ok"
    stored = [str(value) for table in finished.tables.values() for row in table.to_pylist() for value in row.values()]
    assert [value for value in stored if "hunter2" in value or "abcdef" in value] == []
    assert finished.row["model"] == finished.row["source"] == f"{url}/neox-1"


@pytest.mark.subprocess
def test_jobs_are_made_without_torch_and_transformers():
    code = """import sys, deadbench.runners.jobs.build
print([name for name in ("torch", "transformers", "ray") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_vllm_gives_each_gpu_a_copy_of_kv_heads_that_are_too_few_and_ranks_do_not(tmp_path):
    config = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
    config = TINY_NEOX | config | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    folder = save_tiny(tmp_path / "m", config)

    def asked(engine):
        overrides = Overrides(input="tokens:random", tensor_parallel=8, engine=engine)
        return build_jobs(REGISTRY, PATH, [str(folder)], None, ["random"], overrides, assumed=True)

    assert asked("vllm")[0].tensor_parallel == 8
    with pytest.raises(JobError, match="8 devices do not divide its 2 key/value heads; choose one of 1, 2"):
        asked("torch")


@pytest.mark.parametrize("engine", ["streaming", "vllm"])
def test_a_functional_read_is_of_the_engine_that_runs_it(engine, tmp_path):
    """And the plan says the same, and what a run has stored is not run again."""
    from deadbench.runners.jobs.events import Finished
    from deadbench.runners.planning.assign import place_jobs
    from deadbench.runners.planning.hardware import parse_cluster
    from deadbench.runners.planning.plan import make_plan
    from deadbench.runners.results.store import ResultStore
    from deadbench.runners.worker.run import run_model

    folder = save_tiny(tmp_path / "m")

    def asked():
        overrides = Overrides(input="tokens:random", tokens=32, engine=engine)
        return build_jobs(REGISTRY, PATH, [str(folder)], None, ["random", "functional"], overrides, assumed=True)

    assert [(read.read, read.engine) for read in asked()[0].reads] == [("random", engine), ("functional", "torch")]
    assert asked()[0].engine == engine
    cluster = parse_cluster("1x16GB")
    placed, problems = place_jobs(asked(), cluster)
    functional = placed[0].reads[1]
    assert (functional.engine, problems) == ("torch", [])
    assert [row.engine for row in make_plan(asked(), cluster)] == [engine, "torch"]

    store = ResultStore(str(tmp_path / "results"))
    (event,) = (e for e in run_model(placed[0].without([placed[0].reads[0].identity()]), "run", 1)
                if isinstance(e, Finished))  # fmt: skip
    assert (event.row["status"], event.row["engine"]) == ("ok", "torch")
    store.write(event.tables)
    assert [read.read for read in asked()[0].without(store.finished()).reads] == ["random"]
    assert [row.note for row in make_plan(asked(), cluster, store.finished())][1] == "already there"


def _read(checkpoints=None, source="series", revision=None, read="trained", base=ROOT):
    entry = REGISTRY.model("twin-layernorm").model_dump() | {"source": source, "checkpoints": checkpoints}
    model = type(REGISTRY.model("twin-layernorm")).model_validate(entry)
    return replace(only(["twin-layernorm"]), model=model, revision=revision, read=read, base=base, place=None)


@pytest.mark.parametrize(
    ("checkpoints", "revision", "step"),
    [
        ({"pattern": "ckpt{step}x7", "steps": [3]}, "ckpt3x7", 3),
        ({"pattern": "v7-{step}", "steps": [3]}, "v7-12", 12),
        (["checkpoint-10", "checkpoint-2"], "checkpoint-10", 10),
        (None, "iter_0000020", 20),
        (None, "main", None),
        (["epoch_0_step_500", "epoch_1_step_500", "epoch_1_step_20"], "epoch_1_step_500", None),
        (["epoch=0-step=500", "epoch=1-step=900"], "epoch=1-step=900", 900),
    ],
)
def test_the_registrys_rule_tells_the_step_before_the_name_does(checkpoints, revision, step):
    assert read_step(_read(checkpoints, revision=revision)) == step


def test_a_trainers_folder_tells_its_step_where_its_name_does_not(tmp_path):
    for name, text in {
        "best": '{"global_step": 1500}', "checkpoint-20": '{"global_step": 1}', "odd": '{"global_step": true}',
        "torn": "{", "none": "{}",
    }.items():  # fmt: skip
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "trainer_state.json").write_text(text)
    steps = {name: read_step(_read(source=str(tmp_path / "run" / name))) for name in os.listdir(tmp_path / "run")}
    assert steps == {"best": 1500, "checkpoint-20": 20, "odd": None, "torn": None, "none": None}
    assert read_step(_read(source="run", revision="best", base=tmp_path)) == 1500
    assert read_step(_read(source="run/best", base=tmp_path, read="random")) is None
