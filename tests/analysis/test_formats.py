import csv
import html
import io
import json
import re
from html.parser import HTMLParser

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from deadbench.analysis.cells import magnitude, text, without_secrets
from deadbench.analysis.formats import escaped, html_rows, render, rich_table
from deadbench.analysis.leaderboard import leaderboard
from deadbench.analysis.results import ResultsError
from deadbench.suite.plain_text import plain, printable

EVIL = "<script>alert(1)</script> | [red]x[/red]\n`y` \x1b[31m"


def printed(frame, title="leaderboard", width=140):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(rich_table(frame, title, width=width))
    return console.file.getvalue()


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words.append(data.strip())


@pytest.fixture
def board(frame, read):
    rows = [read(EVIL, depth=13.123456, alignment=0.99999, num_parameters=124_439_808), read("b", depth=2.0)]
    return leaderboard(frame(rows))


def test_json_is_strict_and_keeps_full_precision(board):
    document = json.loads(render({"leaderboard": board}, "json"), parse_constant=pytest.fail)
    (first, second) = document["leaderboard"]
    assert (first["model"], first["depth"], first["alignment"]) == (EVIL, 13.123456, 0.99999)
    assert second["alignment"] is None


def test_json_and_csv_have_no_infinities():
    frame = pl.DataFrame({"x": [float("nan"), float("inf"), 1.0], "l": [["a", "b"], [], None]})
    assert json.loads(render({"t": frame}, "json"), parse_constant=pytest.fail)["t"][1] == {"x": None, "l": []}
    assert render({"t": frame}, "csv").splitlines() == ["x,l", ",a; b", ',""', "1.0,"]


def test_csv_reads_back(board):
    (first, _) = csv.DictReader(io.StringIO(render({"leaderboard": board}, "csv")))
    assert (first["model"], first["depth"], first["containment"]) == (printable(EVIL), "13.123456", "")


@pytest.mark.parametrize(
    "name", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1", "\uff1d1", "=cmd|' /C calc'!A0"]
)
def test_no_cell_of_csv_is_a_formula(frame, read, name):
    (row,) = csv.DictReader(io.StringIO(render({"leaderboard": leaderboard(frame([read(name, depth=-1.0)]))}, "csv")))
    assert row["model"] == (f"'{name}" if name.isprintable() else printable(name)), "an escaped one is none"
    assert row["depth"] == "-1.0", "a number stays a number"


_ANY = st.text(st.characters(codec="utf-8"), max_size=12)
_SECRETS = st.sampled_from(
    ["", "https://me:t0psecret@host/m", "s3://b/m?token=t0psecret", "x https://h/?sig=t0psecret"]
)


@given(st.lists(st.tuples(_ANY, _SECRETS, _ANY).map(" ".join), min_size=1, max_size=3))
@settings(max_examples=12, derandomize=True, deadline=None)
def test_whatever_a_strangers_rows_say_is_printable_and_without_secrets_in_every_format(words):
    frame = pl.DataFrame({"model": words, "error": words, "depth": [1.0] * len(words)})
    for format in ("json", "csv", "md"):
        text = render({"leaderboard": frame}, format)
        assert [line for line in text.split("\n") if not line.isprintable()] == []
        assert "t0psecret" not in text
    assert "t0psecret" not in printed(frame, "rows")


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    before=st.integers(0, 300),
    words=st.sampled_from(["a", "http://a ", "a://", "s3://b/c "]),
    gap=st.integers(0, 20_100),
)
@example(before=50, words="http://a ", gap=0)
@example(before=0, words="a", gap=19_985)
def test_a_text_ends_after_fifty_places_and_never_within_one(before, words, gap):
    text = words * before + "x" * gap + "http://u:hunter2hunter2@host/m?token=abcdefgh " + words * 11_000
    shown = without_secrets(text)
    assert shown.count("://") <= 50
    assert len(shown) <= 20_001
    assert "hunter2" not in shown
    assert "abcdefgh" not in shown


@pytest.mark.parametrize("format", ["html", "latex", "md", "table"])
def test_neither_a_cell_nor_a_heading_does(format):
    words = "\x9b31m\u202e https://me:t0psecret@host/m"
    frame = pl.DataFrame({"model": [words], words: [1.0]})
    text = printed(frame, "confusion") if format == "table" else render({"confusion": frame}, format)
    assert not {"\x9b", "\u202e"} & set(text)
    assert "t0psecret" not in text


def test_the_page_s_attributes_are_no_rawer_than_its_cells():
    words = "\x00\x9b31m\u202e https://me:t0psecret@host/m"
    names = html_rows(pl.DataFrame({"model": [words], words: [1.0]}))["names"]
    assert names[0] == "model"
    assert names[1].isprintable()
    assert "t0psecret" not in names[1]


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda word: word != "expected"))
@settings(max_examples=40, derandomize=True, deadline=None)
@example('"><svg/onload=1>')
@example("=cmd|' /C calc'!A0")
@example("[a](javascript:x)")
def test_nor_is_a_heading_that_is_a_strangers_word_live(words):
    frame = pl.DataFrame({"expected": ["a"], words: [1], f"{words}\\x00": [1], f"{words}\x00": [2]})
    heading = render({"confusion": frame}, "md").split("\n")[0]
    assert not re.search(r"(?<!\\)(\\\\)*[\[<`*~]|://|www\.", heading, re.IGNORECASE)
    first = next(csv.reader(io.StringIO(render({"confusion": frame}, "csv"))))
    assert not any(re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]", name) for name in first)


@given(st.text(st.characters(codec="utf-8"), max_size=12))
@settings(max_examples=60, derandomize=True, deadline=None)
@example("[a](javascript:x)")
@example("![a](b)")
@example("<img src=x>")
@example("HTTPS://evil")
@example("WWW.evil")
@example("`a`\n# b")
def test_nothing_in_markdown_is_live(words):
    shown = escaped(plain(words))
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)(\\\\)*[\[<`|*~]|://|www\.", shown, re.IGNORECASE)
    assert html.unescape(re.sub(r"\\([\\|*`~\[])", r"\1", shown)) == html.unescape(plain(words)) or "&" in words


def test_md_is_one_line_a_row_with_escaped_cells(board):
    lines = render({"leaderboard": board}, "md").splitlines()
    assert len(lines) == 4
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\| \\[red]x\\[/red] \\`y\\`" in lines[2]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "| 13.12 |" in lines[2]
    assert "| 1.0000 |" in lines[2]
    assert "| 124M |" in lines[2]


def test_html_shows_names_as_text(board):
    page = Tags(render({"leaderboard": board}, "html"))
    assert "script" not in page.tags
    assert any("<script>alert(1)</script>" in words for words in page.words)


def test_terminal_shows_markup_as_text_and_no_escape_codes(board):
    out = printed(board)
    assert "<script>alert(1)</script> | [red]x[/red] `y`" in out
    assert "\x1b" not in out


def test_terminal_never_cuts_a_name(frame, read):
    names = [f"organisation/a-rather-long-model-name-{i}.4b-deduped" for i in range(12)]
    rows = [read(n, depth=13.0, alignment=1.0, dtype="bf16" if "-1." in n else "float32") for n in names]
    out = printed(leaderboard(frame(rows)))
    assert all(name in out for name in names)
    assert max(map(len, out.splitlines())) <= 140
    folded = "".join(printed(leaderboard(frame(rows)), width=40).split())
    assert "…" not in folded


def test_what_all_rows_share_and_errors_stand_below(frame, read):
    out = printed(leaderboard(frame([read("a", depth=1.0), read("b", status="failed", dtype=None, error="[b]no")])))
    assert "protocol standard, dtype float32" in out
    assert "b: [b]no" in out


@pytest.mark.parametrize("format", ["json", "csv", "md", "html"])
def test_empty_frame(frame, format):
    assert render({"leaderboard": leaderboard(frame([]))}, format)
    assert "model" in printed(leaderboard(frame([])))


def test_unknown_format(board):
    with pytest.raises(ResultsError, match="format 'xml' is unknown; choose json, csv, md, html"):
        render({"leaderboard": board}, "xml")


@pytest.mark.parametrize(
    ("name", "value", "unit", "expected"),
    [
        ("depth", 13.126, None, "13.13"),
        ("depth", -0.001, None, "0.00"),
        ("lambda_v", 1.234e-14, None, "1.23e-14"),
        ("value_min", 0.99994, "cosine", "0.9999"),
        ("value_min", 3.0, "dimensions", "3"),
        ("value_min", float("nan"), "decades", "-"),
        ("kernel_exact", False, None, "no"),
        ("failing", ["a", "b"], None, "a; b"),
        ("failing", [], None, "-"),
        ("failing", list("abcdefghij"), None, "a; b; c; d; e; f; g; h; and 2 more"),
        ("error", "two\nlines\u202e", None, "two lines\\u202e"),
        ("rank", None, None, "-"),
    ],
)
def test_text(name, value, unit, expected):
    assert text(name, value, unit) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(999, "999"), (216_064, "216k"), (86_567_656, "86.6M"), (124_439_808, "124M"), (1.558e9, "1.56B")],
)  # fmt: skip
def test_magnitude(count, expected):
    assert magnitude(int(count)) == expected


def test_latex_escapes_has_the_columns_of_a_page_and_says_once_what_all_rows_share(frame, read):
    rows = [read(r"a_b&50%\x{~^$#}", depth=13.123456, protocol="my_quick"), read("b", depth=2.0, protocol="my_quick")]
    table = render({"leaderboard": leaderboard(frame(rows))}, "latex")
    assert table.startswith("% needs \\usepackage{booktabs}\n")
    (line,) = [line for line in table.splitlines() if "13.12" in line]
    assert r"a\_b\&50\%\textbackslash{}x\{\textasciitilde{}\textasciicircum{}\$\#\}" in line
    assert line.count(" & ") == table.split(r"\toprule")[1].split(r"\midrule")[0].count(" & ") <= 12
    assert table.rstrip().splitlines()[-1] == r"protocol my\_quick, dtype float32"


def test_latex_of_two_protocols_has_a_column_of_them(frame, read):
    table = render({"leaderboard": leaderboard(frame([read("a", protocol="p"), read("b", protocol="q")]))}, "latex")
    assert [line.rsplit(" & ", 1)[1] for line in table.splitlines() if " & " in line] == [
        r"protocol \\ ",
        r"p \\",
        r"q \\",
    ]
