"""The channels of colour and shape that the plots share; the colours themselves are `analysis/colours.py`'s."""

from collections.abc import Iterable
from typing import Any

from deadbench.analysis.colours import FAMILY_COLOURS, LINE_COLOURS, TONES


def family_colour(present: list[str]) -> Any:
    """The family's colour, with a legend of the families that are there if these are several."""
    import altair as alt

    values = [family for family in FAMILY_COLOURS if family in present]
    legend = alt.Legend(orient="bottom", title=None, values=values) if len(values) > 1 else None
    return alt.Color("family:N", scale=_scale(FAMILY_COLOURS), legend=legend)


def read_shape() -> Any:
    """A circle for a random read, a diamond for a trained one."""
    import altair as alt

    shapes = alt.Scale(domain=["random", "trained"], range=["circle", "diamond"])
    return alt.Shape("read:N", scale=shapes, legend=alt.Legend(orient="bottom", title=None))


def line_colour(shown: list[str], lines: Iterable[tuple[str, str, str]] = ()) -> Any:
    """A tone a line, with a legend that one can click; `lines` are all of the result set, with model and family."""
    import altair as alt

    chosen = tones(lines)
    colours = [chosen.get(line, LINE_COLOURS[place % len(LINE_COLOURS)]) for place, line in enumerate(shown)]
    scale = alt.Scale(domain=shown, range=colours)
    return alt.Color("line:N", scale=scale, legend=alt.Legend(orient="bottom", title=None, symbolLimit=0))


def tones(lines: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """The colour of each of `lines` (line, model, family): a tone of its family, by its place among all of them.

    So it is the same in every plot. A model that has a line has that line's colour, where it goes by its name alone.
    """
    found: dict[str, str] = {}
    counts: dict[str, int] = {}
    models: dict[str, str] = {}
    for line, model, family in lines:
        tone = TONES[family][counts.get(family, 0) % len(TONES[family])]
        counts[family] = counts.get(family, 0) + 1
        found[line] = tone
        models.setdefault(model, tone)
    return models | found


def named_colour(field: str, colours: dict[str, str], present: list[str]) -> Any:
    """The colours of `colours` for the names in column `field`, with a legend of those `present`."""
    import altair as alt

    values = [name for name in colours if name in present]
    legend = alt.Legend(orient="bottom", title=None, values=values, symbolOpacity=1, symbolType="circle")
    return alt.Color(f"{field}:N", scale=_scale(colours), legend=legend)


def _scale(colours: dict[str, str]) -> Any:
    import altair as alt

    return alt.Scale(domain=list(colours), range=list(colours.values()))
