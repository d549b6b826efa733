"""Files that were changed at random are read as they are or refused in one line; nothing runs, nothing is written."""

import argparse
import io
import random
import sys
import zipfile

import numpy as np
import pytest
import torch
import yaml

from deadbench.suite.checkpoints.dialects.litgpt import CONFIG_FILE, config_of
from deadbench.suite.checkpoints.dialects.table import translate
from deadbench.suite.checkpoints.formats import pickle_loop
from deadbench.suite.checkpoints.formats.dcp import read_dcp
from deadbench.suite.checkpoints.formats.gguf import read_gguf
from deadbench.suite.checkpoints.formats.torch_files import read_torch_file
from deadbench.suite.checkpoints.tensors import Contents, read_raw
from deadbench.suite.errors import CheckpointError
from deadbench.suite.yaml_file import YamlError, parse_yaml
from tests.suite.checkpoints.formats.ggufs import gguf, llama_like
from tests.suite.checkpoints.formats.memory import MemoryFiles, saved
from tests.suite.checkpoints.formats.sharded import save_sharded

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


def seeds(folder):
    """By reader, files that are whole."""
    state = torch.nn.Sequential(torch.nn.LayerNorm(3), torch.nn.Linear(3, 2)).state_dict()
    value = {"state_dict": state, "global_step": 7, "hyper": {"lr": 0.1, "betas": (0.9, 0.99), "tags": {"a"}}}
    zipped, old = saved(value), saved(value, _use_new_zipfile_serialization=False)
    facts = llama_like("llama", 4, 2, "attention.layer_norm_rms_epsilon") | {"tokenizer.ggml.tokens": ["a", "b"]}
    of_gguf = gguf(facts, {"output_norm.weight": np.ones(4), "token_embd.weight": np.ones((3, 4))})
    save_sharded(folder, state, (2,), further=[(("step",), 7)])
    ranks = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix}
    layers = {"decoder.layers.norm.weight": torch.ones(2, 3), "decoder.layers.map.weight": torch.ones(2, 3, 3)}
    save_sharded(folder / "core", layers, (1, 2), None)
    core = {path.name: path.read_bytes() for path in (folder / "core").iterdir() if path.suffix}
    core |= {"common.pt": saved({"args": argparse.Namespace(num_layers=2, hidden_size=3), "iteration": 5})}
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
        storages = {name: archive.read(name) for name in archive.namelist() if not name.endswith("data.pkl")}
        pickled = archive.read("archive/data.pkl")

    def zipped_again(raw):
        """A pickle that was changed, in an archive whose checksums are right."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as made:
            for name, content in {"archive/data.pkl": raw, **storages}.items():
                made.writestr(name, content)
        return {"w.bin": file.getvalue()}

    lens = {"embed.W_E": torch.ones(5, 4), "blocks.0.attn.W_Q": torch.ones(2, 4, 2), "blocks.0.ln1.w": torch.ones(4)}
    lens |= {f"blocks.0.attn.W_{kind}": torch.ones(2, 4, 2) for kind in "KV"} | {
        "blocks.0.attn.W_O": torch.ones(2, 2, 4)
    }
    nano = {"transformer.h.0.attn.c_attn.weight": torch.ones(12, 4), "transformer.ln_f.weight": torch.ones(4)}
    settings = yaml.dump({"n_layer": 2, "n_embd": 4, "n_head": 2, "rope_base": 10000, "mlp_class_name": "LLaMAMLP"})
    facts |= {"llama.attention.head_count": 2}
    packed = {
        "token_embd.weight": np.ones((3, 4)),
        "blk.0.attn_q.weight": np.ones((4, 4)),
        "output_norm.weight": np.ones(4),
    }
    return [
        (translated("llama", read_torch_file), "w.bin", saved(lens), lambda raw: {"w.bin": raw}),
        (translated("gpt2", read_torch_file), "w.bin", saved(nano), lambda raw: {"w.bin": raw}),
        (translated("llama", read_gguf), "w.gguf", gguf(facts, packed), lambda raw: {"w.gguf": raw}),
        (read_settings, CONFIG_FILE, settings.encode(), lambda raw: {CONFIG_FILE: raw}),
        (read_torch_file, "w.bin", zipped, lambda raw: {"w.bin": raw}),
        (read_torch_file, "w.bin", old, lambda raw: {"w.bin": raw}),
        (read_torch_file, "w.bin", pickled, zipped_again),
        (read_gguf, "w.gguf", of_gguf, lambda raw: {"w.gguf": raw}),
        (read_dcp, ".metadata", (folder / ".metadata").read_bytes(), lambda raw: {".metadata": raw, **ranks}),
        (read_dcp, ".metadata", (folder / "core" / ".metadata").read_bytes(), lambda raw: {".metadata": raw, **core}),
    ]


def translated(model_type, reader):
    """Reads the tensors as transformers' model has them."""
    config = {"model_type": model_type, "num_attention_heads": 2, "hidden_size": 4}
    return lambda files, name: translate(reader(files, name), lambda: config)


def read_settings(files, name):
    try:
        config_of(parse_yaml(files.read(name), name))
    except YamlError as error:
        raise CheckpointError(str(error)) from error
    return Contents([])


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


def fuzz(number, seed, folder):
    picks = random.Random(seed)
    touched, told, whole = [], [], seeds(folder)
    watched = ("open", "os.system", "subprocess.Popen", "import", "exec", "socket.connect", "os.remove", "os.mkdir")
    armed = True

    def hook(event, arguments):
        if armed and event in watched:
            touched.append((event, arguments))

    for reader, name, raw, laid_out in whole:
        read_all(reader, name, laid_out(raw))
    sys.addaudithook(hook)  # stays for the life of the process, and is disarmed below
    try:
        for _ in range(number):
            reader, name, raw, laid_out = picks.choice(whole)
            try:
                read_all(reader, name, laid_out(changed(raw, picks)))
            except CheckpointError as error:
                told.append(str(error))
    finally:
        armed = False
    assert not touched
    assert len(told) > number / 2
    assert not any("\n" in line for line in told)


def read_all(reader, name, laid_out):
    """All that is done with a file: its header, then its tensors."""
    files = MemoryFiles()
    files.files = laid_out
    for entry in reader(files, name).entries:
        read_raw(files, entry)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(pickle_loop, "MAX_OPCODES", 100_000)


def test_a_few_hundred_changed_files(few_steps, tmp_path):
    fuzz(FEW, 1, tmp_path)


@pytest.mark.full
def test_many_changed_files(few_steps, tmp_path):
    fuzz(MANY, 2, tmp_path)
