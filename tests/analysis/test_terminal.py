import pytest

from deadbench.analysis.layouts import LAYOUTS
from deadbench.analysis.terminal import Column, Layout, fit

NAME, LONG = "organisation/a-model-with-a-long-name", ["1.23e-14", "-4.5e-07"]


def columns(**cells):
    return [Column(name, name, values, is_text=name in ("model", "read")) for name, values in cells.items()]


def shown(fitted):
    return {column.name: width for column, width in fitted.columns}


def test_the_least_important_goes_first_and_the_keys_never():
    table = columns(model=["a", "b"], depth=["13.98", "1"], x=LONG, y=LONG, z=LONG)
    layout = Layout(columns=[], keys=["model", "depth"], dropped=["y", "x"])
    assert list(shown(fit(table, layout, 80))) == ["model", "depth", "x", "y", "z"]
    assert list(shown(fit(table, layout, 36))) == ["model", "depth", "x", "y"], "what nobody ranked goes before"
    assert list(shown(fit(table, layout, 26))) == ["model", "depth", "x"]
    assert list(shown(fit(table, layout, 16))) == ["model", "depth"]
    assert [c.name for c in fit(table, layout, 16).left_out] == ["z", "y", "x"]
    assert shown(fit(table, layout, 8)) == {}, "then it goes vertical"


def test_names_fold_before_a_key_goes_and_take_what_is_left():
    table = columns(model=[NAME], depth=["13.98"])
    layout = Layout(columns=[], keys=["model", "depth"])
    assert shown(fit(table, layout, 80)) == {"model": len(NAME), "depth": 5}
    assert shown(fit(table, layout, 30)) == {"model": 30 - 2 - 2 - 5, "depth": 5}
    assert shown(fit(table, layout, 21)) == {"model": 12, "depth": 5}
    assert shown(fit(table, layout, 20)) == {}


def test_what_tells_rows_apart_stays():
    layout = Layout(columns=[], keys=["model"], telling=["read"])
    both = columns(model=["a", "a"], read=["random", "trained"])
    assert list(shown(fit(both, layout, 16))) == ["model", "read"]
    assert shown(fit(both, layout, 12)) == {}
    alike = fit(columns(model=["a", "b"], read=["random", "random"]), layout, 12)
    assert (list(shown(alike)), alike.shared[0].shared) == (["model"], "random")
    apart = fit(columns(model=["a", "b"], read=["random", "trained"]), layout, 12)
    assert (list(shown(apart)), apart.left_out[0].name) == (["model"], "read")


def test_wide_letters_take_two_places():
    (column, width) = fit(columns(model=["模型"]), Layout([], ["model"]), 80).columns[0]
    assert (column.longest, width) == (5, 5)
    assert Column("m", "m", ["模型"]).longest == 4


@pytest.mark.parametrize("title", LAYOUTS)
def test_a_layout_ranks_every_column_it_has(title):
    layout = LAYOUTS[title]
    ranked = [*layout.keys, *layout.telling, *layout.dropped]
    assert sorted(ranked) == sorted(layout.columns)
