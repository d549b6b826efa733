"""Threads that compute to the bits of the thread that made them."""

from concurrent.futures import ThreadPoolExecutor

import torch


def like_threads(count: int, name: str) -> ThreadPoolExecutor:
    """So many, each with as many cores as torch has here.

    A new thread's libraries would take what the environment says until torch tells them, and the bits of a QR, by which
    some weights are drawn, depend on it.

    Example:
        >>> with like_threads(1, "drawing") as threads:
        ...     threads.submit(torch.get_num_threads).result() == torch.get_num_threads()
        True
    """
    return ThreadPoolExecutor(count, name, torch.set_num_threads, (torch.get_num_threads(),))
