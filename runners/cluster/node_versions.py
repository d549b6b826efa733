"""Whether every node has the versions that the driver has."""

import platform
from importlib import metadata
from typing import Any

from deadbench.suite.errors import message

_VERSION_SECONDS = 120.0
_MUST_MATCH = ("python", "ray", "deadbench")  # the others may change numbers


def check_versions() -> tuple[list[str], list[str]]:
    """(what makes the run impossible, what may change numbers) where a node's versions are not this driver's."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(installed_versions)
    asked: dict[tuple[str, str], Any] = {}
    refused: list[str] = []
    doubtful: list[str] = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != ray.get_runtime_context().get_node_id():
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[node["NodeManagerHostname"], node["NodeID"]] = ask.options(scheduling_strategy=where).remote()
    here = installed_versions()
    for (host, _), ref in asked.items():
        try:
            there = ray.get(ref, timeout=_VERSION_SECONDS)
        except ray.exceptions.RayTaskError as error:
            refused.append(f"node {host} cannot run deadbench ({message(error.cause)})")
            continue
        except ray.exceptions.RayError as error:  # it is dying, or too busy to start a process
            doubtful.append(f"node {host} did not tell its versions ({type(error).__name__})")
            continue
        wrong, unlike = differences(host, here, there)
        refused += wrong
        doubtful += unlike
    return refused, doubtful


def differences(host: str, here: dict[str, str | None], there: dict[str, str | None]) -> tuple[list[str], list[str]]:
    """(what makes it impossible to run on `host`, what may change numbers): versions here and there."""
    unlike = {n: f"{n} {there[n] or 'missing'} (here {here[n]})" for n in here if there[n] != here[n]}
    fatal = [text for name, text in unlike.items() if name in _MUST_MATCH or there[name] is None]
    other = [text for text in unlike.values() if text not in fatal]
    told = [[f"node {host} has {', '.join(each)}"] if each else [] for each in (fatal, other)]
    return told[0], told[1]


def installed_versions() -> dict[str, str | None]:
    """The versions that driver and nodes must, or should, share."""
    found: dict[str, str | None] = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("ray", "deadbench", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
