"""For the Trainer of transformers: `deadbench.transformers.DeadDirectionCallback`."""

from deadbench.runners.live.hf_callback import DeadDirectionCallback

__all__ = ["DeadDirectionCallback"]
