"""For Lightning: `deadbench.lightning.DeadDirectionCallback`."""

from deadbench.runners.live.lightning_callback import DeadDirectionCallback

__all__ = ["DeadDirectionCallback"]
