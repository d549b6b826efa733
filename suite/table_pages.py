"""What a parquet file says of its columns and of their pages, by its own bytes and before any of them is decoded.

Arrow ends the process where the statistics of a column do not fit, once it is asked for that column's metadata; and it
reads as many values as a page announces, whatever the footer has of them. So the footer is read here, in its compact
thrift, and the pages of what is to be decoded are held against it. A form that no writer has is refused, not guessed.
"""

from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple

MAX_PAGE_BYTES = 2**27  # of one page, decompressed; a writer ends a page at a megabyte
_MAGIC, _TAIL = b"PAR1", 8
_WINDOW = 2**12  # bytes in which a page's header is looked for first
_HEADER_BYTES = 2**22  # at most: it may quote its least and its greatest text
_DEPTH = 12
_ENCODINGS = {
    0: "PLAIN", 2: "PLAIN_DICTIONARY", 3: "RLE", 4: "BIT_PACKED", 5: "DELTA_BINARY_PACKED",
    6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY", 8: "RLE_DICTIONARY", 9: "BYTE_STREAM_SPLIT",
}  # fmt: skip
_WIDTHS = {0: 1, 1: 4, 2: 8, 3: 12, 4: 4, 5: 8}  # bytes of a boolean, int32, int64, int96, float, double
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_LENGTH = 4  # bytes before each text of a dictionary
_HEADERS = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}  # field of a page's header that says what is in it
_ENCODING = {_DATA: 2, _DICTIONARY: 2, _DATA_V2: 4}
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BYTES, _LIST, _STRUCT = (1, 2), 3, {4: 16, 5: 32, 6: 64}, 7, 8, 9, 12
# The fields that are wanted of a footer and of a page's header: numbers, structs, lists of either or of bytes. A column
# that lies in another file or is encrypted has fields that none may have.
_NUMBER, _NAME, _NEVER = None, b"", ()
_Wanted = dict[int, Any]
_FACTS: _Wanted = {2: [_NUMBER], 3: [_NAME], 5: _NUMBER, 6: _NUMBER, 7: _NUMBER, 9: _NUMBER, 11: _NUMBER}
_COLUMN: _Wanted = {1: _NEVER, 3: _FACTS, 8: _NEVER, 9: _NEVER}
_ELEMENT: _Wanted = {1: _NUMBER, 2: _NUMBER, 3: _NUMBER, 5: _NUMBER}
_FOOTER: _Wanted = {2: [_ELEMENT], 4: [{1: [_COLUMN], 3: _NUMBER}]}
_INSIDE: _Wanted = {1: _NUMBER, 2: _NUMBER}
_PAGE: _Wanted = {1: _NUMBER, 2: _NUMBER, 3: _NUMBER, 5: _INSIDE, 7: _INSIDE, 8: {1: _NUMBER, 4: _NUMBER}}


class PagesError(ValueError):
    """A file whose bytes are not what parquet has, or not what its footer says."""


class Chunk(NamedTuple):
    """A column in one row group: where its bytes lie, its values with nulls, and bytes of its pages when unpacked."""

    path: str
    width: int | None  # bytes of a value; None of texts
    ways: frozenset[str]
    values: int
    unpacked: int
    start: int
    end: int


class Group(NamedTuple):
    """A row group."""

    rows: int
    chunks: list[Chunk]


def groups_of(file: BinaryIO) -> list[Group]:
    """The row groups of an open file.

    Raises:
        PagesError: its footer is not whole.
        OSError: it cannot be read.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length > size - _TAIL:
        raise PagesError("no footer")
    file.seek(size - _TAIL - length)
    return _groups(file.read(length))


def check_pages(file: BinaryIO, chunks: Iterable[Chunk]) -> None:
    """Hold the pages of these columns against the footer, which told how much is decoded of them.

    Raises:
        PagesError: there is more in them, or something else, than the footer says.
        OSError: they cannot be read.
    """
    size = file.seek(0, 2)
    for chunk in chunks:
        if not 0 <= chunk.start <= chunk.end <= size:
            raise PagesError(f"{chunk.path} lies outside the file")
        values = unpacked = 0
        place = chunk.start
        while place < chunk.end:
            kind, page, length = _page_at(file, place, chunk.end)
            inside, page_bytes = page.get(_HEADERS[kind], {}), _number(page, 2)
            count, way = _number(inside, 1), _ENCODINGS.get(_number(inside, _ENCODING[kind]))
            if kind == _DICTIONARY:  # its own encoding is not told by every writer
                fits = count * (chunk.width or _LENGTH) <= page_bytes
            else:
                fits = way in chunk.ways
                values += count
            if not fits or page_bytes > MAX_PAGE_BYTES:
                raise PagesError(f"a page of {chunk.path} is not what the footer says, or too large")
            unpacked += page_bytes
            place += length + _number(page, 3)
        if place != chunk.end or values != chunk.values or unpacked > chunk.unpacked:
            raise PagesError(f"the pages of {chunk.path} are not what the footer says")


def _page_at(file: BinaryIO, place: int, end: int) -> tuple[int, dict[int, Any], int]:
    """Kind of the page at `place`, its header, and the header's length."""
    window = _WINDOW
    while True:
        file.seek(place)
        held = file.read(min(window, end - place))
        try:
            page, length = _struct(held, 0, _PAGE)
            break
        except IndexError:
            if window >= _HEADER_BYTES or len(held) < window:
                raise PagesError("a page's header has no end") from None
            window *= 16
    kind = page.get(1)
    if kind not in _HEADERS:
        raise PagesError("a page of no known kind")
    return kind, page, length


def _groups(footer: bytes) -> list[Group]:
    try:
        whole, _ = _struct(footer, 0, _FOOTER)
        widths = _leaf_widths(whole.get(2, []))
        return [_group(each, widths) for each in whole.get(4, [])]
    except (IndexError, UnicodeDecodeError) as error:
        raise PagesError("a torn footer") from error


def _leaf_widths(elements: list[Any]) -> list[tuple[int | None, bool]]:
    """Of each column: bytes of a value, and whether a row has any number of them."""
    found, open_groups = list[tuple[int | None, bool]](), [(1, False)]
    for element in elements:
        while open_groups and not open_groups[-1][0]:
            open_groups.pop()
        if not open_groups or len(open_groups) > _DEPTH:
            raise PagesError("a schema of no form")
        left, repeated = open_groups.pop()
        open_groups.append((left - 1, repeated))
        repeated = repeated or element.get(3) == 2
        if element.get(5):
            open_groups.append((_number(element, 5), repeated))
        elif 1 in element:
            kind = _number(element, 1)
            found.append((_number(element, 2) if kind == 7 else _WIDTHS.get(kind), repeated))
    return found


def _group(group: dict[int, Any], widths: list[tuple[int | None, bool]]) -> Group:
    rows, columns = _number(group, 3), group.get(1, [])
    if len(columns) != len(widths):
        raise PagesError(f"{len(columns)} columns in a row group, {len(widths)} in the schema")
    chunks = []
    for column, (width, repeated) in zip(columns, widths, strict=True):
        facts = column.get(3, {})
        path = b".".join(facts.get(3, ())).decode()
        values, start, dictionary = _number(facts, 5), _number(facts, 9), facts.get(11) or 0
        if not repeated and values != rows:
            raise PagesError(f"{values} values of {path} in {rows} rows")
        if 0 < dictionary < start:
            start = dictionary
        ways = frozenset(_ENCODINGS.get(each, "unknown") for each in facts.get(2, ()))
        chunks.append(Chunk(path, width, ways, values, _number(facts, 6), start, start + _number(facts, 7)))
    return Group(rows, chunks)


def _number(fields: dict[int, Any], name: int) -> int:
    """A field that is a count; there must be one."""
    value: int = fields.get(name, -1)
    if value < 0:
        raise PagesError("a count that is none")
    return value


def _struct(raw: bytes, place: int, wanted: _Wanted) -> tuple[dict[int, Any], int]:
    """The wanted fields of the compact thrift struct at `place`, and where it ends; IndexError where it is cut off."""
    fields, last = dict[int, Any](), 0
    while head := raw[place]:
        place += 1
        kind, step = head & 15, head >> 4
        if step:
            last += step
        else:
            last, place = _integer(raw, place, 16)
        if last not in wanted:
            place = place if kind in _BOOLEANS else _after(raw, place, kind, 0)
            continue
        inner = wanted[last]
        if last in fields:
            raise PagesError("a field twice")
        if inner is _NUMBER and kind in _INTEGERS:
            fields[last], place = _integer(raw, place, _INTEGERS[kind])
        elif isinstance(inner, dict) and kind == _STRUCT:
            fields[last], place = _struct(raw, place, inner)
        elif isinstance(inner, list) and kind == _LIST:
            fields[last], place = _list(raw, place, inner[0])
        else:
            raise PagesError("a field of another kind")
    return fields, place + 1


def _list(raw: bytes, place: int, inner: Any) -> tuple[list[Any], int]:
    count, kind, place = _list_head(raw, place)
    values = list[Any]()
    value: Any
    for _ in range(count):
        if inner is _NUMBER and kind in _INTEGERS:
            value, place = _integer(raw, place, _INTEGERS[kind])
        elif isinstance(inner, dict) and kind == _STRUCT:
            value, place = _struct(raw, place, inner)
        elif inner == _NAME and kind == _BYTES:
            length, place = _varint(raw, place)
            value, place = raw[place : place + length], place + length
        else:
            raise PagesError("a list of another kind")
        values.append(value)
    return values, place


def _list_head(raw: bytes, place: int) -> tuple[int, int, int]:
    """How many of which kind, and where they begin."""
    count, kind = raw[place] >> 4, raw[place] & 15
    place += 1
    if count == 15:
        count, place = _varint(raw, place)
    if count > len(raw) - place:  # each takes a byte
        raise IndexError
    return count, kind, place


def _after(raw: bytes, place: int, kind: int, depth: int) -> int:
    """Where what is at `place` ends, of which nothing is wanted."""
    if kind in _INTEGERS:
        while raw[place] > 127:
            place += 1
        return place + 1
    if kind == _BYTES:
        length, place = _varint(raw, place)
        return place + length
    if depth > _DEPTH:
        raise PagesError("nested too deep")
    if kind == _STRUCT:
        while head := raw[place]:
            place += 1
            if head < 16:
                place = _after(raw, place, 4, depth)
            kind = head & 15
            if kind in _INTEGERS:
                while raw[place] > 127:
                    place += 1
                place += 1
            elif kind not in _BOOLEANS:
                place = _after(raw, place, kind, depth + 1)
        return place + 1
    if kind == _LIST:
        count, kind, place = _list_head(raw, place)
        for _ in range(count):
            place = _after(raw, place, kind, depth + 1) if kind not in _BOOLEANS else place + 1
        return place
    if kind in (_BYTE, _DOUBLE):
        return place + (1 if kind == _BYTE else 8)
    raise PagesError("a field of no known kind")


def _integer(raw: bytes, place: int, bits: int) -> tuple[int, int]:
    """A number with its sign, which takes up no more than so many bits."""
    number = raw[place]
    if number < 128:  # nearly all
        return (number >> 1) ^ -(number & 1), place + 1
    number, place = _varint(raw, place)
    if number >> bits:
        raise PagesError("a number too large for its kind")
    return (number >> 1) ^ -(number & 1), place


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    number = raw[place]
    if number < 128:
        return number, place + 1
    number, shift = number & 127, 7
    while shift < 70:
        place += 1
        number |= (raw[place] & 127) << shift
        if raw[place] < 128:
            return number, place + 1
        shift += 7
    raise PagesError("a number without end")
