"""A stranger's tokenizer.json: what it does to the process that loads it, it does to another one first."""

import json
import os
import subprocess

import pytest

from deadbench.suite.architectures import watched
from deadbench.suite.errors import InputError
from deadbench.suite.inputs import tokenizer_trial
from deadbench.suite.inputs.tokenizer_trial import check
from deadbench.suite.inputs.tokens import load_tokenizer
from tests.conftest import TWINS

TWIN = TWINS / "layernorm" / "step0"
TEXT = "In the beginning God created the heaven and the earth. " * 100
# The one in half a million steps at each place of the text; the other in so many that the library gives up.
ENDLESS, GIVEN_UP = (
    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    for pattern in (r"[^~]{0,900}[^~]{0,900}(?=\.)(?!\.)", r"(\w+\s?)+(?!.)(?=.)")
)
HUGE = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 100}
PANICS = [
    {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"pre_tokenizer": GIVEN_UP},
]


@pytest.fixture
def folder(tmp_path):
    def written(changes, name="tokenizer.json"):
        told = json.loads((TWIN / "tokenizer.json").read_text(encoding="utf-8")) | changes
        (tmp_path / name).write_text(json.dumps(told), encoding="utf-8")
        return tmp_path

    return written


@pytest.mark.subprocess
@pytest.mark.slow
def test_one_that_passes_is_tried_once_and_gives_the_same_ids(folder, monkeypatch):
    from transformers import AutoTokenizer

    path, starts = folder({}), []
    start = watched.start
    monkeypatch.setattr(watched, "start", lambda *which: starts.append(which) or start(*which))
    for _ in range(2):
        found = load_tokenizer("text", path, [TEXT])
        assert found(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(TWIN)(TEXT)["input_ids"]
    assert len(starts) == 1
    os.utime(path / "tokenizer.json", ns=(1, 1))  # another file, for all that is known
    check(path, TEXT)
    assert len(starts) == 2


@pytest.mark.subprocess
@pytest.mark.parametrize("changes", PANICS)
def test_what_panics_is_one_line_that_names_the_file(folder, changes):
    with pytest.raises(
        InputError, match=r"tokenizer\.json: loading .* crashes its library \(.*\); give another"
    ) as told:
        load_tokenizer("text", folder(changes), [TEXT])
    assert "\n" not in str(told.value)


@pytest.mark.subprocess
@pytest.mark.slow
def test_what_matches_for_ever_is_ended(folder, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "_CPU_SECONDS", 0)
    with pytest.raises(InputError, match=r"tokenizer\.json: loading .* takes more than 0 s of CPU"):
        check(folder({"pre_tokenizer": ENDLESS}), TEXT)


@pytest.mark.subprocess
@pytest.mark.slow
def test_what_takes_the_memory_is_ended(folder, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "_MEMORY_BYTES", 2**27)
    with pytest.raises(InputError, match=r"takes more than 0\.125 GB of memory"):
        check(folder({"normalizer": {"type": "Sequence", "normalizers": [HUGE] * 8}}), TEXT)


@pytest.mark.subprocess
def test_what_aborts_the_process_is_told_by_its_exit_code(folder, monkeypatch):
    def started(module, *arguments):
        doing = "import os; print('null', flush=True); input(); os.abort()"
        return subprocess.Popen(["python3", "-c", doing], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(watched, "start", started)
    with pytest.raises(InputError, match=r"crashes its library \(its process ended, exit code -6\)"):
        check(folder({}), TEXT)


@pytest.mark.subprocess
def test_a_file_that_transformers_would_take_in_its_place_is_tried_too(folder):
    folder({})
    with pytest.raises(InputError, match=r"tokenizer\.4\.0\.0\.json: loading"):
        check(folder(PANICS[2], name="tokenizer.4.0.0.json"), TEXT)


def test_a_tokenizer_without_such_a_file_needs_no_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "start", lambda *_: pytest.fail("a process was started"))
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    check(tmp_path, TEXT)


def test_a_panic_where_it_is_loaded_is_one_line_too(folder, monkeypatch):
    import transformers

    class PanicException(BaseException):  # as pyo3 makes it
        pass

    def panics(*_, **__):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(tokenizer_trial, "_tried", lambda *_: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panics)
    with pytest.raises(InputError, match="cannot be loaded .*index out of bounds"):
        load_tokenizer("text", folder({}), [TEXT])
