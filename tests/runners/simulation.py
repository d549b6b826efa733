"""A cluster without processes: `runners/cluster/schedule.py` decides, time jumps from end to end."""

import random

from deadbench.runners.cluster.schedule import Demand, Node, Running, decide

POWERS, SHARED, ANY = (1, 2, 4, 8), (0.125, 0.25, 0.5, 1, 1, 2, 4, 8), tuple(range(1, 9))


def models(seed, sizes, count=200, error=0.0):
    """(devices, seconds, estimated seconds) of a suite whose longest model takes tens of times the median's."""
    rng = random.Random(seed)
    drawn = [(rng.choice(sizes), rng.lognormvariate(3, 0.8)) for _ in range(count)]
    return [(devices, seconds, seconds * rng.uniform(1 - error, 1 + error)) for devices, seconds in drawn]


def simulate(suite, nodes, arrivals=()):
    """When each model started, and when all were through; `arrivals`: (time, position in `suite`), others at once."""
    late = {position: when for when, position in arrivals}
    waiting, running, started, now = set(range(len(suite))), [], {}, 0.0
    while waiting or running:
        here = [position for position in sorted(waiting) if late.get(position, 0.0) <= now]
        queue = [Demand(suite[position][0], 0.0, suite[position][2]) for position in here]
        occupied = [Running(at, max(0.0, end - now)) for _, end, at in running]
        for index, place in decide(queue, nodes, occupied, opening=not started):
            position = here[index]
            waiting.remove(position)
            started[position] = now
            running.append((now + suite[position][1], now + suite[position][2], place))
        coming = [when for position, when in late.items() if position in waiting and when > now]
        ends = [end for end, _, _ in running]
        assert ends or coming, f"nothing runs and {len(waiting)} wait"
        now = min(ends + coming)
        running = [each for each in running if each[0] > now]
    return started, now


def lower_bound(suite, nodes):
    """No schedule is shorter: all the work on all devices, the longest model, and models of over half a node."""
    size, total = nodes[0].devices, sum(node.devices for node in nodes)
    area = sum(devices * seconds for devices, seconds, _ in suite) / total
    alone = sum(seconds for devices, seconds, _ in suite if devices > size / 2) / len(nodes)
    return max(area, alone, max(seconds for _, seconds, _ in suite))


def cluster(*shapes):
    """Nodes of so many devices each."""
    return [Node(f"node{number}", devices, 64.0) for number, devices in enumerate(shapes)]
