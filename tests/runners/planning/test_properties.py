"""What holds of every plan: more memory or more GPUs never plans worse."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deadbench.runners.engines.registry import AUTO, ENGINES
from deadbench.runners.jobs.job import ReadJob
from deadbench.runners.planning.hardware import PROCESS_BYTES, Cluster, Machine, Room
from deadbench.runners.planning.needs import needs
from deadbench.runners.planning.placement import Placement, fit, fit_whole
from deadbench.runners.planning.sizes import ModelSize
from deadbench.suite.registry.entries import Model, Protocol

MODEL, PROTOCOL = Model(id="m", config={"model_type": "gpt_neox"}), Protocol()
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure


@st.composite
def sizes(draw):
    """Models from a few megabytes to a terabyte in float32."""
    heads = draw(st.sampled_from([1, 2, 4, 6, 8, 12, 16, 64]))
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
        divisors={"num_attention_heads": heads} if draw(st.integers(0, 4)) else {},
        has_plan=draw(st.booleans()),
        rows_per_item=1,
        activation_bytes=draw(st.integers(1, 64)) * 4096 * hidden_size * 4,
        flop_per_token=2.0 * (num_taps - 1) * block,
    )


def read_by(engine, read="random", accumulator_gb=None):
    return ReadJob(
        model=MODEL,
        read=read,
        revision=None,
        seed=0,
        engine=engine,
        protocol_name="standard",
        protocol=PROTOCOL,
        protocol_hash="",
        input="tokens:random",
        dtype="float32",
        fingerprint=None,
        base=Path(),
        accumulator_gb=accumulator_gb,
        auto=engine == AUTO[0],
    )


@st.composite
def requests(draw, read=None, engine=None):
    """(size, needs, read): a read of some model, and what it needs."""
    size = draw(sizes())
    job = read_by(
        engine or draw(st.sampled_from([*ENGINES])),
        read or draw(st.sampled_from(["random", "trained"])),
        draw(st.none() | st.floats(0.1, 50)),
    )
    return size, needs(size, job.read, draw(st.sampled_from([2, 4, 8])), draw(st.integers(512, 200_000))), job


# Memory, of what the read needs resident on one device: from what streams it at most to what holds it with ease.
memories = st.floats(0.02, 1.5)
GROWING = [0.02 * 1.2**step for step in range(25)]
few = st.integers(1, 8)


def planned(request, gpus, memory, *, count=1, host=None, tensor_parallel=None):
    """The placement of a read on `count` nodes of so many GPUs of that `memory`; without GPUs it is the host's."""
    size, need, read = request
    whole = need.resident(1) / 0.9
    host_bytes = memory * max(whole, need.resident_load) + PROCESS_BYTES if gpus == 0 else host and host * whole
    machine = Machine(gpus, memory * whole if gpus else 0.0, host_bytes)
    row = Placement(0, "m", None, read.read, dtype="float32")
    return fit(row, size, need, read, Cluster((machine,) * count, "assumed", assumed=True), tensor_parallel), machine


def assert_no_worse(less, more):
    if less.problem is not None:
        return
    assert more.problem is None, (less, more)
    assert not (ENGINES[more.engine].blockwise and not ENGINES[less.engine].blockwise)
    if (more.engine, more.tensor_parallel) == (less.engine, less.tensor_parallel):
        assert more.passes <= less.passes
    if not ENGINES[less.engine].blockwise:  # what was streamed may now be shared by several GPUs
        assert more.gpus <= less.gpus
        assert more.tensor_parallel <= less.tensor_parallel


@unhurried
@given(requests(), few, st.integers(1, 3))
def test_more_memory_of_a_gpu_never_plans_worse(request, gpus, count):
    rows = [planned(request, gpus, memory, count=count)[0] for memory in GROWING]
    for less, more in pairwise(rows):
        assert_no_worse(less, more)


@unhurried
@given(requests())
def test_more_memory_of_a_host_never_plans_worse(request):
    for less, more in pairwise(planned(request, 0, memory)[0] for memory in GROWING):
        assert_no_worse(less, more)


@unhurried
@given(requests(), st.none() | memories)
def test_more_gpus_never_leave_a_read_without_a_place(request, host):
    for memory in GROWING[::3]:
        on_one_node = [planned(request, gpus, memory, host=host)[0].problem for gpus in range(1, 9)]
        on_more_nodes = [planned(request, 2, memory, host=host, count=count)[0].problem for count in range(1, 5)]
        for problems in (on_one_node, on_more_nodes):
            placed = [problem is None for problem in problems]
            assert placed == sorted(placed), "none, then all"


@unhurried
@given(requests(), few, memories, st.none() | memories)
def test_a_plan_of_one_tap_a_pass_is_within_the_memory(request, gpus, memory, host):
    """More taps a pass take what `--accumulator-gb` says, or a quarter of what the weights leave, as the read does."""
    request = (*request[:2], replace(request[2], accumulator_gb=1e-9))
    row, machine = planned(request, gpus, memory, host=host)
    if row.problem is None:
        assert row.peak_bytes <= min(row.gpus, 1) * machine.gpu_bytes
        assert row.gpus <= gpus
    row, machine = planned(request, 0, memory)
    if row.problem is None:
        assert row.peak_host_bytes <= machine.host_bytes
        assert (row.gpus, row.tensor_parallel) == (0, 1)


@unhurried
@given(requests(), few, memories, few)
def test_a_degree_that_is_asked_for_is_taken_or_refused(request, gpus, memory, asked):
    row, _ = planned(request, gpus, memory, tensor_parallel=asked)
    engine = request[2].engine
    if ENGINES[engine].tensor_parallel is None:
        assert row.tensor_parallel == 1, "it runs on one device whatever is asked"
    elif row.problem is None and not ENGINES[row.engine].blockwise:
        assert row.tensor_parallel == asked
    assert row.engine in (AUTO if engine == AUTO[0] else (engine,))


@unhurried
@given(requests("functional", "torch"), memories, memories)
def test_a_functional_read_that_fits_fits_in_more(request, one, other):
    _, need, _ = request
    less, more = (
        fit_whole(Placement(0, "m", None, "functional"), need, Room(Machine(0, 0.0, each), each, each))
        for each in sorted([one * need.weights, other * need.weights])
    )
    assert less.problem is not None or more.problem is None


@pytest.mark.parametrize("engine", ENGINES)
def test_the_properties_meet_both_outcomes(engine):
    """A property over reads that all fit, or none, would say nothing."""
    size = ModelSize(10**10, 10**8, 3 * 10**8, 10**8, 4096, 33, {"num_attention_heads": 32}, True, 1, 4 * 10**9, 2e10)
    request = size, needs(size, "random", 4, 8192), read_by(engine)
    assert planned(request, 4, 0.02)[0].problem is not None
    assert planned(request, 4, 1.5)[0].problem is None
    assert planned(request, 4, 0.6)[0].tensor_parallel == (1 if ENGINES[engine].tensor_parallel is None else 2)
