"""The directory of a zip archive by byte ranges, zip64 and archives inside a file included; where an entry lies.

Directories are untrusted: entries that overlap, leave the archive, are listed twice or are packed are refused.
"""

import struct
import zlib
from dataclasses import dataclass

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.errors import CheckpointError

MAX_DIRECTORY_BYTES = 64_000_000
_END, _END_64, _LOCATOR_64, _LISTED, _LOCAL = (b"PK" + tail for tail in (b"\5\6", b"\6\6", b"\6\7", b"\1\2", b"\3\4"))
_TAIL_BYTES, _LONGEST_TAIL = 8_192, 65_536 + 128  # what is read first, and as far as a comment can push the end record
_LOCAL_BYTES = 30
_MISSING_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class ZipEntry:
    """An entry of a directory; `header` is the byte of its own header, `limit` the byte that it must end before."""

    name: str
    header: int
    size: int
    packed: int
    method: int
    crc: int
    limit: int


def read_directory(files: Files, file: str, start: int = 0, end: int | None = None) -> dict[str, ZipEntry]:
    """The entries of the archive that lies in bytes `start` to `end` of a file (None: all of it), by name.

    Raises:
        CheckpointError: no archive, cut off, or a directory that contradicts itself; one line.
    """
    end = files.size(file) if end is None else end
    try:
        count, size, offset, before = _end_record(files, file, start, end)
        if size > MAX_DIRECTORY_BYTES:
            raise _corrupt(file, f"its directory has {size:,} bytes; at most {MAX_DIRECTORY_BYTES:,} are read")
        if offset < start or offset + size > before:
            raise _corrupt(file, "its directory lies outside the file")
        raw = files.read(file, offset, offset + size)
        listed = list(_listed(raw, file, start, count))
    except (struct.error, IndexError) as error:
        raise _corrupt(file, "its directory is cut off") from error
    ordered = sorted(listed, key=lambda each: each.header)
    ends = [*(each.header for each in ordered[1:]), offset]
    entries = {}
    for entry, limit in zip(ordered, ends, strict=False):  # an empty archive has one end too many
        if entry.header + _LOCAL_BYTES + len(entry.name.encode()) + entry.packed > limit:
            raise _corrupt(file, f"the entry {shown(entry.name)} overlaps another, or leaves the file")
        if entry.name in entries:
            raise _corrupt(file, f"it lists {shown(entry.name)} twice")
        entries[entry.name] = ZipEntry(**{**vars(entry), "limit": limit})
    return entries


def find_entry(files: Files, file: str, entry: ZipEntry) -> int:
    """The byte at which an entry's content begins, as its own header says.

    Raises:
        CheckpointError: packed, or its header contradicts the directory.
    """
    if entry.method != 0 or entry.packed != entry.size:
        raise CheckpointError(
            f"{file}: the entry {shown(entry.name)} is compressed, which torch.save does not do; unpack the archive "
            "and zip it again with compression method store"
        )
    name = entry.name.encode()
    raw = files.read(file, entry.header, entry.header + _LOCAL_BYTES + len(name))
    if len(raw) < _LOCAL_BYTES or raw[:4] != _LOCAL:
        raise _corrupt(file, f"no entry where {shown(entry.name)} should be")
    flags, method = struct.unpack_from("<HH", raw, 6)
    name_bytes, extra_bytes = struct.unpack_from("<HH", raw, 26)
    begin = entry.header + _LOCAL_BYTES + name_bytes + extra_bytes
    if flags & 1 or method != 0 or raw[_LOCAL_BYTES:] != name or begin + entry.size > entry.limit:
        raise _corrupt(file, f"the entry {shown(entry.name)} is not what the directory says")
    return int(begin)


def read_entry(files: Files, file: str, entry: ZipEntry, most: int) -> bytes:
    """The content of an entry, its checksum verified.

    Raises:
        CheckpointError: more than `most` bytes, or damaged.
    """
    if entry.size > most:
        raise CheckpointError(
            f"{file}: the entry {shown(entry.name)} has {entry.size:,} bytes; at most {most:,} are read"
        )
    begin = find_entry(files, file, entry)
    raw = files.read(file, begin, begin + entry.size)
    if len(raw) != entry.size or zlib.crc32(raw) != entry.crc:
        raise _corrupt(file, f"the entry {shown(entry.name)} does not match its checksum")
    return raw


def _end_record(files: Files, file: str, start: int, end: int) -> tuple[int, int, int, int]:
    """Number of entries, bytes of the directory, its byte in the file, and the byte that it ends before."""
    for window in (_TAIL_BYTES, _LONGEST_TAIL):
        begin = max(start, end - window)
        tail = files.read(file, begin, end)
        found = tail.rfind(_END)
        if found >= 0 or begin == start:
            break
    if found < 0:
        raise _corrupt(file, "no zip directory at its end")
    disk, first, _, count, size, offset = struct.unpack_from("<HHHHII", tail, found + 4)
    where, before = begin + found, begin + found
    if where - 20 >= start and (locator := _at(files, file, where - 20, 20, tail, begin))[:4] == _LOCATOR_64:
        before = start + struct.unpack_from("<Q", locator, 8)[0]
        if not start <= before <= where - 76:
            raise _corrupt(file, "its zip64 record lies outside the file")
        raw = _at(files, file, before, 56, tail, begin)
        if raw[:4] != _END_64:
            raise _corrupt(file, "no zip64 record where one should be")
        disk, first, _, count, size, offset = struct.unpack_from("<IIQQQQ", raw, 16)
    if disk or first:
        raise _corrupt(file, "one of several volumes")
    return count, size, start + offset, before


def _at(files: Files, file: str, where: int, count: int, tail: bytes, begin: int) -> bytes:
    """Bytes of a file, from its tail where they are in it."""
    return tail[where - begin : where - begin + count] if where >= begin else files.read(file, where, where + count)


def _listed(raw: bytes, file: str, start: int, count: int) -> list[ZipEntry]:
    position, entries = 0, []
    while position < len(raw):
        if raw[position : position + 4] != _LISTED:
            raise _corrupt(file, "its directory is damaged")
        flags, method = struct.unpack_from("<HH", raw, position + 8)
        crc, packed, size = struct.unpack_from("<III", raw, position + 16)
        name_bytes, extra_bytes, comment_bytes = struct.unpack_from("<HHH", raw, position + 28)
        (header,) = struct.unpack_from("<I", raw, position + 42)
        after = position + 46 + name_bytes
        name = raw[position + 46 : after].decode("utf-8", "replace")
        packed, size, header = _wide(raw[after : after + extra_bytes], size, packed, header)
        if flags & 1:
            raise _corrupt(file, f"the entry {shown(name)} is encrypted")
        entries.append(ZipEntry(name, start + header, size, packed, method, crc, 0))
        position = after + extra_bytes + comment_bytes
    if len(entries) != count or position != len(raw):
        raise _corrupt(file, f"its directory lists {len(entries)} entries and says that they are {count}")
    return entries


def _wide(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """(packed, size, header) with what stands in zip64's extra field where 32 bits were too few."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            size, packed, header = (
                next(values, -1) if value == _MISSING_32 else value for value in (size, packed, header)
            )
            if min(size, packed, header) < 0:
                raise IndexError
            break
        position += 4 + length
    return packed, size, header


def _corrupt(file: str, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: as a zip archive, {what}; corrupt, download the file again")
