"""numpy's threads beside torch's, on the same cores: those that have nothing to do are to sleep."""

import contextlib
import os
import threading
from collections.abc import Iterator

_ASKED = threading.Lock()
_HELD: list[int] = []  # torch's number of threads before, once for each that asks for one alone


def let_idle_threads_sleep() -> None:
    """Have numpy's BLAS put its threads to sleep as soon as a product is done; call it before numpy is imported.

    OpenBLAS's look for work for 50 ms, on the cores where torch decomposes the next matrix: eigenpairs then take twice
    as long. What the user has set stays.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2^4 cycles, the least; read when numpy is loaded


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Inside, torch computes on one thread, in the whole process.

    For thousands of products of a few tokens: several threads wait for each other before and after each, by looking,
    which beside other work takes four times the CPU.
    """
    import torch

    with _ASKED:
        _HELD.append(torch.get_num_threads() if not _HELD else _HELD[0])
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _ASKED:
            before = _HELD.pop()
            if not _HELD:
                torch.set_num_threads(before)
