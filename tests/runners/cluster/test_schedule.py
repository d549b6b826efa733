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


def test_the_first_of_all_is_the_shortest_where_that_costs_little():
    nodes, queue = cluster(2), [Demand(1, seconds=s) for s in (25.0, 20.0, 5.0, 17.0, 15.0, 6.0)]
    assert [position for position, _ in decide(queue, nodes, [], opening=True)] == [2, 0]
    assert [position for position, _ in decide(queue, nodes, [])] == [0, 1]
    few = [queue[0], queue[1], queue[4]]
    assert [position for position, _ in decide(few, nodes, [], opening=True)] == [0, 1], "15 s are long beside 60"
    suite = [(1, each.seconds, each.seconds) for each in queue]
    _, makespan = simulate(suite, nodes)
    assert makespan <= 1.1 * lower_bound(suite, nodes)


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


def whole(node, *devices, cpus=0.0):
    """A place of whole devices on one node."""
    return (Piece(node, devices, 1.0, cpus),)


def order(queue, nodes, running=()):
    """Positions in the order in which they are started."""
    return [position for position, _ in decide(queue, nodes, list(running))]


def test_what_is_free_is_what_neither_others_nor_we_use():
    nodes = [Node("a", 3, 8.0, foreign_devices=1.25, foreign_cpus=2.0), Node("b", 1, 4.0)]
    free = Free.of(nodes, [Running((Piece("a", (0,), 0.5, 1.5), Piece("b", (0,), 0.25, 1.0)))])
    # Ray gives others what is freest: first the second device, then a quarter of the third.
    assert free.devices == {"a": [0.5, 0.0, 0.75], "b": [0.75]}
    assert free.cpus == {"a": 4.5, "b": 3.0}
    many = Free.of([Node("a", 2, 8.0, foreign_devices=9.0)])
    assert many.devices == {"a": [0.0, 0.0]}


def test_what_is_taken_is_given_back_and_a_lost_node_has_nothing_to_give():
    free = Free.of(cluster(2))
    place = (Piece("node0", (1,), 0.25, 3.0), Piece("gone", (0,), 1.0, 1.0))
    before = free.copy()
    free.take(place)
    assert (free.devices, free.cpus) == ({"node0": [1.0, 0.75]}, {"node0": 61.0})
    free.take(place, -1)
    assert free == before
    free.take(place)
    assert before.devices == {"node0": [1.0, 1.0]}, "a copy changes by itself"
    both = Free({"x": [0.2, 0.9]}, {"x": 5.0}).both(Free({"x": [0.7, 0.1]}, {"x": 4.0}))
    assert both == Free({"x": [0.2, 0.1]}, {"x": 4.0})


def elsewhere(seconds):
    """What runs on eight devices that are no place for anybody here: it counts to the time that is left for all."""
    return Running(whole("elsewhere", *range(8)), seconds)


def test_first_comes_what_takes_over_half_of_the_time_then_the_widest_then_the_longest():
    nodes = cluster(16)
    queue = [Demand(2, seconds=20), Demand(4, seconds=10), Demand(1, seconds=110), Demand(2, seconds=30)]
    # 250 device seconds on 16 devices: each takes over half of the time, 7.8 s.
    assert order(queue, nodes) == [2, 3, 0, 1]
    assert order(queue, nodes, [elsewhere(90.0)]) == [2, 1, 3, 0], "half of the time is 30.3 s"
    assert order(queue, nodes, [elsewhere(1000.0)]) == [1, 3, 0, 2]
    assert order([Demand(1, seconds=5.0)] * 3, nodes) == [0, 1, 2], "as they came"


def test_without_devices_there_is_no_time_to_share():
    nodes = cluster(0)
    assert order([Demand(0, 1.0, 1.0), Demand(0, 1.0, 9.0)], nodes) == [1, 0]


@pytest.mark.parametrize(
    ("demand", "found"),
    [
        (Demand(1, 4.0), whole("a", 1, cpus=4.0)),  # the first is taken in part
        (Demand(2, 4.0), None),
        (Demand(1, 4.5), None),
        (Demand(0.5, 1.0), (Piece("a", (0,), 0.5, 1.0),)),  # the fullest that has room
        (Demand(0.75, 1.0), (Piece("a", (1,), 0.75, 1.0),)),
        (Demand(0, 4.0), (Piece("a", (), 0.0, 4.0),)),
        (Demand(0, 4.1), None),
    ],
)
def test_room_on_one_node(demand, found):
    nodes = [Node("a", 2, 6.0)]
    free = Free.of(nodes, [Running((Piece("a", (0,), 0.5, 2.0),))])
    assert find_place(demand, free, nodes) == found


def test_of_several_places_the_one_that_leaves_least():
    nodes = [Node("a", 4, 8.0), Node("b", 2, 8.0), Node("c", 2, 4.0)]
    free = Free.of(nodes, [Running((Piece("a", (0,), 0.5, 0.0),))])
    assert find_place(Demand(0.25), free, nodes)[0].node == "a", "on its device"
    assert find_place(Demand(1), free, nodes)[0].node == "b", "on its node, the one with more CPUs"
    assert find_place(Demand(1, 1.0), free, [nodes[0], nodes[2]])[0].node == "c"
    assert find_place(Demand(3), free, nodes) == whole("a", 1, 2, 3)
    assert find_place(Demand(1), free, []) is None


def test_over_several_nodes_the_cpus_go_with_the_devices():
    nodes = [Node("a", 4, 8.0), Node("b", 8, 8.0)]
    assert find_place(Demand(10, 5.0), Free.of(nodes), nodes) == (
        Piece("b", tuple(range(8)), 1.0, 4.0), Piece("a", (0, 1), 1.0, 1.0),
    )  # fmt: skip
    assert find_place(Demand(12, 12.0), Free.of(nodes), nodes) == (
        Piece("b", tuple(range(8)), 1.0, 8.0), Piece("a", (0, 1, 2, 3), 1.0, 4.0),
    )  # fmt: skip
    assert find_place(Demand(12, 13.0), Free.of(nodes), nodes) is None, "b would lack CPUs"
    assert find_place(Demand(13), Free.of(nodes), nodes) is None
    busy = Free.of(nodes, [Running(whole("a", 3))])
    assert find_place(Demand(11), busy, nodes) is not None
    assert find_place(Demand(12), busy, nodes) is None


def test_two_devices_of_two_nodes_of_one_are_a_place():
    nodes = cluster(1, 1)
    assert len(find_place(Demand(2), Free.of(nodes), nodes)) == 2
    assert find_place(Demand(1), Free.of(nodes), nodes) == whole("node0", 0)


def test_whether_it_can_ever_run_does_not_depend_on_what_others_do_now():
    nodes = [Node("a", 4, 8.0, foreign_devices=4.0, foreign_cpus=8.0)]
    assert can_ever(Demand(4, 8.0), nodes)
    assert not can_ever(Demand(4, 8.5), nodes)
    assert not can_ever(Demand(5), nodes)
    assert not can_ever(Demand(1), [])
    assert order([Demand(1)], nodes) == []


LATER = elsewhere(1e6)  # so much is left for all that nothing is long: the widest come first


def test_the_head_of_the_line_has_the_place_that_is_free_first():
    nodes = cluster(4, 4)
    running = [LATER, Running(whole("node0", 0, 1, 2, 3), 50.0), Running(whole("node1", 0, 1), 80.0)]
    head = Demand(4, seconds=100)
    # node0 is free at 50: two devices of node1 are nobody's until then, and after it too.
    assert order([head, Demand(2, seconds=500)], nodes, running) == [1]
    sooner = [LATER, Running(whole("node0", 0, 1, 2, 3), 50.0), Running(whole("node1", 0, 1), 20.0)]
    # Now it is node1, at 20: what is let by must be through then.
    assert order([head, Demand(2, seconds=21)], nodes, sooner) == []
    assert order([head, Demand(2, seconds=20)], nodes, sooner) == [1]


def test_what_has_started_in_this_round_is_waited_for_as_what_runs():
    queue = [Demand(3, seconds=40), Demand(3, seconds=39), Demand(1, seconds=40), Demand(1, seconds=41)]
    # The second waits for the first, 40 s; beside both there is one device.
    assert order(queue, cluster(4), [LATER]) == [0, 3]
    assert order(queue[:3], cluster(4), [LATER]) == [0, 2]
    wide = [Demand(3, seconds=40), Demand(2, seconds=39), Demand(1, seconds=40), Demand(1, seconds=41)]
    assert order(wide, cluster(4), [LATER]) == [0, 3], "beside two devices there are two"


def test_of_two_that_are_let_by_the_second_may_not_take_what_the_first_left_the_head():
    running = [LATER, Running(whole("node0", 0, 1, 2), 50.0)]
    queue = [Demand(6, seconds=10), Demand(1, seconds=60), Demand(1, seconds=59), Demand(1, seconds=58)]
    # Eight devices: at 50 the head takes six of them, and two of the five that are free now are left beside it.
    assert order(queue, cluster(8), running) == [1, 2]
    assert order([*queue, Demand(1, seconds=50)], cluster(8), running) == [1, 2, 4]


def test_what_others_hold_is_not_waited_for_and_holds_nobody_up():
    nodes = [Node("a", 4, 8.0, foreign_devices=2.0)]
    assert order([Demand(4, seconds=100), Demand(1, seconds=1000)], nodes, [LATER]) == [1]
