"""What holds of every plan: more memory or more GPUs never plans worse."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadbench.runners.engines.registry import AUTO, ENGINES
from deadbench.runners.jobs.job import ReadJob
from deadbench.runners.planning.hardware import Cluster, Machine, Room
from deadbench.runners.planning.needs import needs
from deadbench.runners.planning.placement import Placement, fit, fit_whole
from deadbench.runners.planning.sizes import ModelSize
from deadbench.suite.registry.entries import Model, Protocol


@st.composite
def sizes(draw):
    """Models from a few megabytes to a terabyte in float32."""
    heads = draw(st.sampled_from([1, 2, 3, 6, 8, 12, 16, 40, 64]))
    hidden_size = heads * draw(st.sampled_from([16, 64, 128]))
    num_taps = draw(st.integers(2, 100))
    block = draw(st.integers(1, 16)) * hidden_size**2
    outside = draw(st.integers(1, 300_000)) * hidden_size
    return ModelSize(
        parameters=outside + (num_taps - 1) * block,
        outside_blocks=outside,
        largest_block=block,
        largest_tensor=max(block // 3, outside),
        hidden_size=hidden_size,
        num_taps=num_taps,
        divisors=draw(st.sampled_from([{}, {"num_attention_heads": heads}])),
        has_plan=draw(st.booleans()),
        rows_per_item=1,
        activation_bytes=draw(st.integers(1, 64)) * 4096 * hidden_size * 4,
    )


def read_by(engine, read="random", accumulator_gb=None):
    return ReadJob(
        model=Model(id="m", config={"model_type": "gpt_neox"}),
        read=read,
        revision=None,
        seed=0,
        engine=engine,
        protocol_name="standard",
        protocol=Protocol(),
        protocol_hash="",
        input="tokens:random",
        dtype="float32",
        fingerprint=None,
        base=Path(),
        accumulator_gb=accumulator_gb,
    )


reads = st.builds(
    read_by, st.sampled_from([*ENGINES]), st.sampled_from(["random", "trained"]), st.none() | st.floats(0.1, 50)
)
itemsizes = st.sampled_from([2, 4, 8])
tokens = st.integers(512, 200_000)
gigabytes = st.floats(0.5, 200)


def planned(size, read, itemsize, num_tokens, cluster, tensor_parallel=None):
    """The placement of one read, and how many GPUs or processes it takes."""
    need = needs(size, read.read, itemsize, num_tokens)
    return fit(Placement(0, "m", None, read.read, dtype="float32"), size, need, read, cluster, tensor_parallel)


def nodes(count, gpus, gpu_gb, host_gb=None):
    machine = Machine(gpus, gpu_gb * 1e9 if gpus else 0.0, None if host_gb is None else host_gb * 1e9)
    return Cluster((machine,) * count, "assumed", assumed=True)


def assert_no_worse(less, more):
    if less.problem is not None:
        return
    assert more.problem is None, (less, more)
    assert more.gpus <= less.gpus or less.gpus == 0
    if (more.engine, more.tensor_parallel) == (less.engine, less.tensor_parallel):
        assert more.passes <= less.passes
    # A share of a model's devices is given up only for a plan that needs fewer of them.
    assert more.tensor_parallel <= less.tensor_parallel or ENGINES[less.engine].blockwise
    assert not (ENGINES[more.engine].blockwise and not ENGINES[less.engine].blockwise)


@given(sizes(), reads, itemsizes, tokens, gigabytes, gigabytes, st.integers(1, 8), st.integers(1, 3))
def test_more_memory_of_a_gpu_never_plans_worse(size, read, itemsize, num_tokens, one, other, gpus, count):
    less, more = (planned(size, read, itemsize, num_tokens, nodes(count, gpus, each)) for each in sorted([one, other]))
    if ENGINES[str(less.engine)].blockwise and not less.problem:  # more may let several GPUs share what one streamed
        assert more.problem is None
        return
    assert_no_worse(less, more)


@given(sizes(), reads, itemsizes, tokens, gigabytes, gigabytes)
def test_more_memory_of_a_host_never_plans_worse(size, read, itemsize, num_tokens, one, other):
    less, more = (planned(size, read, itemsize, num_tokens, nodes(1, 0, 0, each)) for each in sorted([one, other]))
    assert_no_worse(less, more)


@given(sizes(), reads, itemsizes, tokens, gigabytes, gigabytes, st.integers(1, 8), st.integers(1, 8))
def test_more_gpus_never_leave_a_read_without_a_place(size, read, itemsize, num_tokens, gpu_gb, host_gb, one, other):
    few, many = sorted([one, other])
    less, more = (planned(size, read, itemsize, num_tokens, nodes(1, gpus, gpu_gb, host_gb)) for gpus in (few, many))
    assert less.problem is not None or more.problem is None
    less, more = (planned(size, read, itemsize, num_tokens, nodes(n, few, gpu_gb, host_gb)) for n in (1, many))
    assert less.problem is not None or more.problem is None


@given(sizes(), reads, itemsizes, tokens, gigabytes, gigabytes, st.integers(1, 8))
def test_what_is_planned_is_within_the_memory(size, read, itemsize, num_tokens, gpu_gb, host_gb, gpus):
    on_gpus = planned(size, read, itemsize, num_tokens, nodes(1, gpus, gpu_gb, host_gb))
    on_host = planned(size, read, itemsize, num_tokens, nodes(1, 0, 0, host_gb))
    if on_gpus.problem is None:
        assert on_gpus.peak_bytes <= min(on_gpus.gpus, 1) * gpu_gb * 1e9
        assert on_gpus.gpus <= gpus
    if on_host.problem is None:
        assert on_host.peak_host_bytes <= host_gb * 1e9
        assert (on_host.gpus, on_host.tensor_parallel) == (0, 1)


@given(sizes(), reads, itemsizes, tokens, gigabytes, st.integers(1, 8), st.integers(1, 8))
def test_a_degree_that_is_asked_for_is_taken_or_refused(size, read, itemsize, num_tokens, gpu_gb, gpus, asked):
    row = planned(size, read, itemsize, num_tokens, nodes(1, gpus, gpu_gb), asked)
    if ENGINES[read.engine].tensor_parallel is None:
        assert row.tensor_parallel == 1, "it runs on one device whatever is asked"
    elif row.problem is None and not ENGINES[row.engine].blockwise:
        assert row.tensor_parallel == asked
    assert row.engine in (AUTO if read.engine in AUTO else (read.engine,))


@given(sizes(), itemsizes, tokens, gigabytes, gigabytes)
def test_a_functional_read_that_fits_fits_in_more(size, itemsize, num_tokens, one, other):
    need = needs(size, "functional", itemsize, num_tokens)
    rows = [
        fit_whole(Placement(0, "m", None, "functional", dtype="float64"), need, Room.of(nodes(1, 0, 0, each)))
        for each in sorted([one, other])
    ]
    assert rows[0].problem is not None or rows[1].problem is None


@pytest.mark.parametrize("engine", ENGINES)
def test_the_properties_meet_both_outcomes(engine):
    """A property over reads that all fit, or none, would say nothing."""
    size = ModelSize(10**10, 10**8, 3 * 10**8, 10**8, 4096, 33, {"num_attention_heads": 32}, True, 1, 4 * 10**9)
    few, many = (planned(size, read_by(engine), 4, 8192, nodes(1, 4, each)) for each in (1, 200))
    assert few.problem is not None
    assert many.problem is None
