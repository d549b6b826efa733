"""Options that several commands share, and what they may not be together."""

from typing import Any


def check_options(engine: str, dtype: str | None, tokens: int | None, input_spec: str | None) -> None:
    """Raise UserError for what neither `run` nor `plan` takes."""
    from deadbench.runners.cli.console import UserError, one_of
    from deadbench.runners.engines.registry import ENGINES
    from deadbench.suite.registry.entries import Dtype

    one_of("--dtype", dtype, Dtype.__args__)  # type: ignore[attr-defined]
    if engine not in ("auto", *ENGINES):
        raise UserError(f"--engine {engine!r} cannot be run by this version; choose auto, {', '.join(ENGINES)}")
    if tokens is not None and input_spec is not None and input_spec.endswith(".npy"):
        raise UserError("--tokens does nothing with tokens:FILE.npy, which is used exactly as given; leave one out")


def choose_cluster(assume: str | None, address: str | None) -> Any:
    """The cluster that is assumed, that Ray at `address` reports, or this machine.

    Raises:
        PlanError: it cannot be understood or reached.
    """
    from deadbench.runners.planning.hardware import parse_cluster, ray_cluster, this_machine

    if assume is not None:
        return parse_cluster(assume)
    return this_machine() if address in (None, "local") else ray_cluster(str(address))
