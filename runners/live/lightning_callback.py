"""Looks at a model while Lightning trains it."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from deadbench.runners.live.looks import Looks
from deadbench.runners.live.measure import MOST
from deadbench.suite.architectures.live import is_sharded

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise ImportError("Lightning is not installed; pip install 'deadbench[lightning]'") from error


class DeadDirectionCallback(Callback):  # type: ignore[misc]
    """Reads the model every N steps, at each checkpoint and at the end; an error is a failed row and one warning.

    What is read is `pl_module.model` where there is one, else the LightningModule itself, or what `module` gives of it.
    Without `batches` the parameters alone are read, which costs next to nothing; with them, the forward read too.

    Example: `Trainer(callbacks=[DeadDirectionCallback("results", every=100)])`
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
        module: Callable[[Any], nn.Module] | None = None,
    ):
        """Write to the result set `out` as `model` (None: its class), every so many steps (None: at saves and the end).

        `batches` are held and read forward at each look; `module` gives what is read of the LightningModule; the rest
        as `deadbench.measure` has it.
        """
        self.looks = Looks(
            out, model=model, every=every, batches=batches, reads=reads, final_norm=final_norm, blocks=blocks,
            taps=taps, max_tokens=max_tokens,
        )  # fmt: skip
        self._module = module or _inner_model

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the training's time from here."""
        self.looks.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look, where it is time."""
        if trainer.global_step and self.looks.due(trainer.global_step):
            logged = self._look(trainer, pl_module)
            if logged:
                pl_module.log_dict(logged, rank_zero_only=True)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Look at what is saved."""
        self._log(trainer, self._look(trainer, pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at what came of it, and say what the looks cost."""
        self._log(trainer, self._look(trainer, pl_module))
        if trainer.is_global_zero:
            self.looks.tell()

    def _look(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        model = self._module(pl_module)
        if not (trainer.is_global_zero or is_sharded(model)):
            return {}
        return self.looks.look(model, trainer.global_step, first=trainer.is_global_zero)

    def _log(self, trainer: Any, logged: dict[str, float]) -> None:
        """Where the module's own log is closed."""
        for logger in trainer.loggers if logged else ():
            try:
                logger.log_metrics(logged, step=trainer.global_step)
            except Exception as error:  # a tracker's
                self.looks.warn(f"{type(logger).__name__} cannot log ({error})")


def _inner_model(pl_module: Any) -> nn.Module:
    inner = getattr(pl_module, "model", None)
    return inner if isinstance(inner, nn.Module) else pl_module
