"""numpy's threads beside torch's, on the same cores: those that have nothing to do are to sleep."""

import os


def let_idle_threads_sleep() -> None:
    """Have numpy's BLAS put its threads to sleep as soon as a product is done; call it before numpy is imported.

    OpenBLAS's look for work for 50 ms, on the cores where torch decomposes the next matrix: eigenpairs then take twice
    as long. What the user has set stays.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2^4 cycles, the least; read when numpy is loaded
