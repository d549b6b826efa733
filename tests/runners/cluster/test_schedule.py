"""The schedule without Ray: nothing is given twice, nothing starves, and the makespan is near what is possible."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.runners.cluster.schedule import Demand, Free, Node, Piece, Running, can_ever, decide, find_place
from tests.runners.simulation import ANY, POWERS, SHARED, cluster, lower_bound, models, simulate

demands = st.builds(
    Demand,
    devices=st.sampled_from([0, 0.125, 0.25, 0.5, 1, 2, 3, 4, 8, 12]),
    cpus=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    seconds=st.floats(0, 1000),
    avoid=st.sets(st.sampled_from(["node0", "node1"])).map(frozenset),
)
shapes = st.lists(st.sampled_from([0, 1, 2, 4, 8]), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(demands, max_size=25), shapes, st.floats(0, 3))
def test_no_device_is_given_twice_and_nothing_that_fits_is_left(queue, sizes, foreign):
    nodes = [Node(f"node{n}", size, 8.0, min(foreign, size)) for n, size in enumerate(sizes)]
    started = decide(queue, nodes, [])
    assert len({position for position, _ in started}) == len(started)
    used, cpus = Counter(), Counter()
    for position, place in started:
        demand = queue[position]
        assert sum(len(p.devices) * p.share for p in place) == pytest.approx(demand.devices)
        assert sum(p.cpus for p in place) == pytest.approx(demand.cpus)
        if len(place) > 1:
            assert demand.devices > max(sizes), "only what no node can hold is spread"
        for piece in place:
            cpus[piece.node] += piece.cpus
            used.update(dict.fromkeys(((piece.node, d) for d in piece.devices), piece.share))
    assert all(share <= 1 + 1e-9 for share in used.values())
    for node in nodes:
        assert cpus[node.id] <= 8 + 1e-6
        assert (
            sum(share for (n, _), share in used.items() if n == node.id) <= node.devices - node.foreign_devices + 1e-6
        )
    if not started:
        free = Free.of(nodes)
        assert all(find_place(demand, free, nodes) is None for demand in queue)


@pytest.mark.parametrize("sizes", [POWERS, SHARED, ANY], ids=["1, 2, 4, 8", "with shares", "1 to 8"])
@pytest.mark.parametrize("nodes", [cluster(8), cluster(8, 8, 8, 8)], ids=["1x8", "4x8"])
@pytest.mark.parametrize("error", [0.0, 0.5])
def test_the_makespan_of_200_models_is_within_15_percent_of_the_lower_bound(sizes, nodes, error):
    for seed in range(4):  # the benchmark has more
        suite = models(seed, sizes, error=error)
        started, makespan = simulate(suite, nodes)
        assert len(started) == len(suite)
        assert makespan <= 1.15 * lower_bound(suite, nodes)


def test_mixed_node_shapes_are_all_used():
    suite = models(3, (1, 2, 4, 8))
    nodes = cluster(8, 4, 4)
    _, makespan = simulate(suite, nodes)
    assert makespan <= 1.15 * max(sum(d * s for d, s, _ in suite) / 16, sum(s for d, s, _ in suite if d == 8))


@pytest.mark.parametrize("estimate", [1.0, 10.0, 1000.0])
def test_a_stream_of_small_models_does_not_starve_a_large_one(estimate):
    """One arrives a second, each of ten; the estimates are right, or too short by ten, or by a thousand."""
    stream = [(1, 10.0, 10.0 / estimate)] * 400
    suite = [*stream, (8, 50.0, 50.0 / estimate)]
    arrivals = [(float(n) * 0.5, n) for n in range(400)] + [(30.0, 400)]
    started, _ = simulate(suite, cluster(8), arrivals)
    assert started[400] <= 30.0 + 10.0 + 1e-6, "what ran when it came is waited for, and no more"


def test_small_models_fill_what_a_large_one_leaves():
    nodes = cluster(8)
    queue = [Demand(5, seconds=100), Demand(5, seconds=100), Demand(2, seconds=10), Demand(1, seconds=900)]
    started = dict(decide(queue, nodes, []))
    assert 0 in started
    assert 2 in started
    late = [Running((Piece("node0", (0, 1, 2, 3, 4), 1.0, 0.0),), 100.0)]
    head = [Demand(8, seconds=500), Demand(3, seconds=99), Demand(3, seconds=101)]
    assert [position for position, _ in decide(head, nodes, late)] == [1], "the other would hold the head up"


def test_shares_fill_one_device_before_they_open_another():
    nodes = cluster(2)
    started = decide([Demand(0.5), Demand(0.25), Demand(0.25)], nodes, [])
    assert {place[0].devices for _, place in started} == {(0,)}


def test_a_place_over_several_nodes_is_made_of_whole_devices():
    ((_, place),) = decide([Demand(12, cpus=12.0)], cluster(8, 8), [])
    assert sorted(len(piece.devices) for piece in place) == [4, 8]
    assert decide([Demand(12)], cluster(8, 8), [Running((Piece("node0", (0, 1, 2, 3, 4), 1.0, 0.0),))]) == []


def test_a_node_where_it_died_is_avoided_as_long_as_there_is_another():
    nodes = cluster(8, 8, 1)
    free = Free.of(nodes)
    assert find_place(Demand(4, avoid=frozenset({"node0"})), free, nodes)[0].node == "node1"
    both = Demand(4, avoid=frozenset({"node0", "node1"}))
    assert find_place(both, free, nodes)[0].node in ("node0", "node1"), "the third could never hold it"


def test_what_nothing_can_hold_does_not_hold_the_others_up():
    nodes = cluster(4)
    assert not can_ever(Demand(8), nodes)
    assert [position for position, _ in decide([Demand(8, seconds=1e6), Demand(4)], nodes, [])] == [1]
