"""What accumulators ask of the rows that they are given: of a device all of it at once, when a batch is through.

On the CPU an answer is there when it is asked for. A device runs behind the host, and the host waits for each answer
until it has caught up: so they are asked together, one copy a batch, and what hangs on them waits.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Questions:
    """Numbers that decide what is done with rows; `settle` has what is not yet answered answered, in the order asked.

    Attributes:
        at_once: whether each is answered as it is asked.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        """Where the numbers are."""
        self.at_once = torch.device(device).type == "cpu"
        self._waiting: list[tuple[Tensor | None, Callable[[list[float]], None]]] = []

    def ask(self, numbers_K: Tensor, then: Callable[[list[float]], None]) -> None:
        """Call `then` with the numbers; on a device, when it is settled."""
        if self.at_once:
            then(numbers_K.tolist())
        else:
            self._waiting.append((numbers_K.double(), then))

    def after(self, then: Callable[[], None]) -> None:
        """Call `then` after what hangs on the questions before it."""
        if self.at_once:
            then()
        else:
            self._waiting.append((None, lambda numbers: then()))

    def settle(self) -> None:
        """Wait for the device once, if anything was asked, and again for what is asked meanwhile."""
        while self._waiting:
            self._settle()

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        asked = [numbers_K for numbers_K, _ in waiting if numbers_K is not None]
        answers = torch.cat(asked).cpu().tolist() if asked else []
        for numbers_K, then in waiting:
            count = 0 if numbers_K is None else len(numbers_K)
            then(answers[:count])
            answers = answers[count:]


AT_ONCE = Questions()
