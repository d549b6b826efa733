"""What a reader of a row should know before comparing it, in words that can be filtered by."""

from collections.abc import Iterable

from deadbench.suite.schema import Row

# Name: when a row has it. The first are told by its columns, the others by who made it.
FLAGS = {
    "zero-scales": "scales of the final norm are zero for all purposes: depths are of learned directions",
    "depth-at-limit": "the depth is as deep as the projection resolves, or deeper",
    "few-sequences": "fewer than eight sequences, or nothing varies along v: no standard errors",
    "rank-limited": "at some tap too few inputs differ for its rank to mean anything",
    "centred-stream": "the stream has no mean: gamma^-1 may be a kernel although the norm is RMSNorm",
    "massive-activations": "coordinates of the final norm's input are above 1000 times the median second moment",
    "random-input": "the input is random tokens or noise, or part of it was made up",
    "stand-in-input": "the protocol's own input could not be had: the row's `input` says what stands for it",
    "positions-left-out": "the protocol leaves the first positions of each sequence out",
    "few-distinct-rows": "fewer than four different rows for each dimension reached the final norm",
    "quantised": "the configuration says that the weights are quantised",
    "tf32": "float32 products of this GPU run in TF32, with 10 bits of significand",
    "not-stored": "parameters that only training uses are not in the checkpoint",
    "unlawful-initialisation": "the random initialisation is not scale one and shift zero at the final norm",
}


def flags(row: Row, blocks: Iterable[Row]) -> list[str]:
    """The flags of an ok row of `reads`, with those that whoever made it has put there, in the order of `FLAGS`."""
    given, forward = set(row.get("flags") or ()), row.get("lambda_v") is not None
    description = str(row.get("input") or "")
    told = {
        "zero-scales": bool(row.get("num_zero_scales")),
        "depth-at-limit": forward and row.get("depth") is not None and row["depth"] == row.get("depth_limit"),
        "few-sequences": forward and row.get("depth_standard_error") is None,
        "rank-limited": any(block["rank_limited"] for block in blocks),
        "centred-stream": bool(row.get("stream_centred")),
        "massive-activations": bool(row.get("massive_coordinates")),
        "random-input": description.startswith(("tokens:random", "audio:noise")) or "made up" in description,
        "stand-in-input": "(stands for " in description,
        "positions-left-out": bool(row.get("skip_positions")),
    }
    return [name for name in FLAGS if told.get(name) or name in given]
