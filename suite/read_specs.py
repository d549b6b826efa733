"""The reads that there are: one line each, with what jobs, plans and workers must know of it.

What a read does is one function in `runners/worker/run.py:READ_FUNCTIONS`.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReadSpec:
    """What sets one read apart.

    Attributes:
        version: enters the protocol hash; raise it when a change moves the read's numbers, and say so in the changelog.
        opens: what it reads of a model. `config`: a configuration alone, which the registry may hold; `weights`: a
            checkpoint; `either`: a checkpoint where there is a source, else the registry's configuration.
        runs_model: it has forward passes, and with them an input, an engine and a dtype.
        per_checkpoint: made for each checkpoint of a series; else once a model.
        taps: it reads the residual stream, as far as the protocol says.
        divides: several processes may share its model or its tokens.
        tokens: how many it is fed unless told otherwise; None: as the protocol says.
        dtype: what it runs in unless told otherwise; None: as the model's entry says.
        by_default: made where no reads are named.
    """

    version: int
    opens: Literal["config", "weights", "either"]
    runs_model: bool = True
    taps: bool = True
    per_checkpoint: bool = True
    divides: bool = True
    tokens: int | None = None
    dtype: str | None = None
    by_default: bool = True


READ_SPECS: dict[str, ReadSpec] = {
    "parameters": ReadSpec(2, "weights", runs_model=False, taps=False, divides=False),
    "random": ReadSpec(3, "config", per_checkpoint=False),
    "trained": ReadSpec(3, "weights"),
    # Few tokens, and precision enough to see that nothing moves.
    "functional": ReadSpec(2, "either", taps=False, divides=False, tokens=256, dtype="float64", by_default=False),
}
# Of a place in the residual stream while it is read, in D^2: two halves of at most a Gram matrix, a factor and a
# whitener each, with room to decompose.
TAP_BYTES = 40
DEFAULT_READS = tuple(name for name, spec in READ_SPECS.items() if spec.by_default)
