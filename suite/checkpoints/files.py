"""What a reader of headers asks of the place where a checkpoint lies."""

from typing import Protocol


class Files(Protocol):
    """Where a checkpoint's files are; implemented by `suite/checkpoints/checkpoint.py:Checkpoint`."""

    def names(self) -> list[str]:
        """File names in the checkpoint folder."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` of a file."""
