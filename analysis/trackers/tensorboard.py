"""TensorBoard: one run a series, in event files below a folder or a URL; what they hold is read back first."""

import hashlib
import os
import re
from collections.abc import Sequence

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from deadbench.analysis.trackers.curves import Point, Series, by_tokens

_LONGEST_NAME = 100  # letters of a run's folder


def log(series: Sequence[Series], folder: str) -> int:
    """Write what the event files of `folder` lack of `series`; returns how many values that were.

    A metric is a scalar over the step, and a second one `METRIC_by_tokens` where the tokens seen are known.

    Raises:
        OSError: the folder cannot be written.
    """
    written = 0
    for each in series:
        run = os.path.join(folder, run_name(each.name))
        known = _known(run)
        points = [*each.points, *by_tokens(each.points)]
        new = [(point, name) for point in points for name in point.values if (name, point.step) not in known]
        if new:
            _write(run, new)
        written += len(new)
    return written


def run_name(name: str) -> str:
    """The folder of a series: its name where a folder may be called so, else what may stay of it and a short hash."""
    safe = re.sub(r"[^\w .=+@-]", "_", name).strip(". ")[:_LONGEST_NAME]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _known(run: str) -> set[tuple[str, int]]:
    if not os.path.isdir(run):
        return set()
    read = EventAccumulator(run, size_guidance={"scalars": 0})  # 0: all of them
    read.Reload()
    return {(tag, event.step) for tag in read.Tags()["scalars"] for event in read.Scalars(tag)}


def _write(run: str, new: Sequence[tuple[Point, str]]) -> None:
    writer = EventFileWriter(run, filename_suffix=".deadbench")
    try:
        for point, name in new:
            value = Summary.Value(tag=name, simple_value=point.values[name])
            writer.add_event(Event(wall_time=point.seconds, step=point.step, summary=Summary(value=[value])))
    finally:
        writer.close()
