"""The final norm's read: from captured inputs and outputs of the norm to the numbers of one row.

The norm's input is replayed in float32 (`depth`, the spectrum) and float64 (`depth_exact`), because a depth belongs to
a precision; what the model itself computed is kept as `depth_as_executed`. Shapes: N tokens, D hidden size, m
dimension of the predicted dead subspace, k measured dead directions.
"""

import copy
import math

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor, nn

from deadbench.suite.architectures.norms import EffectiveNorm
from deadbench.suite.reads.distinct_rows import CELLS, MIN_DISTINCT, DistinctRows
from deadbench.suite.reads.rows import check_replay, check_rows, token_rows
from deadbench.suite.reads.stream_moments import STREAM_MOMENTS_STATE, StreamMoments, massive_coordinates
from deadbench.suite.reads.verdicts import KERNEL_SLOPE, EarlyVerdict, precision_slope
from deadbench.suite.schema import Row
from deadbench.suite.spectra.arrow_state import VECTOR, StateError, fields, struct, vector
from deadbench.suite.spectra.bootstrap import SequenceSums, sequence_lengths
from deadbench.suite.spectra.covariance import COVARIANCE_STATE, CovarianceFactor
from deadbench.suite.spectra.directions import (
    dead_subspace,
    depth_limit,
    inverse_scale_direction,
    leading_coordinates,
    zero_scales,
)
from deadbench.suite.spectra.projections import ALONG_STATE, ExactProjection, VarianceAlong, inverse_direction
from deadbench.suite.spectra.questions import AT_ONCE, Questions
from deadbench.suite.spectra.schur import Regression
from deadbench.suite.spectra.spectrum import Spectrum

STATE = pa.schema(
    {
        "spectrum": pa.struct(COVARIANCE_STATE),
        "early_float64": pa.struct(COVARIANCE_STATE),
        "along_float32": pa.struct(ALONG_STATE),
        "along_float64": pa.struct(ALONG_STATE),
        "along_executed": pa.struct(ALONG_STATE),
        "sequences": VECTOR,
        "distinct": CELLS,
        "regression": VECTOR,
        "moments": pa.struct(STREAM_MOMENTS_STATE),
    }
)
DEAD_THRESHOLDS = {"num_dead_1e4": 1e-4, "num_dead_1e6": 1e-6, "num_dead_1e8": 1e-8, "num_dead_1e10": 1e-10}
_DOUBLE_DOUBLE_EPS = 2.0**-104
_CACHED_ELEMENTS = 2**17  # 1 MB of float64: replay and projection find it in the cache


class FinalNormRead:
    """Accumulates the captured (input, output) pairs of one final norm, then gives the row.

    Args:
        module: the final norm as loaded; it is copied for the float32 replay.
        norm: its formula with its real parameters.
        first_row: how many rows of the read come before the first that is given here, to another worker.
        device: where all is summed and decomposed; the float32 replay alone is the CPU's wherever that is.
        questions: asked of each batch, and the caller's to settle when it is through.
    """

    def __init__(
        self,
        module: nn.Module,
        norm: EffectiveNorm,
        first_row: int = 0,
        device: torch.device | str = "cpu",
        questions: Questions = AT_ONCE,
    ):
        D = len(norm.scale_D)
        self.norm, self._questions = norm, questions
        self._parameters = norm.parameters(device)
        self.spectrum = CovarianceFactor(D, device)
        self._early = EarlyVerdict(D, first_row, device)
        self._replay = copy.deepcopy(module).cpu().float()
        for each in self._replay.modules():
            each._forward_hooks.clear()
        direction_D = inverse_direction(norm.scale_D)
        shift_D = None if norm.shift_D is None else torch.from_numpy(norm.shift_D)
        self.along_float32 = VarianceAlong(direction_D, shift_D, device=device)
        self.along_float64 = VarianceAlong(direction_D, shift_D, ExactProjection, device)
        self.sequences = SequenceSums(shift_D, device)
        self.distinct = DistinctRows(D, MIN_DISTINCT * D, device)
        self.regression = Regression(D, 3, device)  # of the deviations in float32, in float64 and as executed
        self.moments = StreamMoments(D, device)
        self.along_executed: VarianceAlong | None = None  # the float32 replay is what a float32 model on CPU executed

    def update(self, input_BTD: Tensor, output_BTD: Tensor, mask_BT: Bool[Tensor, "B T"] | None = None) -> None:
        """Add one forward pass of the norm; rows where `mask_BT` is False are padding.

        Raises:
            ValueError: values that are not finite, rows of zeros, or a replay that disagrees with the norm's formula.
        """
        device = self.spectrum.device
        x_ND, y_ND = (token_rows(acts, mask_BT).detach().to(device) for acts in (input_BTD, output_BTD))
        check_rows(x_ND, "before the final norm", self._questions)
        if y_ND.dtype == torch.float32 and output_BTD.device.type == "cpu":
            replay_ND = y_ND  # the model ran in the standard's own precision: bit for bit the same
            executed_N = None
        else:
            with torch.no_grad():
                replay_ND = self._replay(x_ND.cpu().float()).to(device)
            if self.along_executed is None:
                self.along_executed = self._new_along()
            executed_N = self.along_executed.update(y_ND)
        check_replay(x_ND, replay_ND, self._questions)
        self.spectrum.update(replay_ND, questions=self._questions)
        deviation_N = self.along_float32.update(replay_ND)
        self.sequences.update(replay_ND, deviation_N, sequence_lengths(output_BTD, mask_BT))
        rows = max(1, _CACHED_ELEMENTS // x_ND.shape[1]) if device.type == "cpu" else max(1, len(x_ND))
        along_N2 = torch.stack([deviation_N, deviation_N if executed_N is None else executed_N], dim=1)
        for x_chunk, replay_chunk, along in zip(
            x_ND.split(rows), replay_ND.split(rows), along_N2.split(rows), strict=True
        ):
            stream_chunk = x_chunk.double()
            exact_chunk = self.norm.of(stream_chunk, *self._parameters)
            deviation = self.along_float64.update(exact_chunk)
            self.regression.update(exact_chunk, torch.stack([along[:, 0], deviation, along[:, 1]], dim=1))
            self.moments.update(stream_chunk, x_chunk.dtype)
            self._early.update(replay_chunk, exact_chunk, self._questions)
            self.distinct.update(exact_chunk)

    def merge(self, other: "FinalNormRead") -> None:
        """Add what another worker read of the same norm on other tokens; in the order of the tokens."""
        self.spectrum.merge(other.spectrum)
        self.along_float32.merge(other.along_float32)
        self.sequences.merge(other.sequences)
        self.along_float64.merge(other.along_float64)
        if other.along_executed is not None:
            if self.along_executed is None:
                self.along_executed = other.along_executed
            else:
                self.along_executed.merge(other.along_executed)
        self._early.float64.merge(other._early.float64)
        self.distinct.merge(other.distinct)
        self.regression.merge(other.regression)
        self.moments.merge(other.moments)

    def to_arrow(self) -> pa.RecordBatch:
        """The exact state as one Arrow row; the norm itself is not in it."""
        executed = self.along_executed
        columns = {
            "spectrum": self.spectrum.to_arrow(),
            "early_float64": self._early.float64.to_arrow(),
            "along_float32": self.along_float32.to_arrow(),
            "along_float64": self.along_float64.to_arrow(),
            "along_executed": None if executed is None else executed.to_arrow(),
            "sequences": vector(torch.from_numpy(self.sequences.sums_S4)),
            "distinct": self.distinct.to_arrow(),
            "regression": self.regression.to_arrow(),
            "moments": self.moments.to_arrow(),
        }
        return struct(columns, STATE)

    def restore(self, state: pa.RecordBatch | pa.StructScalar) -> None:
        """Take the state that `to_arrow` of a read of the same norm packed, in the place of one's own.

        Raises:
            StateError: it is not whole, or of another width.
        """
        row = fields(state, STATE)
        device = self.spectrum.device
        spectrum = CovarianceFactor.from_arrow(row["spectrum"], device)
        if spectrum.hidden_size != len(self.norm.scale_D):
            raise StateError(f"a state of width {spectrum.hidden_size}; the norm's is {len(self.norm.scale_D)}")
        self.spectrum, self._early.float64 = spectrum, CovarianceFactor.from_arrow(row["early_float64"], device)
        self.along_float32.restore(row["along_float32"])
        self.along_float64.restore(row["along_float64"])
        self.sequences.sums_S4 = row["sequences"].values.to_numpy().reshape(-1, 4).copy()
        self.distinct.restore(row["distinct"])
        self.regression.restore(row["regression"])
        self.moments.restore(row["moments"])
        if row["along_executed"].is_valid:
            self.along_executed = self._new_along()
            self.along_executed.restore(row["along_executed"])

    def _new_along(self) -> VarianceAlong:
        return VarianceAlong(self.along_float32.direction_D, self.along_float32.shift_D, device=self.spectrum.device)

    @property
    def num_tokens(self) -> int:
        """Rows that entered so far."""
        return self.along_float32.count

    def finish(self) -> tuple[Row, Row]:
        """The row's spectrum and precision columns, and the row of `spectra`."""
        spectrum = self.spectrum.finish()
        verdicts = self._early.verdicts(spectrum, zero_scales(self.norm.scale_D))
        row = _spectrum_columns(spectrum, self.norm)
        row |= {f"num_{name}": verdicts.count(name) for name in ("algebraic", "learned", "rounding")}
        trace = float(spectrum.eigenvalues_D.sum())
        lambda_v, lambda_exact = self.along_float32.finish(), self.along_float64.finish()
        executed = lambda_v if self.along_executed is None else self.along_executed.finish()
        errors = self.sequences.finish(trace)
        limit = depth_limit(len(self.norm.scale_D))
        exact_limit = -math.log10(_DOUBLE_DOUBLE_EPS**2 * len(self.norm.scale_D))
        row |= {
            "lambda_v": lambda_v,
            "lambda_v_standard_error": errors.log_lambda_v,
            "depth": _depth(spectrum.mean, lambda_v, limit),
            "depth_standard_error": errors.depth,
            "depth_limit": limit,
            "depth_as_executed": _depth(spectrum.mean, executed, limit),
            "depth_exact": _depth(spectrum.mean, lambda_exact, exact_limit),
            "precision_slope": precision_slope(lambda_v, lambda_exact),
            "lambda_control": _variance_along_random(spectrum),
        }
        row |= self._schur_columns(spectrum) | self._stream_columns()
        slope = row["precision_slope"]
        row["kernel_exact"] = None if slope is None else slope > KERNEL_SLOPE
        if trace == 0:
            row |= dict.fromkeys(("depth", "depth_as_executed", "depth_exact", "depth_bottom"))
        leading = [leading_coordinates(spectrum.eigenvectors_DD[-place]) for place in range(1, len(verdicts) + 1)]
        return row, {
            "site": "final_norm",
            "eigenvalues": spectrum.eigenvalues_D.tolist(),
            "verdicts": verdicts,
            "dead_coordinates": [coordinates for coordinates, _ in leading],
            "dead_weights": [weights for _, weights in leading],
        }

    def samples(self, mean: float) -> Row:
        """The row of `samples`: what each sequence adds to the sums; `mean` is the mean eigenvalue."""
        tokens_S, *sums = self.sequences.sums_S4.T
        lists = dict(
            zip(("sum_along", "squares_along", "squares_total"), (each.tolist() for each in sums), strict=True)
        )
        variance = mean * len(self.norm.scale_D)
        return {"site": "final_norm", "total_variance": variance, "num_tokens": tokens_S.astype(int).tolist()} | lists

    def _schur_columns(self, spectrum: Spectrum) -> Row:
        """`1 - S/lambda_v` of each evaluation; null with zero scales, where v is none that C could single out."""
        names = ("schur_ratio", "schur_ratio_exact", "schur_ratio_as_executed")
        if len(zero_scales(self.norm.scale_D)):
            return dict.fromkeys([*names, "schur_baseline"])
        ratios = self.regression.finish(spectrum, inverse_scale_direction(self.norm.scale_D))
        baseline = (len(self.norm.scale_D) - 1) / spectrum.num_tokens
        return dict(zip(names, ratios, strict=True)) | {"schur_baseline": None if ratios[0] is None else baseline}

    def _stream_columns(self) -> Row:
        """Whether what the norm is fed is centred, and its massive coordinates."""
        share, centred = self.moments.mean_share()
        massive = massive_coordinates(self.moments.mean_square())
        v_D = inverse_scale_direction(self.norm.scale_D)
        return {
            "stream_mean_share": share,
            "stream_centred": centred,
            "massive_coordinates": massive,
            "massive_weight": float(np.sum(v_D[massive] ** 2)),
        }


def _spectrum_columns(spectrum: Spectrum, norm: EffectiveNorm) -> Row:
    eigenvalues_D = spectrum.eigenvalues_D
    bottom = float(eigenvalues_D[-1])
    counts = {name: spectrum.num_dead(threshold) for name, threshold in DEAD_THRESHOLDS.items()}
    v_D = inverse_scale_direction(norm.scale_D)
    return counts | {
        "num_tokens": spectrum.num_tokens,
        "alignment": float(abs(spectrum.eigenvectors_DD[-1] @ v_D)),
        "containment": _containment(spectrum, dead_subspace(norm.scale_D, norm.family), counts["num_dead_1e10"]),
        "lambda_min": bottom,
        "lambda_second": float(eigenvalues_D[-2]),
        "lambda_mean": spectrum.mean,
        "lambda_max": float(eigenvalues_D[0]),
        "depth_bottom": _depth(spectrum.mean, max(bottom, spectrum.floor), math.inf),
        "spectrum_method": spectrum.method,
        "spectrum_floor": spectrum.floor,
        "lambda_min_resolved": bottom > spectrum.floor,
    }


def _containment(spectrum: Spectrum, dead_Dm: NDArray[np.float64], k: int) -> float | None:
    """Smallest of the m singular values of `U_k^T K`: 1 if the predicted subspace lies in the measured one."""
    m = dead_Dm.shape[1]
    if k == 0 or m == 0:
        return None
    if k < m:
        return 0.0
    bottom_kD = spectrum.eigenvectors_DD[-k:]
    return float(np.linalg.svd(bottom_kD @ dead_Dm, compute_uv=False)[m - 1])


def _depth(mean: float, value: float, limit: float) -> float | None:
    if mean <= 0:
        return None
    return min(math.log10(mean) - math.log10(value), limit) if value > 0 else limit


def _variance_along_random(spectrum: Spectrum) -> float:
    direction_D = np.random.default_rng(0).standard_normal(len(spectrum.eigenvalues_D))
    coordinates_D = spectrum.eigenvectors_DD @ (direction_D / np.linalg.norm(direction_D))
    return float(np.sum(spectrum.eigenvalues_D * coordinates_D**2))
