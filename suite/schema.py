"""The result tables: every column once, with its type, unit and meaning.

A row is a plain dict; `to_table` checks its names and gives the typed Arrow table. Undefined is null: never 0, never
NaN. A change of a column's meaning raises `SCHEMA_VERSION`; readers refuse a newer version than their own.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import pyarrow as pa

SCHEMA_VERSION = 1


class Column(NamedTuple):
    """One column of a result table."""

    name: str
    type: pa.DataType
    unit: str
    meaning: str


TEXT, INT, REAL, FLAG = pa.string(), pa.int64(), pa.float64(), pa.bool_()
TIME = pa.timestamp("us", tz="UTC")

# What identifies a read. A finished row with the same key and fingerprint is not measured again.
KEY_COLUMNS = [
    Column("model", TEXT, "", "registry id, or the SOURCE as the user gave it"),
    Column("revision", TEXT, "", "checkpoint: Hub revision or checkpoint folder; null where the source has only one"),
    Column("read", TEXT, "", "parameters, random, trained or functional"),
    Column("seed", INT, "", "seed of the random initialisation and of random inputs"),
    Column("protocol_hash", TEXT, "", "hash of everything that decides the numbers beside model and seed"),
    Column("engine", TEXT, "", "what ran the forward pass; null for a read without one"),
]
KEY = [column.name for column in KEY_COLUMNS]
RUN_ID = Column("run_id", TEXT, "", "the run that wrote the row")

READS = [
    RUN_ID,
    *KEY_COLUMNS,
    Column("source", TEXT, "", "where the configuration and the weights came from"),
    Column("source_fingerprint", TEXT, "", "hash of what was read: a changed checkpoint is read again"),
    Column(
        "source_format", TEXT, "", "what the weights are stored as: safetensors, torch, …; null where none were read"
    ),
    Column("source_step", INT, "steps", "training step that is recorded with the weights; null where none is"),
    Column("checkpoint_step", INT, "steps", "training step of the checkpoint, if its name tells, else source_step"),
    Column(
        "tokens_seen", INT, "tokens", "trained on: by its Trainer's count, else step x the registry's tokens a step"
    ),
    Column("modality", TEXT, "", "text, image or audio"),
    Column("protocol", TEXT, "", "name of the protocol and what was overridden; only equal ones are compared"),
    Column("input", TEXT, "", "input specification"),
    Column("skip_positions", INT, "positions", "first positions of each sequence that are left out of the statistics"),
    Column("num_tokens", INT, "tokens", "rows of the final norm's output that entered the statistics"),
    Column("num_distinct_inputs", INT, "tokens", "distinct token ids (text) or distinct patches (image) among them"),
    # architecture
    Column("family", TEXT, "", "what the norm does: layernorm, rmsnorm, none, other or undetermined"),
    Column("family_expected", TEXT, "", "what the registry says"),
    Column("final_norm", TEXT, "", "module path in the model that AutoModel builds; null if there is none"),
    Column("final_norm_tensor", TEXT, "", "its scale's name in the checkpoint"),
    Column("placement", TEXT, "", "pre: a norm of its own after the blocks; post: the last block's own norm"),
    Column("scale", TEXT, "", "effective scale: weight, 1+weight or implicit-one"),
    Column("has_bias", FLAG, "", "the final norm adds a shift"),
    Column("eps", REAL, "", "added to the variance (layernorm) or mean square (rmsnorm)"),
    Column("hidden_size", INT, "dimensions", "D, the width of the residual stream"),
    Column("num_blocks", INT, "blocks", "L, the number of transformer blocks"),
    Column("num_parameters", INT, "parameters", "unique parameters of the published architecture"),
    Column("objective", TEXT, "", "what the published model class is for, by its name; null where that does not tell"),
    # scales
    Column("num_zero_scales", INT, "dimensions", "|Z|, scales at most 1e-5 of the median magnitude"),
    Column("scale_harmonic", REAL, "scale^2", "HM(gamma^2) = D / sum gamma_i^-2"),
    Column("predicted_dim", INT, "dimensions", "dimension of the predicted dead subspace K; 0 without a kernel"),
    Column("depth_predicted", REAL, "decades", "closed-form depth in float32 from the scales alone, gaussian input"),
    Column(
        "depth_predicted_as_executed", REAL, "decades", "the same for the dtype that the model runs or is stored in"
    ),
    Column(
        "dead_parameters", INT, "parameters", "dead parameter directions of all norms; at most the Fisher's nullity"
    ),
    Column("dead_parameters_share", REAL, "", "dead_parameters / num_parameters"),
    # spectrum of the norm replayed in float32
    Column("alignment", REAL, "cosine", "|<v, u_D>|; carries no claim where num_zero_scales >= 2"),
    Column("containment", REAL, "cosine", "smallest singular value of U_k^T K, k = num_dead_1e10; null if k = 0"),
    Column("lambda_v", REAL, "output^2", "variance of the replayed output along v"),
    Column(
        "lambda_v_standard_error", REAL, "decades", "of log10 lambda_v, by a bootstrap over sequences; null below 8"
    ),
    Column("lambda_min", REAL, "output^2", "smallest eigenvalue of the covariance"),
    Column("lambda_second", REAL, "output^2", "second smallest eigenvalue"),
    Column("lambda_mean", REAL, "output^2", "mean eigenvalue, tr C / D"),
    Column("lambda_max", REAL, "output^2", "largest eigenvalue"),
    Column("depth", REAL, "decades", "log10(lambda_mean / lambda_v) in float32; lambda_v cut at depth_limit"),
    Column("depth_standard_error", REAL, "decades", "of depth, by a bootstrap over sequences; null below 8"),
    Column("depth_bottom", REAL, "decades", "log10(lambda_mean / lambda_min), lambda_min cut at spectrum_floor"),
    Column(
        "depth_limit",
        REAL,
        "decades",
        "deepest depth that the float64 projection resolves; a depth equal to it is at least that",
    ),
    Column("num_dead_1e4", INT, "dimensions", "eigenvalues at or below 1e-4 lambda_mean"),
    Column("num_dead_1e6", INT, "dimensions", "eigenvalues at or below 1e-6 lambda_mean"),
    Column("num_dead_1e8", INT, "dimensions", "eigenvalues at or below 1e-8 lambda_mean"),
    Column("num_dead_1e10", INT, "dimensions", "eigenvalues at or below 1e-10 lambda_mean"),
    Column("lambda_control", REAL, "output^2", "variance along a seeded random direction: the negative control"),
    Column("spectrum_method", TEXT, "", "accumulator that gave the eigenvalues"),
    Column(
        "spectrum_floor",
        REAL,
        "output^2",
        "eigenvalues above are certified to 1e-6 relative; below, rounding may decide",
    ),
    Column("lambda_min_resolved", FLAG, "", "lambda_min is above spectrum_floor"),
    # precision
    Column("depth_as_executed", REAL, "decades", "depth of the output that the model itself computed, in its dtype"),
    Column("depth_exact", REAL, "decades", "depth of the norm replayed in float64"),
    Column(
        "precision_slope", REAL, "", "log(lambda_v f32 / lambda_v f64) / log(u_f32^2 / u_f64^2): 1 algebraic, 0 not"
    ),
    Column("kernel_exact", FLAG, "", "precision_slope > 0.5: the kernel is algebraic, rounding alone fills it"),
    Column("num_algebraic", INT, "dimensions", "directions below 1e-6 lambda_mean that fall with the roundoff squared"),
    Column("num_learned", INT, "dimensions", "of those, directions as dead in float64 as in float32, or zero scales"),
    Column("num_rounding", INT, "dimensions", "of those, directions too deep to tell"),
    # what the other directions say of v
    Column(
        "schur_ratio", REAL, "", "1 - S/lambda_v, S = 1/(v^T C^-1 v): what the others explain; null with zero scales"
    ),
    Column("schur_ratio_exact", REAL, "", "the same replayed in float64"),
    Column("schur_ratio_as_executed", REAL, "", "the same of the output that the model itself computed, in its dtype"),
    Column("schur_baseline", REAL, "", "(D - 1)/N: what noise that has nothing to do with the rest gives there"),
    # residual stream
    Column("stream_mean_share", REAL, "", "variance of the final norm's input along 1/sqrt(D) over the mean variance"),
    Column(
        "stream_centred", FLAG, "", "that is rounding alone, or by stored rows zero: an RMSNorm has the kernel then"
    ),
    Column("massive_coordinates", pa.list_(INT), "", "of that input, second moment above 1000 times the median"),
    Column("massive_weight", REAL, "", "squared weight of v on them"),
    Column(
        "blocks_preserved",
        FLAG,
        "",
        "no block that was read collapsed a direction of the residual stream; null if none was",
    ),
    Column(
        "blocks_nondecreasing", INT, "blocks", "blocks that left the smallest singular value no smaller, but for noise"
    ),
    Column(
        "worst_block",
        INT,
        "block",
        "tap with the smallest ratio of smallest singular values, of those read; null if none was",
    ),
    Column("worst_block_ratio", REAL, "", "that ratio; null if no tap was read"),
    # how
    Column("engine_detail", TEXT, "", "how the engine held the model, and where random weights came from"),
    Column("tensor_parallel", INT, "devices", "devices that shared the model"),
    Column("device", TEXT, "", "device name"),
    Column("dtype", TEXT, "", "dtype of the forward pass; of the stored scale for a read without one"),
    Column("load_seconds", REAL, "s", "building and loading the model"),
    Column("forward_seconds", REAL, "s", "forward pass, without the statistics"),
    Column("spectrum_seconds", REAL, "s", "statistics and decomposition"),
    Column("peak_device_bytes", INT, "bytes", "peak accelerator memory; null on CPU"),
    Column("peak_host_bytes", INT, "bytes", "peak resident memory of the process since it started"),
    Column("versions", TEXT, "", "JSON: versions of what computed the row"),
    Column("started_at", TIME, "", "start of the read"),
    Column(
        "finished_at",
        TIME,
        "",
        "end of the read; where the clock is behind the row that it replaces, just after that one's",
    ),
    Column("attempt", INT, "", "1 for the first try of this run, 0 for what was refused before it was tried"),
    Column("flags", pa.list_(TEXT), "", "what a reader of the row should know: names of suite/reads/flags.py"),
    Column("status", TEXT, "", "ok or failed"),
    Column("error", TEXT, "", "one line; for an ok row without a final norm, why there is none"),
]

SPECTRA = [
    RUN_ID,
    *KEY_COLUMNS,
    Column("site", TEXT, "", "final_norm, or a tap of the residual stream"),
    Column("eigenvalues", pa.list_(REAL), "output^2", "eigenvalues of the centred covariance, descending"),
    Column(
        "verdicts",
        pa.list_(pa.string()),
        "",
        "algebraic, learned or rounding: each eigenvalue below 1e-6 of the mean, from the smallest",
    ),
    Column("dead_coordinates", pa.list_(pa.list_(INT)), "", "of each of these, its largest coordinates"),
    Column("dead_weights", pa.list_(pa.list_(REAL)), "", "their squared weights, to 0.9 together or 16 of them"),
]

BLOCKS = [
    RUN_ID,
    *KEY_COLUMNS,
    Column("block", INT, "", "tap: 0 the embedding output, L the stream before the final norm"),
    Column("sigma_min", REAL, "stream", "smallest singular value of the centred stream over sqrt(N)"),
    Column("sigma_median", REAL, "stream", "median singular value"),
    Column("sigma_max", REAL, "stream", "largest singular value"),
    Column("ratio", REAL, "", "sigma_min against the tap that was read before: K blocks ago with --taps every:K"),
    Column("floor", REAL, "stream", "rounding floor along the bottom direction"),
    Column("state", TEXT, "", "preserved, collapsed, preserved-dead or revived"),
    Column(
        "collapse_below",
        REAL,
        "",
        "the ratio that a fall must be below in both halves of the tokens to be a collapse, by the width and the "
        "halves' noise; null where the bottom did not fall, or was dead",
    ),
    Column("rank_limited", FLAG, "", "too few distinct inputs for the rank to mean anything"),
    Column("preserved", FLAG, "", "state is preserved or preserved-dead"),
    Column("bottom_coordinates", pa.list_(INT), "", "largest coordinates of the bottom direction"),
    Column("bottom_weights", pa.list_(REAL), "", "their squared weights"),
    Column("nondecreasing", FLAG, "", "ratio is at least 1, or below by no more than three standard errors"),
    Column("participation", REAL, "dimensions", "1 / sum u_i^4 of the bottom direction"),
    Column("massive_coordinates", pa.list_(INT), "", "second moment above 1000 times the median, largest first"),
    Column("bottom_direction", pa.list_(REAL), "", "the bottom direction itself, where state is collapsed"),
]

NORMS = [
    RUN_ID,
    *KEY_COLUMNS,
    Column("norm", TEXT, "", "module path"),
    Column("family", TEXT, "", "what the norm does"),
    Column("role", TEXT, "", "final, block, embedding, qk or other"),
    Column("scale_min", REAL, "scale", "smallest magnitude of the effective scale"),
    Column("scale_median", REAL, "scale", "median magnitude"),
    Column("scale_max", REAL, "scale", "largest magnitude"),
    Column("scale_harmonic", REAL, "scale^2", "HM(gamma^2)"),
    Column("num_zero_scales", INT, "dimensions", "|Z|"),
    Column("zero_coordinates", pa.list_(INT), "", "Z: scales at most 1e-5 of the median magnitude"),
    Column("zero_scales", pa.list_(REAL), "scale", "the effective scales there, signs kept"),
    Column("scale_mean_square", REAL, "scale^2", "mean of the squared scales"),
    Column("direction", pa.list_(REAL), "", "inverse-scale direction v, of length one; null but for the final norm"),
    Column(
        "dead_parameters",
        INT,
        "parameters",
        "dead parameter directions that it gives, read and written",
    ),
    Column("dead_parameters_written", INT, "parameters", "of those, shifts along 1 of what writes to its stream"),
]

FUNCTIONAL = [
    RUN_ID,
    *KEY_COLUMNS,
    Column("weights", TEXT, "", "trained, or random where the source has a configuration and no weights"),
    Column("site", TEXT, "", "module path, in the published architecture, of the linear map that was moved"),
    Column("norm", TEXT, "", "module path of the norm that feeds it"),
    Column("family", TEXT, "", "what that norm does"),
    Column(
        "direction",
        TEXT,
        "",
        "compensated, zero-scale or learned; a control: uncompensated, random or inverse-scale-rms; or planted-unit or "
        "planted-chain, a dead hidden unit of two or three factors",
    ),
    Column("step", REAL, "output", "e in W + e u w^T, |w| = 1, u of rms 1; the factor of a planted unit's weights"),
    Column("kl", REAL, "nats", "mean KL divergence of the output distributions; null where there are no logits"),
    Column("output_change", REAL, "", "norm of the change of logits, else of the last hidden state, over their norm"),
    Column(
        "fisher",
        REAL,
        "nats",
        "closed-form Fisher information along u w^T, kl = e^2/2 of it; null but at a replayed head",
    ),
    Column(
        "kl_order", REAL, "", "k in KL ~ step^(2k), or of output_change^2, over the direction's steps; null for gauge"
    ),
    Column("kl_order_error", REAL, "", "standard error of that fit"),
    Column("verdict", TEXT, "", "gauge (nothing moves), regular (k = 1), singular (k >= 1.9) or unresolved"),
    Column("compensation", TEXT, "", "what took u (w . beta) off: none (it is 0, or control), bias, or a bias added"),
    Column("has_bias", FLAG, "", "the map has a bias of its own; without, an added one is no parameter of the model"),
    Column(
        "tied", FLAG, "", "its matrix is shared: moved at a replayed head alone, which is no direction of the model"
    ),
    Column("num_tokens", INT, "tokens", "output rows that were compared"),
]

SAMPLES = [
    RUN_ID,
    *KEY_COLUMNS,
    Column("site", TEXT, "", "final_norm"),
    Column("total_variance", REAL, "", "trace of the covariance, over all rows, of the norm replayed in float32"),
    Column("num_tokens", pa.list_(INT), "tokens", "rows of each sequence, in the order of the input"),
    Column("sum_along", pa.list_(REAL), "", "of each sequence, the sum of v . (y - beta)"),
    Column("squares_along", pa.list_(REAL), "", "the sum of its squares"),
    Column("squares_total", pa.list_(REAL), "", "the sum of |y - beta|^2"),
]

TABLES: dict[str, list[Column]] = {
    "reads": READS,
    "spectra": SPECTRA,
    "blocks": BLOCKS,
    "norms": NORMS,
    "functional": FUNCTIONAL,
    "samples": SAMPLES,
}

Row = dict[str, Any]


@cache
def arrow_schema(table: str) -> pa.Schema:
    """Arrow schema of `table`, with `unit` and `meaning` in each field's metadata and `schema_version` in its own."""
    fields = [pa.field(c.name, c.type, metadata={"unit": c.unit, "meaning": c.meaning}) for c in TABLES[table]]
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION)})


def to_table(table: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of `table` as Arrow, missing columns null.

    Raises:
        ValueError: a row has a column that the schema does not declare.
    """
    schema = arrow_schema(table)
    for row in rows:
        unknown = set(row) - set(schema.names)
        if unknown:
            raise ValueError(f"table {table!r} has no column {sorted(unknown)}; declare it in suite/schema.py")
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
