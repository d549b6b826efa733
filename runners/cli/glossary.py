"""`deadbench glossary`: what the words of tables and pages mean."""

import difflib
import json
from typing import Annotated

import typer

from deadbench.runners.cli.console import Debug, Json, UserError, console


def glossary(
    terms: Annotated[list[str] | None, typer.Argument(metavar="[TERM]...", help="Only these. \\[default: all]")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What the words of tables and pages mean: collapsed, deepening, learned, lost, preserved-dead and others.

    Example: [bold]deadbench glossary lost deepening[/bold]
    """
    from rich.text import Text

    from deadbench.analysis.glossary import TERMS

    for term in terms or ():
        if term not in TERMS:
            near = difflib.get_close_matches(term, TERMS, n=3) or list(TERMS)
            raise UserError(f"{term!r} is not in the glossary; choose {', '.join(near)}")
    chosen = {term: TERMS[term] for term in terms or TERMS}
    if as_json:
        print(json.dumps({"glossary": chosen}, indent=2))
        return
    for term, words in chosen.items():
        console().print(Text.assemble((term, "bold"), ": ", words))
