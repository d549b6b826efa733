"""What a file's name says of the files that it is one of: `model-00002-of-00003.safetensors`."""

import re
from typing import NamedTuple

_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.[\w.]+)")


class Shard(NamedTuple):
    """A part of weights that are cut into files.

    Attributes:
        begin: of the names of all.
        number: of this one; the first is 1.
        of: how many there are.
        ending: of the names of all.
    """

    begin: str
    number: int
    of: int
    ending: str

    def name(self, number: int) -> str:
        """What another part is called."""
        return f"{self.begin}-{number:05d}-of-{self.of:05d}{self.ending}"


def shard_of(name: str) -> Shard | None:
    """Which part a file is, by its name; None where it is called as a whole one."""
    found = _NAME.fullmatch(name)
    return Shard(found[1], int(found[2]), int(found[3]), found[4]) if found else None
