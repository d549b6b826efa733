"""The doctor's round: each node's facts, then its devices, reads and ranks; every check a line, whatever others say."""

from collections.abc import Iterator

from deadbench.runners.doctor.lines import Line, line_of
from deadbench.runners.doctor.node_checks import UnwellError
from deadbench.runners.doctor.one_process import examine_process
from deadbench.runners.doctor.over_ray import examine_nodes
from deadbench.runners.doctor.rates import keep
from deadbench.runners.planning.seconds import Rates, Work, projected, rates_file
from deadbench.suite.storage import refusal

# (name, parameters, hidden size, blocks): what times are projected for.
_SIZES = (("8B", 8e9, 4096, 32), ("70B", 70e9, 8192, 80))


def examine_here(address: str | None = None) -> Iterator[Line]:
    """The lines of this machine, or of each node of the Ray at `address`, as they come; rates are stored here.

    Raises:
        ValueError: nobody answers at `address`.
    """
    found = [examine_process()] if address is None else examine_nodes(address)
    rates = []
    for each in found:
        yield from each.lines
        rates += [each.rates] if each.rates is not None else []
    for rate in {each.device: each for each in rates}.values():
        for name, parameters, hidden_size, num_blocks in _SIZES:
            tokens = 8 * hidden_size
            work = Work("random", tokens, tokens, 2 * parameters, num_blocks + 1, hidden_size, 0, 0, "bfloat16", 1)
            taken = projected(work, rate)
            told = (
                f"about {taken.loaded:.3g} s on one {rate.device} once it is loaded, most of it "
                f"{taken.most_once_loaded} ({taken.forward:.2g} s forward)"
            )
            yield Line("all", f"projected {name}", "ok", told)
    if rates:
        yield line_of("all", "rates kept", lambda: _kept(rates))


def _kept(rates: list[Rates]) -> str:
    """Raise UnwellError where they cannot be."""
    try:
        return str(keep(rates))
    except OSError as error:
        raise UnwellError(f"{rates_file()}: {refusal(error)}; set DEADBENCH_CACHE to a folder of your own") from error
