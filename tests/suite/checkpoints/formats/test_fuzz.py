"""Files that were changed at random are read as they are or refused in one line; nothing runs, nothing is written."""

import random
import sys

import numpy as np
import pytest
import torch

from deadbench.suite.checkpoints.formats import pickle_machine
from deadbench.suite.checkpoints.formats.table import FORMATS
from deadbench.suite.checkpoints.tensors import read_raw
from deadbench.suite.errors import CheckpointError
from tests.suite.checkpoints.formats.ggufs import gguf, llama_like
from tests.suite.checkpoints.formats.memory import MemoryFiles, saved

WORDS = (
    b"cos\nsystem\n",
    b"\x93",
    b"R",
    b"b",
    b"\x81",
    b"Q",
    b"\xff" * 8,
    b"cbuiltins\neval\n",
    b"\x94",
    b"(",
    b"PK\5\6",
)
FEW, MANY = 400, 20_000


def seeds():
    state = torch.nn.Sequential(torch.nn.LayerNorm(3), torch.nn.Linear(3, 2)).state_dict()
    value = {"state_dict": state, "global_step": 7, "hyper": {"lr": 0.1, "betas": (0.9, 0.99), "tags": {"a"}}}
    zipped, old = saved(value), saved(value, _use_new_zipfile_serialization=False)
    start = zipped.index(b"\x80\x02}")
    facts = llama_like("llama", 4, 2, "attention.layer_norm_rms_epsilon") | {"tokenizer.ggml.tokens": ["a", "b"]}
    of_gguf = gguf(facts, {"output_norm.weight": np.ones(4), "token_embd.weight": np.ones((3, 4))})
    return {"gguf": [of_gguf], "torch": [zipped, old, zipped[start : zipped.index(b".PK", start) + 1]]}


def changed(raw, random):
    """The bytes with some flipped, cut out, repeated, or with a word put in."""
    raw = bytearray(raw)
    for _ in range(random.randint(1, 4)):
        at, kind = random.randrange(len(raw) + 1), random.randrange(5)
        if kind == 0 and at < len(raw):
            raw[at] = random.randrange(256)
        elif kind == 1:
            del raw[at : at + random.randint(1, 9)]
        elif kind == 2:
            raw[at:at] = random.choice(WORDS)
        elif kind == 3:
            raw[at:at] = raw[at : at + random.randint(1, 60)]
        else:
            del raw[at:]
        raw = raw or bytearray(b"x")
    return bytes(raw)


def whole(name, raw):
    """All that a reader does with a file: its header, then its tensors."""
    files = MemoryFiles(w__bin=raw)
    of = next(each for each in FORMATS if each.name == name)
    for entry in of.read(files, "w.bin").entries:
        read_raw(files, entry)


def fuzz(number, seed):
    picks = random.Random(seed)
    touched, told = [], []
    watched = ("open", "os.system", "subprocess.Popen", "import", "exec", "socket.connect", "os.remove", "os.mkdir")
    files = {name: list(raws) for name, raws in seeds().items()}
    armed = True

    def hook(event, arguments):
        if armed and event in watched:
            touched.append((event, arguments))

    sys.addaudithook(hook)  # stays for the life of the process, and is disarmed below
    try:
        for _ in range(number):
            name = picks.choice(list(files))
            raw = changed(picks.choice(files[name]), picks)
            try:
                whole(name, raw)
            except CheckpointError as error:
                told.append(str(error))
    finally:
        armed = False
    assert not touched
    assert len(told) > number / 2
    assert not any("\n" in line for line in told)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(pickle_machine, "MAX_OPCODES", 100_000)


def test_a_few_hundred_changed_files(few_steps):
    fuzz(FEW, 1)


@pytest.mark.full
def test_many_changed_files(few_steps):
    fuzz(MANY, 2)
