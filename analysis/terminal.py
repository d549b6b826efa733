"""A table for a terminal: the columns that fit it, numbers whole or absent, names never cut.

Where all columns do not fit, what every row shares is said once below; then columns go by the rank of importance that
the table's `Layout` declares, and a line below names them. Its keys never go: they fold, and where not even that is
enough the table turns vertical, a block of lines for each row.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from deadbench.suite.plain_text import plain

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

NOTHING = "-"  # how a cell says that there is no value
_BETWEEN, _EDGES = 2, 2  # blanks between two columns, and at the two edges together
_FOLDED = 12  # a name in so many columns is still one that can be read
_SENTENCE = 30  # and prose in so many
_NAME_SHARE = 2 / 5  # of the terminal, which a name may take before columns are left out for it


class Column(NamedTuple):
    """One column as it is to be printed; `name` is what json and csv call it. A text may fold, a number never."""

    name: str
    header: str
    cells: Sequence[str]
    is_text: bool = True
    is_number: bool = False  # aligned to the right
    is_prose: bool = False  # a text that folds before a column is left out for it

    @property
    def longest(self) -> int:
        """Columns of the terminal that header and cells take when nothing folds."""
        from rich.cells import cell_len

        return max(map(cell_len, [self.header, *self.cells]))

    @property
    def least(self) -> int:
        """Columns that it takes when the text, or the words of the header, fold."""
        from rich.cells import cell_len

        words = max((cell_len(word) for word in self.header.split()), default=0)
        cells = max(map(cell_len, self.cells), default=0)
        return max(words, min(cells, _FOLDED) if self.is_text else cells)

    @property
    def shared(self) -> str | None:
        """What all rows have; None where they differ or there is none."""
        values = set(self.cells)
        return values.pop() if len(values) == 1 else None


class Layout(NamedTuple):
    """Which columns a table has on a terminal, in order, and what goes first where they do not fit.

    `keys` never go. `telling` tell rows apart: what all rows share is said below instead, and the others go last, the
    last one first, where the rows are told apart without them too. Of the rest the first of `dropped` goes first; a
    column in none of the three goes before these, the last one first.
    """

    columns: Sequence[str]
    keys: Sequence[str]
    telling: Sequence[str] = ()
    dropped: Sequence[str] = ()


class Fitted(NamedTuple):
    """What a terminal shows of a table: (column, width) from left to right, none where it goes vertical."""

    columns: list[tuple[Column, int]]
    shared: list[Column]  # said once below
    left_out: list[Column]


def fit(columns: Sequence[Column], layout: Layout, width: int) -> Fitted:
    """The columns that fit `width`, no number narrower than its longest."""
    kept: list[Column] = list(columns)
    shared: list[Column] = []
    left_out: list[Column] = []
    for column in columns:
        if _total(_wanted(kept, width)) > width and column.name in layout.telling and column.shared is not None:
            kept.remove(column)
            shared.append(column)
    for column in _by_importance(kept, layout):
        if _total(_wanted(kept, width)) <= width:
            break
        without = [each for each in kept if each is not column]
        if column.name not in layout.telling or _told_apart(without, layout) == _told_apart(kept, layout):
            kept = without
            left_out.append(column)
    widths = _wanted(kept, width)
    if _total(widths) > width:
        widths = [column.least for column in kept]
    if _total(widths) > width:
        return Fitted([], [], [])
    return Fitted(list(zip(kept, _grown(kept, widths, width), strict=True)), shared, left_out)


def table(
    columns: Sequence[Column],
    layout: Layout,
    *,
    width: int,
    title: str = "",
    notes: Sequence[str] = (),
    elsewhere: str = "",
    sections: Sequence[int] = (),
) -> "Group":
    """`columns` for a terminal of `width`, below them what they share, what was left out and the `notes`, a line each.

    `elsewhere` is the option that shows every column. After the rows in `sections` stands a rule.
    """
    from rich.console import Group
    from rich.text import Text

    columns = [column._replace(cells=[plain(cell, None) for cell in column.cells]) for column in columns]
    fitted = fit(columns, layout, width)
    below = [plain(note, None) for note in notes]
    if fitted.shared:
        below.insert(0, ", ".join(f"{column.header} {column.shared}" for column in fitted.shared))
    if fitted.left_out:
        names = ", ".join(column.name for column in fitted.left_out)
        below.append(f"not shown, for want of width: {names}" + (f"; {elsewhere} has all" if elsewhere else ""))
    body: list[RenderableType] = [Text(title, style="italic")] if title else []
    body += [_horizontal(fitted.columns, set(sections))] if fitted.columns else _vertical(columns, width)
    return Group(*body, *(Text(line, style="dim italic", overflow="fold") for line in below))


def _by_importance(columns: Sequence[Column], layout: Layout) -> list[Column]:
    """What may go, the least important first."""
    order = [name for name in layout.dropped if name not in layout.keys] + [*reversed(layout.telling)]
    may_go = [column for column in columns if column.name not in layout.keys]
    unlisted = [column for column in reversed(may_go) if column.name not in order]
    return unlisted + sorted((c for c in may_go if c.name in order), key=lambda c: order.index(c.name))


def _told_apart(columns: Sequence[Column], layout: Layout) -> int:
    """How many rows differ in what names them."""
    names = [c.cells for c in columns if c.name in layout.telling or (c.name in layout.keys and c.is_text)]
    return len(set(zip(*names, strict=True)))


def _wanted(columns: Sequence[Column], width: int) -> list[int]:
    name = max(_FOLDED, int(_NAME_SHARE * width))
    most = [_SENTENCE if c.is_prose else name for c in columns]
    return [max(c.least, min(c.longest, m)) if c.is_text else c.longest for c, m in zip(columns, most, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _BETWEEN * (len(widths) - 1) + _EDGES


def _grown(columns: Sequence[Column], widths: Sequence[int], width: int) -> list[int]:
    """The widths, with what is left of `width` given to the columns that fold, the first one first."""
    spare, grown = width - _total(widths), []
    for column, given in zip(columns, widths, strict=True):
        more = min(spare, column.longest - given)
        grown.append(given + more)
        spare -= more
    return grown


def _horizontal(columns: Sequence[tuple[Column, int]], sections: set[int]) -> "RenderableType":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Every width is given: what is printed is what `fit` decided.
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column, width in columns:
        justify = "right" if column.is_number else "left"
        grid.add_column(Text(column.header), justify=justify, width=width, overflow="fold")  # type: ignore[arg-type]
    for place, row in enumerate(zip(*(column.cells for column, _ in columns), strict=True)):
        grid.add_row(*map(Text, row), end_section=place in sections)  # Text, not str: markup in a name stays text
    return grid


def _vertical(columns: Sequence[Column], width: int) -> "list[RenderableType]":
    """A block of `header  value` lines for each row."""
    from rich.table import Table
    from rich.text import Text

    headers = min(max((len(column.header) for column in columns), default=0), width // 2)
    blocks: list[RenderableType] = []
    for row in zip(*(column.cells for column in columns), strict=True):
        block = Table.grid(padding=(0, _BETWEEN, 0, 0))
        block.add_column(width=headers, overflow="fold")
        block.add_column(width=width - headers - _BETWEEN, overflow="fold")
        for column, cell in zip(columns, row, strict=True):
            if cell not in ("", NOTHING):
                block.add_row(Text(column.header, style="bold"), Text(cell))
        blocks += [Text(""), block]
    return [*blocks, Text("")]
