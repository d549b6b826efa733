import json
import re
import xml.dom.minidom
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.analysis.pages.report import report_page, write_report
from deadbench.analysis.plots.axes import line_families, step_ticks, with_data
from deadbench.analysis.plots.channels import line_colour
from deadbench.analysis.plots.export import save_plot, save_plots
from deadbench.analysis.plots.models import depth_plot, size_plot, slope_plot
from deadbench.analysis.plots.spectra import MAX_POINTS, block_plot, downsampled, spectra_plot
from deadbench.analysis.plots.training import training_plot
from deadbench.analysis.results import ResultsError, scan

EVIL = "</script><script>alert(1)</script>"


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.scripts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data


@pytest.fixture
def history(read):
    spectrum = {"lambda_mean": 1.0, "lambda_v": 1e-13, "depth": 13.0, "num_parameters": 1000}
    rows = [read(EVIL, "random", **spectrum), read("other", "random", **spectrum)]
    rows += [read(EVIL, revision=f"step{s}", checkpoint_step=s, **spectrum) for s in (0, 16, 128)]
    return [*rows, read("broken", status="failed", error="out of <b>memory</b>", minute=5)]


@pytest.fixture
def location(result_set, history):
    return result_set(history, {i: [2.0, 1.0, -1e-20, 1e-13] for i in range(5)})


def test_the_page_is_whole_and_loads_nothing(location, tmp_path):
    out = tmp_path / "report.html"
    write_report(location, out)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["report.html"]
    assert out.stat().st_size < 5e6
    page = Page(out.read_text(encoding="utf-8"))
    for _, attributes in page.elements:
        assert not {"src", "srcset"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"@import|url\(", "".join(re.findall(r"<style>.*?</style>", out.read_text(), re.DOTALL)))


def test_names_are_text_and_never_script(location):
    text = report_page(location)[0]
    page = Page(text)
    tables, _library, data, _drawing = page.scripts
    assert EVIL not in tables
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "out of &lt;b&gt;memory" in text
    specs = json.loads(data, parse_constant=pytest.fail)
    assert len(specs) == 6, "spectra, depth, size, slopes, and two of training"
    assert {row["line"] for row in specs[0]["datasets"]["points"]} == {EVIL, "other"}


def test_a_result_set_without_measurements_has_a_page_without_plots(result_set, read):
    page = report_page(result_set([read("m", "parameters", depth_predicted=13.0)]))[0]
    assert len(Page(page).scripts) == 1, "tables sort; there is nothing to draw"
    assert "predicted" in page


def test_provenance_hides_passwords_and_bears_odd_versions(result_set, read):
    from deadbench.analysis.pages.report import provenance

    rows = [
        read("a", versions='{"torch": "2.13"}'),
        read("b", versions='{"torch": "2.14"}', run_id="run-2"),
        read("c", versions="x"),
    ]
    facts = provenance("ftp://me:secret@host/set", scan(result_set(rows)))
    assert facts["results"] == "ftp://host/set"
    assert facts["versions"] == "torch 2.13 and 2.14"
    assert facts["runs"] == "2: run-1, run-2"
    assert facts["reads"] == "3 ok, 0 failed, of 3 models"


def test_a_failure_leaves_the_old_page_and_nothing_else(location, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(location, out)
    assert out.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["report.html"]


def test_no_result_set(tmp_path):
    with pytest.raises(ResultsError, match="no such result set"):
        write_report(str(tmp_path / "absent"), tmp_path / "report.html")


def test_downsampling_keeps_both_ends_and_leaves_out_what_a_log_axis_cannot_show():
    values = [1.0 / (i + 1) for i in range(5000)]
    points = downsampled(values)
    assert len(points) == MAX_POINTS
    assert [p["value"] for p in points[:50]] == values[:50]
    assert [p["value"] for p in points[-50:]] == values[-50:]
    assert (points[0]["place"], points[-1]["place"]) == (5000, 1)
    assert downsampled([2.0, 0.0, -1.0, float("nan"), float("inf")]) == [{"place": 5, "value": 2.0}]
    assert [len(downsampled([1.0] * n)) for n in (0, 1, 200, 201, 260)] == [0, 1, 200, 200, 200]
    assert downsampled(None) == []


def test_spectra_are_those_of_the_read_that_speaks_for_the_model(result_set, read):
    rows = [
        read("m", run_id="old", lambda_v=1e-13, depth=13.0),
        read("m", run_id="new", lambda_v=2e-13, depth=12.7, minute=1),
        read("n", "random", depth=3.0),
    ]
    location = result_set(rows, {0: [9.0, 8.0], 1: [7.0, 6.0], 2: [5.0]})
    data = spectra_plot(scan(location), scan(location, "spectra"))["datasets"]
    assert [(p["line"], p["place"], p["value"]) for p in data["points"]] == [
        ("m", 2, 7.0),
        ("m", 1, 6.0),
        ("n", 1, 5.0),
    ]
    (along_v,) = data["along_v"]
    assert (along_v["line"], along_v["place"], along_v["value"]) == ("m", 1, 2e-13)


def test_lines_carry_protocol_and_dtype_only_where_they_differ(frame, read):
    rows = [read("m", depth=1.0), read("m", "random", depth=2.0)]
    assert {p["line"] for p in depth_plot(frame(rows))["datasets"]["depths"]} == {"m"}
    rows.append(read("m", depth=3.0, dtype="bfloat16", engine="x"))
    names = {p["line"] for p in depth_plot(frame(rows))["datasets"]["depths"]}
    assert names == {"m (standard, float32)", "m (standard, bfloat16)"}


def test_a_model_has_one_colour_in_all_plots(frame, read):
    reads = frame([read("a", depth=1.0), read("b", depth=2.0), read("c", depth=3.0)])

    def colours(shown):
        scale = line_colour(shown, line_families(reads)).to_dict()["scale"]
        return dict(zip(scale["domain"], scale["range"], strict=True))

    several = colours(["c", "a", "b"])
    assert len(set(several.values())) == 3
    assert colours(["b"]) == {"b": several["b"]}


def test_training_needs_two_checkpoints_and_positive_lambda(frame, history, read):
    one = read("single", checkpoint_step=5, revision="step5", depth=1.0, lambda_v=1.0)
    dead = [read("dead", checkpoint_step=s, revision=f"step{s}", depth=30.0, lambda_v=0.0) for s in (1, 2)]
    depth = training_plot(frame([*history, one, *dead]), "depth")["datasets"]["history"]
    assert [(p["line"], p["step"]) for p in depth] == [(EVIL, 0), (EVIL, 16), (EVIL, 128), ("dead", 1), ("dead", 2)]
    assert {p["line"] for p in training_plot(frame([*history, *dead]), "lambda_v")["datasets"]["history"]} == {EVIL}
    assert training_plot(frame([one]), "depth") is None
    assert depth_plot(frame([])) is None


def test_ticks_are_the_checkpoints_or_powers_of_ten():
    assert step_ticks([0, 16, 16, 4096]) == [0, 16, 4096]
    assert step_ticks([0, *range(1000, 143_000, 1000)]) == [0, 1, 10, 100, 1000, 10_000, 100_000]
    assert step_ticks(list(range(50, 2000, 100))) == [100, 1000]


def test_spectra_show_where_rounding_begins(result_set, read):
    rows = [read("m", lambda_v=2e-13, lambda_mean=2.0, depth=13.0, depth_predicted=13.0, spectrum_floor=1e-17)]
    location = result_set(rows, {0: [7.0, 2e-13]})
    bands = spectra_plot(scan(location), scan(location, "spectra"))["datasets"]["bands"]
    kernel, floor = bands
    assert (kernel["low"], kernel["high"]) == (pytest.approx(1e-13), pytest.approx(4e-13))
    assert floor["high"] == 1e-17
    assert floor["low"] < 1e-17


def test_block_profiles_mark_the_collapse_and_the_rank_limit(result_set, read):
    taps = [
        {"block": 0, "sigma_min": 0.1, "sigma_median": 1.0, "floor": 1e-7, "rank_limited": True},
        {"block": 1, "sigma_min": 0.2, "sigma_median": 2.0, "floor": 1e-7, "rank_limited": False},
        {
            "block": 2,
            "sigma_min": 1e-6,
            "sigma_median": 2.0,
            "floor": 1e-7,
            "rank_limited": False,
            "state": "collapsed",
        },
        {"block": 3, "sigma_min": 0.0, "sigma_median": 2.0},
    ]
    location = result_set([read("m", depth=1.0)], blocks={0: taps})
    rows = block_plot(scan(location), scan(location, "blocks"))["datasets"]["blocks"]
    assert [(r["block"], r["state"]) for r in rows] == [(0, "rank-limited"), (1, "first"), (2, "collapsed")]
    assert rows[2]["value"] == pytest.approx(5e-7)
    assert "<h2>Collapsed blocks</h2>" in report_page(location)[0]


def test_slopes_and_sizes_need_both_reads_and_two_models(frame, read):
    rows = [read("a", "random", depth=12.0, num_parameters=10), read("a", depth=13.0, num_parameters=10)]
    rows += [read("b", "random", depth=1.0, num_parameters=100)]
    assert [(r["line"], r["read"], r["depth"]) for r in slope_plot(frame(rows))["datasets"]["slopes"]] == [
        ("a", "random", 12.0), ("a", "trained", 13.0),
    ]  # fmt: skip
    assert {r["num_parameters"] for r in size_plot(frame(rows))["datasets"]["sizes"]} == {10, 100}
    assert slope_plot(frame(rows[2:])) is None
    assert size_plot(frame(rows[:2])) is None


@pytest.mark.slow
def test_plots_are_written_as_files(location, tmp_path):
    plots = write_report(location, tmp_path / "r.html")
    paths = save_plots(plots, tmp_path / "plots", "svg")
    assert len(paths) == len(plots) == 6
    assert all(path.read_bytes().startswith(b"<svg") for path in paths)
    assert b"<script" not in (tmp_path / "plots" / "depth-layernorm.svg").read_bytes()
    for format, start in (("png", b"\x89PNG"), ("PDF", b"%PDF")):
        save_plot(plots[1][1], tmp_path / f"x.{format}")
        assert (tmp_path / f"x.{format}").read_bytes().startswith(start)
    with pytest.raises(ResultsError, match=r"x\.gif: a plot is written as svg, png or pdf"):
        save_plot(plots[0][1], tmp_path / "x.gif")


def test_zero_scales_are_explained_and_not_praised(result_set, read):
    rows = [
        read("zeroed", depth=29.5, kernel_exact=True, num_zero_scales=3),
        read("plain", depth=13.1, kernel_exact=True, num_zero_scales=0),
    ]
    page, _ = report_page(result_set(rows))
    assert "zero scales: zeroed (3). Each is a dead direction that training closed (learned)" in page
    assert "<b>13.1</b><span>decades, the deepest kernel</span>" in page


def test_the_claims_begin_with_holds_and_headings_say_what_they_mean(location):
    page = report_page(location)[0]
    heads = re.findall(r'<th data-name="(\w+)" class="([^"]*)"(?: title="([^"]*)")?>', page)
    holds = next(place for place, (name, *_) in enumerate(heads) if name == "holds")
    assert [name for name, *_ in heads[holds : holds + 2]] == ["holds", "statement"]
    pinned = [name for name, classes, _ in heads if "pinned" in classes]
    assert pinned[:2] == ["model", "holds"], "what stays in sight when the table is scrolled"
    titles = {name: title for name, _, title in heads}
    assert titles["depth"] == "log10(lambda_mean / lambda_v) in float32; lambda_v cut at depth_limit; decades"
    assert "margin" not in titles["value_margin"]
    assert "negative beyond it" in titles["value_margin"]


def test_a_plots_points_know_the_row_of_their_model(location):
    page, plots = report_page(location)
    rows = re.findall(r'<tr id="([^"]+)">', page)
    assert len(rows) == len(set(rows)) == 3
    drawn = {
        point["row"]
        for title, _, panels in plots
        for _, spec in panels
        for name, points in spec["datasets"].items()
        for point in points
        if name in ("points", "depths", "sizes", "slopes")
    }
    assert drawn == {"row-other-standard-float32", "row-script-script-alert-1-script-standard-float32"} <= set(rows)
    assert f'<a href="#{rows[0]}">' in page


ODD = ["a\0b", "a\u2028b", "a\x1b[2J", "\ufffe", "\u202e", "</text>&<d", "x" * 5000]


def test_a_plot_is_drawn_of_names_that_no_svg_can_hold(result_set, read, tmp_path):
    spectrum = {"lambda_mean": 1.0, "lambda_v": 1e-13, "depth": 13.0, "num_parameters": 1000}
    location = result_set([read(name, "random", **spectrum) for name in ODD])
    (depth,) = [spec for title, spec in write_report(location, tmp_path / "r.html") if title.startswith("Depth lay")]
    save_plot(depth, tmp_path / "depth.svg")
    drawn = xml.dom.minidom.parse(str(tmp_path / "depth.svg")).toxml()
    assert all(name in drawn for name in (r"a\x00b", "a b", r"a\x1b[2J", r"\ufffe"))


@given(st.lists(st.text(max_size=400), min_size=1, max_size=4))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_whatever_is_drawn_is_printable_and_of_bounded_length(names):
    spec = {"encoding": {"color": {"scale": {"domain": names}}}, "layer": [{"calculate": "datum.x + " * 100}]}
    drawn = with_data(spec, {"rows": [{"line": name, "value": 1.0} for name in names]})
    domain = drawn["encoding"]["color"]["scale"]["domain"]
    assert all(name.isprintable() and len(name) <= 300 for name in domain)
    assert [row["line"] for row in drawn["datasets"]["rows"]] == domain, "or the colours would be another's"
    assert drawn["layer"] == spec["layer"], "expressions are ours"
