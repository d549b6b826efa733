"""Which engine `auto` takes: block streaming where the passes of a model held whole would take longer."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadbench.runners.cli.reproduce import _by_engines
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.planning import plan as planner
from deadbench.runners.planning.assign import place_jobs
from deadbench.runners.planning.hardware import parse_cluster
from deadbench.runners.planning.needs import needs
from deadbench.runners.planning.placement import Placement
from deadbench.runners.planning.plan import make_plan
from deadbench.runners.planning.seconds import _BUILT_IN, _BUILT_IN_CPU
from deadbench.suite.registry.loading import load_registry
from tests.runners.planning.test_plan import neox
from tests.runners.planning.test_properties import read_by, sizes, unhurried

ALBERT = {
    "model_type": "albert", "hidden_size": 4096, "embedding_size": 128, "intermediate_size": 16384,
    "num_hidden_layers": 12, "num_attention_heads": 64, "vocab_size": 30000,
}  # fmt: skip
MODELS = {
    "pythia-6.9b": {"config": neox(4096, 32, 32, 50432)},
    "pythia-1.4b": {"config": neox(2048, 24, 16, 50304), "parameters": 1_310_000_000},
    "pythia-160m": {"config": neox(768, 12, 12, 50304), "parameters": 124_000_000},
    "albert": {"config": ALBERT, "parameters": 223_000_000},
}


@pytest.fixture(autouse=True)
def no_kept_rates(tmp_path, monkeypatch):
    monkeypatch.setenv("DEADBENCH_CACHE", str(tmp_path / "cache" / "checkpoints"))


@pytest.fixture
def registry(tmp_path):
    models = [{"id": name, "input": "tokens:random", "dtype": "float32"} | entry for name, entry in MODELS.items()]
    path = tmp_path / "models.yaml"
    path.write_text(json.dumps({"protocols": {"standard": {}}, "suites": {}, "models": models}))
    return path


def job_of(path, model="pythia-6.9b", reads=("random",), **overrides):
    (job,) = build_jobs(load_registry(path), path, [model], None, [*reads], Overrides(**overrides), assumed=True)
    return job


@pytest.mark.parametrize(
    ("engine", "shape", "taken", "passes", "note"),
    [
        (None, "1x80GB", "streaming", 1, "block streaming: resident would take 3 passes"),
        ("torch", "1x80GB", "torch", 3, None),
        (None, "1x200GB", "torch", 1, None),
        (None, "2x32GB", "streaming", 1, "block streaming: tensor parallel would take 5 passes"),
        (None, "0x60GB", "streaming", 1, "block streaming: resident would take 4 passes"),
    ],
)
def test_block_streaming_comes_first_where_further_passes_take_longer(registry, engine, shape, taken, passes, note):
    """By hand: of 72 GB float32 weights leave 45, a quarter of which is 16 taps of 40 x 4096^2 bytes, of 33."""
    job = job_of(registry, engine=engine)
    (row,) = make_plan([job], parse_cluster(shape))
    assert (row.engine, row.passes, row.note, row.problem) == (taken, passes, note, None)
    (placed,), remarks = place_jobs([job], parse_cluster(shape))
    assert placed.reads[0].engine == taken, "run does as plan says"
    assert remarks == [f"pythia-6.9b random: {note}"] * bool(note)


def test_what_has_one_pass_or_is_asked_for_is_held_whole(registry):
    (row,) = make_plan([job_of(registry, taps="none")], parse_cluster("1x80GB"))
    assert (row.engine, row.passes) == ("torch", 1)
    (row,) = make_plan([job_of(registry, tensor_parallel=2)], parse_cluster("2x24GB"))
    assert (row.engine, row.passes) == ("torch", 9)
    (row,) = make_plan([job_of(registry, engine="torch")], parse_cluster("1x24GB"))
    assert "do not fit in a GPU of 24.0 GB; --engine streaming needs" in row.problem


GROWING = [12 * 1.05**step for step in range(58)]  # GB, to 200


@unhurried
@given(sizes(), st.sampled_from(["random", "trained"]), st.sampled_from([2, 4]), st.sampled_from(_BUILT_IN))
def test_more_memory_never_takes_much_longer(size, read, itemsize, rates):
    """At the rates of one kind of device; the plan's own seconds."""
    job, need = read_by("torch", read), needs(size, read, itemsize, 8 * size.hidden_size)
    dtype = {2: "bfloat16", 4: "float32"}[itemsize]
    for shape, known in (("1x{}GB", rates), ("0x{}GB", _BUILT_IN_CPU)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planner, "rates_of", lambda cluster, known=known: (known, "one kind"))
            seconds = []
            for gigabytes in GROWING:
                cluster = parse_cluster(shape.format(round(gigabytes, 3)))
                row = planner._soonest(Placement(0, "m", None, read, dtype=dtype), size, need, job, cluster, None)
                if row.problem is None:
                    seconds.append(planner._seconds(row, size, need, job, cluster).total)
        for place, took in enumerate(seconds):
            assert took <= 1.3 * min(seconds[: place + 1])
        assert all(more <= less * 1.3 for less, more in pairwise(seconds))


def test_a_read_of_auto_is_done_whichever_engine_did_it(registry):
    cluster = parse_cluster("1x80GB")
    for engine in (None, "torch", "streaming"):
        job = job_of(registry, engine=engine)
        (placed,), _ = place_jobs([job], cluster)
        for stored in ("torch", "streaming"):
            done = {replace(job.reads[0], engine=stored).identity()}
            is_done = engine in (None, stored)
            assert (not placed.as_stored(done).without(done).reads) == is_done
            (row,) = make_plan([job], cluster, done)
            assert (row.note == "already there") == is_done
    assert [read.engine for read in job_of(registry, reads=["functional"]).reads[0].by_any_engine()] == ["torch"]


@pytest.mark.parametrize(("refused", "engines", "degree"), [(2, ["streaming", "streaming"], None), (1, ["torch"], 2)])
def test_the_reads_of_a_model_are_all_shared_or_all_on_one_device(registry, monkeypatch, refused, engines, degree):
    """Ranks do every read of a job together: none of them can be streamed on one device meanwhile."""
    (read,) = job_of(registry).reads
    job = replace(job_of(registry), reads=(read, replace(read, read="trained")))

    def place(read, cluster, tensor_parallel=None):
        devices = tensor_parallel or (2 if read.read == "trained" else 1)
        problem = "no place" if read.read == "trained" and devices == refused else None
        row = Placement(0, "m", None, read.read, "torch" if devices == 2 else "streaming", devices, devices)
        return replace(row, problem=problem if tensor_parallel else None, note="as placed")

    monkeypatch.setattr(planner, "place", place)
    (placed,), _ = place_jobs([job], parse_cluster("8x24GB"))
    assert {read.engine for read in placed.reads} == {*engines}
    assert placed.tensor_parallel == degree
    assert {row.engine for row in make_plan([job], parse_cluster("8x24GB"))} == {*engines}


@pytest.mark.parametrize("gigabytes", [4, 7, 24, 45, 80])
def test_what_run_does_not_measure_is_planned_in_one_pass(registry, gigabytes):
    """ALBERT's blocks share their weights, so that the taps take far more than these."""
    cluster, unmeasured = parse_cluster(f"0x{gigabytes}GB"), set()
    for name in ("albert", "pythia-160m", "pythia-1.4b"):
        job = job_of(registry, name)
        (placed,), _ = place_jobs([job], cluster)
        (row,) = make_plan([job], cluster)
        assert row.problem == placed.reads[0].error
        assert row.problem or placed.reads[0].engine == row.engine
        if placed.host_bytes == 0:
            unmeasured.add(name)
            assert row.passes == 1
    assert ("pythia-160m" in unmeasured, "pythia-1.4b" in unmeasured) == (gigabytes >= 4, gigabytes >= 45)
    assert ("albert" in unmeasured) == (gigabytes >= 70), "with all the taps of a width of 4096"


def test_a_row_is_reproduced_by_its_engine_where_that_has_room(registry):
    job = job_of(registry)
    for engine, shape, has_room in (
        ("torch", "1x80GB", True),
        ("torch", "1x24GB", False),
        ("streaming", "1x200GB", True),
    ):
        kept = _by_engines(job, {("random", None): engine})
        (placed,), remarks = place_jobs([kept], parse_cluster(shape))
        assert (placed.reads[0].engine, not remarks) == (engine, has_room)
    asked = job_of(registry, engine="torch")
    assert _by_engines(asked, {("random", None): "streaming"}) == asked, "the command says which"
