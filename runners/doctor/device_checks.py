"""What a device must do right: one function a check, each a small step of a real read, and the table of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from deadbench.runners.doctor.node_checks import NotHereError, UnwellError
from deadbench.runners.doctor.rates import measured
from deadbench.runners.engines.device import cause_of, free_bytes, give_back, rounds_to_tf32, settle
from deadbench.runners.planning.seconds import Rates
from deadbench.suite.spectra.directions import FLOAT64_EPS
from deadbench.suite.spectra.solvers import Checked, add_gram

_D, _N = 192, 1536


class Bench:
    """A device, its solvers, and rows with a dead direction that all checks look at."""

    def __init__(self, device: torch.device, solvers: Checked | None = None):
        """`solvers`: those of the device unless told."""
        self.device = device
        self.solvers = solvers or Checked(device.type)
        rows_ND = torch.randn(_N, _D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rows_ND[:, 3] = rows_ND[:, 4]
        self.rows_ND = rows_ND.to(device)
        self.rates: Rates | None = None

    def gram(self) -> Tensor:
        """The Gram matrix of the rows, whole, with the diagonal lifted as before a Cholesky."""
        gram_DD = self.rows_ND.T @ self.rows_ND
        gram_DD.diagonal().add_(32 * FLOAT64_EPS * gram_DD.diagonal().sum())
        return gram_DD

    def believed(self, method: str) -> str:
        """Raise UnwellError where the solvers were not believed in `method`."""
        if method in self.solvers.distrusted:
            raise UnwellError("; ".join(self.solvers.told()))
        return f"right to the certificate at D = {_D}"


def precision(bench: Bench) -> str:
    """float32 is float32."""
    settle()
    if rounds_to_tf32():
        raise UnwellError("products of float32 round to TF32, and a worker could not turn that off")
    return "TF32 is off"


def gram(bench: Bench) -> str:
    """Gram matrices are the CPU's within 32 eps."""
    here_DD = torch.zeros(_D, _D, dtype=torch.float64)
    there_DD = torch.zeros_like(here_DD, device=bench.device)
    add_gram(here_DD, bench.rows_ND.cpu())
    add_gram(there_DD, bench.rows_ND)
    error = float((there_DD.cpu() - here_DD).norm() / here_DD.norm())
    if not error <= 32 * FLOAT64_EPS:
        raise UnwellError(f"a Gram matrix differs from the CPU's by {error:.1e}; this device computes wrong")
    return f"the CPU's within {max(error, FLOAT64_EPS):.0e}"


def eigh(bench: Bench) -> str:
    """Eigenpairs of a rank-deficient matrix."""
    bench.solvers.eigh(bench.gram(), "L")
    return bench.believed("eigh")


def cholesky(bench: Bench) -> str:
    """A Cholesky factor of one that is barely positive definite."""
    _, exists = bench.solvers.cholesky(bench.gram())
    if not exists:
        raise UnwellError("a positive definite matrix is said to have no Cholesky factor; the CPU would do it")
    return bench.believed("cholesky")


def qr(bench: Bench) -> str:
    """R of rank-deficient rows."""
    bench.solvers.triangle(bench.rows_ND)
    return bench.believed("triangle")


def solve(bench: Bench) -> str:
    """Triangular solves, as rows are whitened."""
    factor_DD = torch.linalg.cholesky(bench.gram().cpu(), upper=True).to(bench.device)
    bench.solvers.solve(factor_DD.T, bench.rows_ND.T, upper=False)
    return bench.believed("solve")


def out_of_memory(bench: Bench) -> str:
    """Memory that ends is known as that, and comes back."""
    if bench.device.type != "cuda":
        raise NotHereError("no GPU")
    give_back()
    before = free_bytes(bench.device)
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        torch.empty(before // 2, dtype=torch.uint8, device=bench.device)
    except RuntimeError as error:
        if cause_of(error) != "memory":
            raise UnwellError(f"memory that ends is told as {str(error)[:80]!r}") from error
    else:
        raise UnwellError("a process takes more than its fraction of the memory")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        give_back()
    return f"told as such; {free_bytes(bench.device) / 1e9:.0f} GB free after it"


def rates(bench: Bench) -> str:
    """Rates of products and copies; they are kept."""
    bench.rates = measured(bench.device)
    return bench.rates.text()


# By the name of its line.
DEVICE_CHECKS: dict[str, Callable[[Bench], str]] = {
    "precision": precision,
    "gram": gram,
    "eigh": eigh,
    "cholesky": cholesky,
    "qr": qr,
    "triangular solve": solve,
    "out of memory": out_of_memory,
    "rates": rates,
}
