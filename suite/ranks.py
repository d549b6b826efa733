"""Processes that do one read together, in step: what they share, and what one's failure is to the others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa


class RankError(ValueError):
    """What a rank raised, once all ranks know of it."""


@dataclass(frozen=True)
class Ranks:
    """Processes that do one read together, in step; by default a process is alone.

    Attributes:
        rank: this process, of `size`.
        stages: groups of `size` processes, each with a part of the blocks: what is given goes to those of all stages.
        gather: gives every rank the list of what each gave.
        collect: `(mine, rank)`: gives that rank the list of the states that each gave, and the others an empty list.
        divided: "taps": all see the whole stream, and rank r reads the taps r, r + size, r + 2 size, …; "tokens": each
            has a part of the tokens, rank r the r-th, and at the end of a pass what they saw of a tap is merged.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda mine: [mine]
    collect: Callable[[pa.RecordBatch | None, int], list[pa.RecordBatch | None]] = lambda mine, rank: [mine]
    divided: Literal["taps", "tokens"] = "taps"
    stages: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size * self.stages == 1

    @property
    def replicas(self) -> bool:
        """Whether each rank has a part of the tokens."""
        return self.size > 1 and self.divided == "tokens"

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank raises inside, all raise, here or where they next ask: none is left waiting for another."""
        try:
            yield
        except RankError:
            raise  # told already
        except Exception as error:
            if self.alone:
                raise
            text = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self.gather((text, None))
            raise RankError(text) from error
        self.share(None)

    def share(self, mine: Any) -> list[Any]:
        """What each rank gave.

        Raises:
            RankError: another rank has failed instead.
        """
        if self.alone:
            return [mine]
        given = self.gather((None, mine))
        told = [text for text, _ in given if text is not None]
        if told:
            raise RankError(told[0])
        return [value for _, value in given]
