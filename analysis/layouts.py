"""What each table shows on a terminal, and what goes first where that is narrow; other formats have all columns."""

from deadbench.analysis.terminal import Layout

LAYOUTS = {
    "leaderboard": Layout(
        columns=[
            "rank", "model", "revision", "family", "objective", "read", "kernel", "depth", "depth_random", "deepening",
            "depth_exact", "kernel_exact", "alignment", "num_dead_1e6", "num_learned", "dead_parameters",
            "dead_parameters_share", "num_parameters", "worst_block_ratio", "protocol", "dtype",
        ],
        keys=["rank", "model", "depth"],
        telling=["protocol", "dtype"],
        dropped=[
            "objective", "worst_block_ratio", "depth_exact", "num_dead_1e6", "num_parameters", "dead_parameters",
            "dead_parameters_share", "revision", "depth_random", "alignment", "num_learned", "kernel_exact",
            "deepening", "read", "family", "kernel",
        ],
    ),
    "families": Layout(
        columns=[
            "claim", "family", "num_models", "num_hold", "holds", "value_median", "value_min", "value_max",
            "value_margin", "unit", "failing",
        ],
        keys=["claim", "num_models", "num_hold", "holds"],
        dropped=["value_min", "value_max", "family", "value_margin", "failing", "unit", "value_median"],
    ),
    "dead_parameters": Layout(
        columns=[
            "family", "num_models", "dead_parameters", "num_parameters", "dead_parameters_share_min",
            "dead_parameters_share_median", "dead_parameters_share_max",
        ],
        keys=["family", "dead_parameters"],
        dropped=[
            "dead_parameters_share_min", "dead_parameters_share_max", "num_parameters", "num_models",
            "dead_parameters_share_median",
        ],
    ),
    "collapsed_blocks": Layout(
        columns=[
            "model", "read", "revision", "block", "num_blocks", "ratio", "collapse_below", "participation",
            "bottom_coordinates", "bottom_weights",
        ],
        keys=["model", "block", "ratio"],
        telling=["read", "revision"],
        dropped=["bottom_weights", "participation", "num_blocks", "collapse_below", "bottom_coordinates"],
    ),
    "dead_directions": Layout(
        columns=[
            "model", "revision", "read", "seed", "site", "verdict", "coordinates", "depth", "at_random", "opened_step",
            "in_checkpoints", "num_checkpoints", "in_runs", "num_runs",
        ],
        keys=["model", "site", "coordinates", "depth"],
        telling=["revision", "read", "seed", "verdict"],
        dropped=["num_runs", "in_runs", "num_checkpoints", "in_checkpoints", "opened_step", "at_random"],
    ),
    "scaled_norms": Layout(
        columns=["norm", "family", "role", "verdict", "angle", "predicted_angle", "scaled", "unscaled", "unknown"],
        keys=["norm", "verdict", "angle", "unscaled"],
        telling=["family", "role"],
        dropped=["unknown", "predicted_angle", "scaled"],
    ),
    "compare": Layout(
        columns=[
            "verdict", "model", "revision", "read", "seed", "metric", "baseline", "candidate", "change", "scale",
            "allowed", "noise", "detail", "protocol", "dtype",
        ],
        keys=["verdict", "model", "metric", "baseline", "candidate"],
        telling=["revision", "read", "seed", "protocol", "dtype"],
        dropped=["detail", "noise", "scale", "allowed", "change"],
    ),
    "trend": Layout(
        columns=[
            "checkpoint_step", "revision", "seed", "depth", "depth_predicted", "depth_exact", "lambda_v", "alignment",
            "num_dead_1e6", "num_learned", "num_zero_scales", "worst_block_ratio", "protocol", "dtype",
        ],
        keys=["checkpoint_step", "revision", "depth", "depth_predicted"],
        telling=["seed", "protocol", "dtype"],
        dropped=[
            "worst_block_ratio", "num_zero_scales", "num_learned", "num_dead_1e6", "alignment", "depth_exact",
            "lambda_v",
        ],
    ),
    "metrics": Layout(
        columns=[
            "metric", "seed", "trend", "first", "last", "min", "max", "change_step", "change_revision", "change",
            "unit", "protocol", "dtype",
        ],
        keys=["metric", "first", "last"],
        telling=["seed", "protocol", "dtype"],
        dropped=["min", "max", "unit", "change_revision", "change", "change_step", "trend"],
    ),
    "directions": Layout(
        columns=[
            "checkpoint_step", "revision", "angle", "angle_from_first", "depth_predicted", "depth", "num_zero_scales",
            "num_dead_1e6", "num_learned", "opened", "protocol", "dtype",
        ],
        keys=["checkpoint_step", "revision", "angle"],
        telling=["protocol", "dtype"],
        dropped=[
            "num_zero_scales", "num_dead_1e6", "depth_predicted", "depth", "num_learned", "angle_from_first", "opened",
        ],
    ),
}  # fmt: skip
