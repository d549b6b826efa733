"""Pickles are read without being run: plain values come out as Python's own reader gives them, the rest is refused."""

import argparse
import collections
import contextlib
import datetime
import pathlib
import pickle
import pickletools
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.suite.checkpoints.formats import pickle_loop
from deadbench.suite.checkpoints.formats.pickled_names import Constructor, CutOffError, Record, record
from deadbench.suite.checkpoints.formats.pickles import read_pickle
from deadbench.suite.checkpoints.formats.torch_objects import TORCH_NAMES
from deadbench.suite.errors import CheckpointError


def read(raw, names=()):
    return read_pickle(raw, "w.bin", dict(names))[0]


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda each: (
        st.lists(each) | st.dictionaries(st.text() | st.integers(-(2**100), 2**100), each) | st.tuples(each, each)
    ),
)


@settings(max_examples=40, deadline=None)
@given(plain, st.integers(2, 5))
def test_plain_values_are_as_pythons_own_reader_has_them(value, protocol):
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_names_and_repeated_values(protocol):
    shared = ["x"] * 300  # more than one byte's worth of memo
    value = {
        "ordered": collections.OrderedDict(a=1, b=[shared, shared]),
        "set": {1, "a"},
        "frozen": frozenset({(1, "a")}),
        "bytes": b"\x00\xff",
        "array": bytearray(b"ab"),
        ("a", 1): -7,
        2**40: "é" * 300,
        "size": torch.Size([2, 3]),
    }
    found = read(pickle.dumps(value, protocol), TORCH_NAMES)
    assert found == value
    assert found["ordered"]["b"][0] is found["ordered"]["b"][1]
    assert list(found["ordered"]) == ["a", "b"]


class Told:
    """Of a class that is known, with attributes of any kind."""

    def __init__(self, **fields):
        vars(self).update(fields)


size = st.lists(st.integers(0, 70_000) | st.just(2**40), max_size=4).map(torch.Size)
told = st.none() | st.integers(-(2**33), 2**33) | st.text(max_size=3) | size | st.just(int) | st.tuples(size, size)
told |= st.lists(st.integers(), max_size=2) | st.sampled_from(["a" * 300, "shared"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abcd"), told), max_size=12), st.integers(2, 5))
def test_many_objects_with_fields_of_any_kind(fields, protocol):
    """However they are laid out, alike or not: numbers of all widths, texts, classes, tuples, values met before."""
    repeated = [dict(each) for each in fields for _ in range(2)]
    known = dict(TORCH_NAMES) | {f"{__name__}.Told": record("Told")}
    found = read(pickle.dumps([Told(**each) for each in repeated], protocol), known)
    assert [each.kind for each in found] == ["Told"] * len(repeated)
    for mine, theirs in zip(found, repeated, strict=True):
        assert {name: int if isinstance(v, Constructor) else v for name, v in mine.fields.items()} == theirs


def test_a_namespace_and_devices_are_plain():
    space = argparse.Namespace(hidden_size=3, inner=argparse.Namespace(a="b"))
    found = read(
        pickle.dumps({"args": space, "device": torch.device("cuda", 1), "dtype": torch.bfloat16}, 2), TORCH_NAMES
    )
    args = found["args"]
    assert isinstance(args, Record)
    assert (args.fields["hidden_size"], args.fields["inner"].fields) == (3, {"a": "b"})
    assert found["device"] == "cuda:1"
    assert found["dtype"].name == "BF16"


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_training_scripts_keep_beside_weights_is_passed_over(protocol):
    """Hyper-parameters of Lightning, schedules, histories, dates, paths, numbers and random states."""
    by_default = collections.defaultdict(list, loss=[0.5])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    value = {
        "schedule": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5]).state_dict()["milestones"],
        "history": by_default,
        "last": collections.deque([1, 2, 3], maxlen=2),
        "step": 7,
    }
    further = {
        "when": [datetime.datetime(2020, 1, 2), datetime.timedelta(3)],
        "settings": [types.SimpleNamespace(lr=0.1), pathlib.PurePosixPath("a/b"), int, torch.__version__],
        "numpy": [np.float64(0.5), np.random.get_state()],
    }
    found = read(pickle.dumps(value | further, protocol), TORCH_NAMES)
    assert {key: found[key] for key in value} == {**value, "last": [2, 3]}
    lightning = pytest.importorskip("lightning.pytorch.utilities.parsing")
    assert read(pickle.dumps(lightning.AttributeDict(lr=0.1), protocol)) == {"lr": 0.1}


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Evil(open, "left-behind", "w"), "open"),
        (Evil(eval, "open('left-behind', 'w')"), "builtins.eval"),
        (Evil(getattr, "x", "upper"), "getattr"),
        (datetime.date(2020, 1, 1), "datetime.date"),
        (collections.ChainMap({}), "collections.ChainMap"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        ({"a": [torch.load]}, "torch.serialization.load"),  # only named, and never called
    ],
)
def test_what_is_not_known_is_refused_by_its_name(value, named, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = pickle.dumps(value, protocol)
    with pytest.raises(CheckpointError) as caught:
        read(raw, TORCH_NAMES)
    assert named.removeprefix("builtins.") in str(caught.value)
    assert "it is not opened" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


P = b"\x80\x02"
ORDERED = b"ccollections\nOrderedDict\n"
BOMBS = {
    "no end": (P + b"N0" * 40 + b"N", "cut off"),
    "protocol 0": (pickle.dumps([1], 0), "does not begin as"),
    "protocol 6": (b"\x80\x06N.", "of protocol 6"),
    "an opcode of protocol 0": (P + b"I1\n.", "the opcode 0x49"),
    "an extension": (P + b"\x82\x01.", "the opcode 0x82"),
    "a buffer outside": (b"\x80\x05\x97.", "the opcode 0x97"),
    "a persistent id": (P + b"NQ.", "refers to something outside"),
    "steps without end": (P + b"N0" * 160_000, "more than 300,000 steps"),
    "deep marks": (P + b"(" * 10_000 + b".", "more than 200 deep"),
    "a long integer": (P + b"\x8b\xff\xff\xff\x7f" + b"9" * 99, "an integer of 2,147,483,647 bytes"),
    "text that is not there": (P + b"X\xff\xff\xff\xff", "cut off"),
    "bytes that are not there": (b"\x80\x04\x8e" + b"\xff" * 8, "cut off"),
    "a list as a key": (P + b"}]Ns.", "has a list as a key"),
    "a deep tuple as a key": (P + b"}" + b")" + b"\x85" * 100_000 + b"Ns.", "has a tuple as a key"),
    "deep lists": (P + b"]" * 100_000 + b"a" * 99_999 + b".", None),
    "a call of a value": (P + b"N)R.", "calls None"),
    "a call without arguments": (P + ORDERED + b"NR.", "calls <"),
    "a call of what is no pair": (P + ORDERED + b"X\x02\x00\x00\x00ab\x85R.", "corrupt"),
    "attributes of a list": (P + b"]Nb.", "sets attributes of a list"),
    "items of a tuple": (P + b")NNs.", "sets items of a tuple"),
    "append to a dict": (P + b"}Na.", "appends to a dict"),
    "a memo that is not there": (P + b"h\x07.", "corrupt"),
    "an empty stack": (P + b"0.", "cut off or corrupt"),
    "nothing": (P + b".", "more or less than one value"),
    "two values": (P + b"NN.", "more or less than one value"),
    "no text": (P + b"X\x01\x00\x00\x00\xff.", "corrupt"),
    "a name of numbers": (b"\x80\x04K\x01K\x02\x93.", "names 1.2"),
    "a name without end": (P + b"c" + b"a" * 99_999, "corrupt"),
    "an escape in a name": (P + b"ca\n\x1b[2J\n.", r"names 'a.\\x1b"),
    "a set of a set's length, again and again": (
        P + b"c__builtin__\nset\nq\x00(" + b"N" * 1000 + b"tq\x01" + b"h\x00h\x01\x85R0" * 5_000 + b"N.",
        "more than 4,000,000 items",
    ),
    "copyreg": (P + b"ccopyreg\n_reconstructor\n(cbuiltins\ndict\ncbuiltins\ndict\n}tR.", "names copyreg._recons"),
    "keywords of a class": (b"\x80\x04cbuiltins\ndict\n)}\x92.", "the opcode 0x92"),
    "an instance of protocol 0": (P + b"(ios\nsystem\n.", "the opcode 0x69"),
    "an object of protocol 1": (P + b"(cbuiltins\ndict\no.", "the opcode 0x6f"),
    "a longer extension": (P + b"\x84\x01\x00\x00\x00.", "the opcode 0x84"),
    "the way from a known name": (
        b"\x80\x04X\x08\x00\x00\x00builtinsX\x0e\x00\x00\x00dict.__class__\x93.", "names builtins.dict.__class__",
    ),
    "a function to make values by": (P + b"ccollections\ndefaultdict\ncbuiltins\neval\n\x85R.", "names builtins.eval"),
    "attributes of a constructor": (P + ORDERED + b"}b.", "sets attributes of a Constructor"),
    "values of each other": (
        P + b"".join(b"](" + (b"h" + bytes([i - 1])) * 2 + b"eq" + bytes([i]) if i else b"]q\x00" for i in range(200))
        + b"0" * 199 + b".", None,
    ),
    "an encoding": (P + b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "_codecs.encode"),
    "a byte array of a size": (P + b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "bytearray with 2147483647"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_each_bomb_is_one_line_or_harmless(name, monkeypatch):
    monkeypatch.setattr(pickle_loop, "MAX_OPCODES", 300_000)
    raw, message = BOMBS[name]
    if message is None:
        read(raw)
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        read(raw)
    assert "\n" not in str(caught.value)


def test_a_pickle_larger_than_any_is_not_begun(monkeypatch):
    monkeypatch.setattr("deadbench.suite.checkpoints.formats.pickles.MAX_PICKLE_BYTES", 100)
    with pytest.raises(CheckpointError, match="larger than 100"):
        read(pickle.dumps(b"x" * 200, 4))


def test_one_pickle_after_another_and_where_each_ends():
    raw = pickle.dumps(1, 2) + pickle.dumps("a", 2)
    value, end = read_pickle(raw, "w", {})
    assert (value, read_pickle(raw, "w", {}, start=end)) == (1, ("a", len(raw)))
    with pytest.raises(CutOffError):
        read_pickle(raw[:-1], "w", {}, start=end)
    with pytest.raises(CutOffError):
        read_pickle(raw, "w", {}, start=len(raw))


def test_every_opcode_of_python_is_known_or_refused():
    known = {code for _, _, code in [(op.name, op.proto, op.code) for op in pickletools.opcodes]}
    assert len(known) == 68
    for code in sorted(known):
        raw = P + code.encode("latin1") + b"\x01\x00\x00\x00\x00\x00\x00\x00\n\n."
        with contextlib.suppress(CheckpointError):
            read(raw)
