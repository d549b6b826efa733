"""A file that ends with the hash of what stands before it, so that it is known to be whole before it is believed."""

import hashlib
import io
from typing import Any

from deadbench.suite.spectra.arrow_state import StateError

_PIECE_BYTES = 2**22
_HASH = hashlib.sha256


class Hashed(io.RawIOBase):
    """Passes on to `file` what is written; `seal` ends it with the hash of all that.

    Attributes:
        written: bytes so far.
    """

    def __init__(self, file: Any):
        super().__init__()
        self._file, self._digest, self.written = file, _HASH(), 0

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Pass on."""
        self._digest.update(data)
        self._file.write(data)
        self.written += len(data)
        return len(data)

    def seal(self) -> None:
        """Write the hash; nothing may come after it."""
        self._file.write(self._digest.digest())


def check_whole(file: Any) -> None:
    """Read an open file through.

    Raises:
        StateError: it does not end with the hash of what stands before.
    """
    digest, held = _HASH(), b""
    while piece := file.read(_PIECE_BYTES):
        held += piece
        digest.update(held[: -digest.digest_size])
        held = held[-digest.digest_size :]
    if held != digest.digest():
        raise StateError("it is not whole")
