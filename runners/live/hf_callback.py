"""Looks at a model while transformers' Trainer trains it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import TrainerCallback

from deadbench.runners.live.looks import Looks
from deadbench.runners.live.measure import MOST
from deadbench.suite.architectures.live import is_sharded


class DeadDirectionCallback(TrainerCallback):
    """Reads the model every N steps, at each save and at the end; an error is a failed row and one warning.

    Without `batches` the parameters alone are read, which costs next to nothing; with them, the forward read too.
    `attach` gives the numbers to the trainer's own trackers; among `callbacks=[…]` they go to the log history alone.

    Example: `DeadDirectionCallback("results", every=100).attach(trainer)`
    """

    def __init__(
        self,
        out: str | Path,
        *,
        model: str | None = None,
        every: int | None = 100,
        batches: Iterable[Any] | None = None,
        reads: Sequence[str] | None = None,
        final_norm: str | nn.Module | None = None,
        blocks: str | nn.Module | Sequence[nn.Module] | None = None,
        taps: str = "all",
        max_tokens: int | str = MOST,
    ):
        """Write to the result set `out` as `model` (None: its class), every so many steps (None: at saves and the end).

        `batches` are held and read forward at each look; the rest as `deadbench.measure` has it.
        """
        self.looks = Looks(
            out, model=model, every=every, batches=batches, reads=reads, final_norm=final_norm, blocks=blocks,
            taps=taps, max_tokens=max_tokens,
        )  # fmt: skip
        self._trainer: Any = None

    def attach(self, trainer: Any) -> Self:
        """Add this to `trainer`, and log by it."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the training's time from here."""
        self.looks.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look, where it is time."""
        if self.looks.due(state.global_step):
            self._look(state, control, kwargs.get("model"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what was saved."""
        self._look(state, control, kwargs.get("model"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what came of it, and say what the looks cost."""
        self._look(state, control, kwargs.get("model"))
        if state.is_world_process_zero:
            self.looks.tell()

    def _look(self, state: Any, control: Any, model: nn.Module | None) -> None:
        first = state.is_world_process_zero
        if model is None or not (first or is_sharded(model)):
            return
        logged = self.looks.look(model, state.global_step, first=first)
        if not logged:
            return
        if self._trainer is None:
            state.log_history.append({**logged, "step": state.global_step})
            return
        asked = control.should_log  # which a log takes for its own
        try:
            self._trainer.log(logged)
        except Exception as error:  # a tracker's
            self.looks.warn(f"the trainer cannot log ({error})")
        finally:
            control.should_log = asked
