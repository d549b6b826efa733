"""How much of what is left along v the other directions explain: the Schur complement of v in the covariance.

`S = 1/(v^T C^-1 v)` is the variance of the output along v that no linear map of the other directions predicts, and
`1 - S/lambda_v` the share that one does (Boyd, Vandenberghe, Convex Optimization, A.5.5). Noise that has nothing to do
with the rest gives `(D - 1)/N`, the share that D - 1 regressors take of N samples by chance; it is the baseline.
Shapes: N tokens, D hidden size, K deviations.
"""

import pyarrow as pa
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from deadbench.suite.spectra.arrow_state import tensor, vector
from deadbench.suite.spectra.spectrum import Spectrum

_IS_V = 0.5  # squared cosine from which the bottom eigenvector is v


class Regression:
    """Sums by which K deviations along v are regressed on the rows: n, sum z; of each deviation p sum p, p^2 and p z.

    The deviations are the projections of several evaluations of one norm, each formed as precisely as it has to be: in
    float64 p is 1e-16 and no factor of C resolves it beside rows of size one, but the sum of p z does. Parts add.
    """

    def __init__(self, hidden_size: int, num_deviations: int, device: torch.device | str = "cpu"):
        """No rows, which will come on `device`."""
        self._shape = (num_deviations + 1, hidden_size + 2)
        # Rows: 1, p_1 … p_K; columns: z, own sum, own square.
        self.sums = torch.zeros(self._shape, dtype=torch.float64, device=device)

    def update(self, rows_ND: Float[Tensor, "N D"], along_NK: Float[Tensor, "N K"]) -> None:
        """Add float64 rows, each with its deviations."""
        self.sums[0, :-2] += rows_ND.sum(0)
        self.sums[0, -2] += len(rows_ND)
        self.sums[1:, :-2] += along_NK.T @ rows_ND
        self.sums[1:, -2] += along_NK.sum(0)
        self.sums[1:, -1] += along_NK.square().sum(0)

    def merge(self, other: "Regression") -> None:
        """Add another worker's sums."""
        self.sums += other.sums

    def to_arrow(self) -> pa.Array:
        """One row of a `VECTOR` column."""
        return vector(self.sums)

    def restore(self, scalar: pa.Scalar) -> None:
        """Take what `to_arrow` packed in the place of one's own."""
        self.sums = tensor(scalar, *self._shape, device=self.sums.device)

    def finish(self, spectrum: Spectrum, direction_D: NDArray) -> list[float | None]:  # type: ignore[type-arg]
        """`1 - S/lambda_v` of each deviation, by the covariance of the rows and the unit direction v.

        With c the covariance of p and what of z is orthogonal to v, and C_P that of the latter, `lambda_v - S` is `c^T
        C_P^-1 c`. In the eigenvectors of C, a and q the coordinates of c and v, A = sum a^2/l, B = sum a q/l and
        G = sum q^2/l over all but the smallest eigenvalue l_D,

            c^T C_P^-1 c = A + (a_D^2 G - l_D B^2 - 2 B a_D q_D) / (l_D G + q_D^2)

        in which nothing is divided by l_D: the block inverse with the terms in 1/l_D cancelled by hand. C is that of
        the float32 replay for every deviation: that of the rows as executed differs from it by the roundoff squared.

        Null where nothing varies along v, and where a second direction is as dead as C can tell.
        """
        sums = self.sums.cpu()
        count = float(sums[0, -2])
        if spectrum.eigenvalues_D[-2] <= spectrum.resolution:
            return [None] * (len(sums) - 1)
        v_D = torch.from_numpy(direction_D)
        total_K, square_K = sums[1:, -2] / count, sums[1:, -1] / count
        variance_K = square_K - total_K.square()
        c_KD = sums[1:, :-2] / count - torch.outer(total_K, sums[0, :-2] / count)
        c_KD = c_KD - torch.outer(c_KD @ v_D, v_D)
        vectors_DD = torch.from_numpy(spectrum.eigenvectors_DD)
        values_D, q_D, a_KD = torch.from_numpy(spectrum.eigenvalues_D), vectors_DD @ v_D, c_KD @ vectors_DD.T
        smallest, last = values_D[-1].clamp(min=0), q_D[-1]
        if float(smallest) <= spectrum.resolution and float(last**2) < _IS_V:
            return [None] * len(c_KD)  # another direction than v is below what C resolves
        A_K = (a_KD[:, :-1].square() / values_D[:-1]).sum(-1)
        B_K = (a_KD[:, :-1] * q_D[:-1] / values_D[:-1]).sum(-1)
        G = (q_D[:-1].square() / values_D[:-1]).sum()
        a_K = a_KD[:, -1]
        explained_K = A_K + (a_K.square() * G - smallest * B_K.square() - 2 * B_K * a_K * last) / (
            smallest * G + last.square()
        )
        return [
            min(max(float(explained / variance), 0.0), 1.0) if variance > 0 else None
            for explained, variance in zip(explained_K, variance_K, strict=True)
        ]
