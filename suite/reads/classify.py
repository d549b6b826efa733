"""What `deadbench classify` says of one source."""

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.checkpoints.adapters import open_checkpoint
from deadbench.suite.checkpoints.formats.pickles import uncollected
from deadbench.suite.errors import one_line, one_source
from deadbench.suite.reads.parameters import read_parameters
from deadbench.suite.secrets import shown_place


@uncollected()  # what is known of a hundred thousand pieces goes as a whole, when it returns
def classify(
    source: str, verify: bool = False, config: dict[str, Any] | None = None, model_type: str | None = None
) -> tuple[dict[str, Any], NDArray[np.float64] | None]:
    """The object that `deadbench classify --json` prints for one source, and its inverse-scale direction.

    `config` takes the place of its config.json; `model_type` is what a configuration without one is of.

    Never raises for a bad checkpoint: `error` then holds the one line and the fields are null.
    """
    started = time.perf_counter()
    result: dict[str, Any] = dict.fromkeys(CLASSIFY_FIELDS)
    shown = shown_place(source)
    result |= {"source": shown, "evidence": []}
    direction_D = None
    checkpoint = None
    try:
        with one_source(source):
            checkpoint = open_checkpoint(source, config=config, model_type=model_type)
            read = read_parameters(checkpoint, verify)
            columns = read.columns()
            result |= {name: columns[name] for name in CLASSIFY_FIELDS if name in columns}
            result |= {"revision": checkpoint.revision, "bytes_total": checkpoint.bytes_total()} | checkpoint.origin()
            remarks = (checkpoint.remark, checkpoint.contents().remark)
            result["evidence"] = [*read.evidence, *(remark for remark in remarks if remark)]
            result["error"] = f"{shown}: {read.reason}" if read.needs_remote_code else None
            direction_D = read.direction_D
    except ValueError as error:
        result |= {"error": one_line(error)}
    result["bytes_read"] = checkpoint.bytes_read if checkpoint else 0
    result["seconds"] = time.perf_counter() - started
    return result, direction_D


CLASSIFY_FIELDS = (
    "source", "revision", "family", "final_norm", "final_norm_tensor", "placement", "scale", "has_bias", "eps",
    "hidden_size", "num_zero_scales", "scale_harmonic", "predicted_dim", "depth_predicted", "evidence", "bytes_read",
    "bytes_total", "source_format", "source_step", "seconds", "error",
)  # fmt: skip
