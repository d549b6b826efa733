"""`--help` on a narrow terminal: an option's name whole, its words below it; Typer's table of six columns would cut."""

from typing import Any

from typer.core import TyperCommand, TyperGroup

_NARROW = 90  # columns, below which the longest options leave no room for words beside them
_CELLS = 6  # at least, of an option's row: names and short names, those that deny, type, words


class Command(TyperCommand):
    """A command whose help no terminal cuts."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        _fit_narrow_terminals()
        super().format_help(ctx, formatter)


class Group(TyperGroup):
    """The group of commands, whose help no terminal cuts."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        _fit_narrow_terminals()
        super().format_help(ctx, formatter)


def _fit_narrow_terminals() -> None:
    """Give Typer's help a table that puts an option's words below its name, where the terminal is narrow."""
    import typer.rich_utils
    from rich.console import Group as Lines
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    width = typer.rich_utils._get_rich_console().width

    class Folding(Table):
        """A table that folds what is too long, and on a narrow terminal has an option's words below its name."""

        def add_row(self, *cells: Any, **options: Any) -> None:
            if len(cells) >= _CELLS and width < _NARROW:
                *names, words = cells
                named = [each if isinstance(each, Text) else Text(str(each)) for each in names]
                cells = (Lines(Text(" ").join(each for each in named if each), Padding(words, (0, 0, 0, 4))),)
            super().add_row(*cells, **options)
            for column in self.columns:
                column.overflow = "fold"

    typer.rich_utils.Table = Folding  # type: ignore[attr-defined]
