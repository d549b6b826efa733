"""The census: one row a source whatever it holds, nothing lost and nothing twice, and servers' limits kept."""

import asyncio
import contextlib
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import polars as pl
import psutil
import pytest
from safetensors.numpy import save_file

from deadbench.runners.census import census
from deadbench.runners.census.census import CensusError, list_sources
from deadbench.runners.census.worker import PauseBoard, census_row
from deadbench.runners.cluster import joining
from deadbench.runners.results import outbox
from deadbench.runners.results.outbox import UnwritableError
from deadbench.runners.results.store import ResultStore
from deadbench.suite.checkpoints import rate_limits as host_limits
from deadbench.suite.checkpoints.rate_limits import HostLimits, named_wait
from deadbench.suite.reads.classify import classify
from deadbench.suite.schema import to_table
from tests.conftest import ROOT, TINY_NEOX, TWINS, save_tiny
from tests.runners.many_checkpoints import serving, sparse_checkpoint
from tests.suite.checkpoints.formats.ggufs import gguf, llama_like
from tests.suite.checkpoints.formats.sharded import save_sharded
from tests.suite.checkpoints.formats.test_trainers import deepspeed, deepspeed_zero3, gpt_neox
from tests.suite.checkpoints.test_adapters import write_adapter

# Ray Data copies its own context, deprecated settings and all.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*", "ignore:.use_:DeprecationWarning")
NEOX = TINY_NEOX | {"hidden_size": 64}
LLAMA = NEOX | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-6}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Two checkpoints that a server multiplies."""
    root = tmp_path_factory.mktemp("kinds")
    final = "gpt_neox.final_layer_norm"
    sparse_checkpoint(root / "neox", NEOX, f"{final}.weight", f"{final}.bias", blocks=2)
    sparse_checkpoint(root / "llama", LLAMA, "model.norm.weight", None, blocks=2)
    return root


def listed(folder, sources):
    path = folder / "sources.txt"
    path.write_text("\n".join(sources) + "\n", encoding="utf-8")
    return path


def reads(out):
    return pl.scan_parquet(out / "reads" / "*.parquet").collect()


def test_the_file_of_sources(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text(
        "\n# ours\norg/a\n\n  org/a@main  # again\nhf://org/a\norg/a@step7\nhttps://x/y/\nhttps://x/y\nruns/._a\n.DS_Store\n"
    )
    assert list_sources(str(path)) == ["org/a", "org/a@step7", "https://x/y/"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"none.txt: cannot be read \(no such file\)"),
        (b"\n# nothing\n", "names no sources"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"org/a\norg/\x00b\n", "none.txt:2: not printable text"),
        (b"org/a\n" + b"a" * 5_000_000, "none.txt:2: a line of 5,000,000 letters, at most 4096"),
    ],
)
def test_a_bad_file_of_sources_is_one_line(content, message, tmp_path, deadbench):
    path = tmp_path / "none.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CensusError, match=message):
        list_sources(str(path))
    code, _, err = deadbench("census", path, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)


def test_a_row_says_what_classify_says(tmp_path):
    folder = save_tiny(tmp_path / "step7")
    row, known = census_row(str(folder), str(folder), "run"), classify(str(folder))[0]
    shared = [name for name in known if name in row and name not in ("source", "error")]
    assert {name: row[name] for name in shared} == {name: known[name] for name in shared}
    assert (row["status"], row["error"], row["checkpoint_step"], row["family"]) == ("ok", None, 7, "layernorm")
    assert len(row["source_fingerprint"]) == 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from safetensors.torch import load_file

    folder = save_tiny(tmp_path_factory.mktemp("formats") / "base")
    return folder, load_file(folder / "model.safetensors")


def one_file(folder, base, state):
    shutil.copy(base / "model.safetensors", folder / "some.safetensors")
    return folder / "some.safetensors"


def torch_file(folder, base, state, name="pytorch_model.bin", **options):
    import torch

    torch.save(state, folder / name, **options)
    return folder / name if name.endswith(".ckpt") else folder


def framework(form, folder, base, state):
    form(folder, state)
    return folder


def gguf_file(folder, base, state):
    facts = llama_like("gptneox", 16, 2, "attention.layer_norm_epsilon")
    final = {f"output_norm.{n}": state[f"gpt_neox.final_layer_norm.{n}"].numpy() for n in ("weight", "bias")}
    (folder / "m.gguf").write_bytes(gguf(facts, {"token_embd.weight": np.ones((97, 16), "f4")} | final))
    return folder / "m.gguf"


def adapter(folder, base, state):
    return write_adapter(folder / "adapter", base)


def packed(folder, base, state):
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | quantised))
    parts = {"gpt_neox.layers.0.attention.dense.qweight": np.ones((2, 16), "i4")}
    save_file({name: tensor.numpy() for name, tensor in state.items()} | parts, folder / "model.safetensors")
    return folder


FORMATS = {
    "one file": (one_file, "safetensors"),
    "bin": (torch_file, "torch"),
    "before 1.6": (functools.partial(torch_file, _use_new_zipfile_serialization=False), "torch"),
    "ckpt": (functools.partial(torch_file, name="last.ckpt"), "torch"),
    "dcp": (functools.partial(framework, save_sharded), "torch.distributed.checkpoint"),
    "deepspeed": (functools.partial(framework, deepspeed), "deepspeed"),
    "zero3": (functools.partial(framework, deepspeed_zero3), "deepspeed-zero3"),
    "neox": (functools.partial(framework, gpt_neox), "gpt-neox"),
    "gguf": (gguf_file, "gguf"),
    "adapter": (adapter, "peft"),
    "gptq": (packed, "safetensors"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_of_every_format(form, tiny, tmp_path):
    write, called = FORMATS[form]
    base, state = tiny
    shutil.copy(base / "config.json", tmp_path)
    source = str(write(tmp_path, base, state))
    row, plain = (census_row(each, each, "run") for each in (source, str(base)))
    assert (row["status"], row["error"], row["source_format"]) == ("ok", None, called)
    shared = ("family", "final_norm", "scale_harmonic", "predicted_dim", "hidden_size", "has_bias", "depth_predicted")
    assert {name: row[name] for name in shared} == {name: plain[name] for name in shared}
    again = census_row(source, source, "run")
    assert row["source_fingerprint"] == again["source_fingerprint"] != plain["source_fingerprint"]


@pytest.mark.subprocess
def test_no_worker_imports_torch(kinds):
    code = (
        "import sys; from deadbench.runners.census.worker import census_row\n"
        f"row = census_row('neox', {str(kinds / 'neox')!r}, 'run')\n"
        "print(row['status'], row['family'], sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "ok layernorm []\n"


@pytest.mark.ray
def test_one_row_a_source_whatever_it_holds(ray_session, deadbench, tmp_path, kinds):
    save_tiny(tmp_path / "mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    here = [str(tmp_path / "mine"), str(tmp_path / "broken"), str(TWINS / "rmsnorm" / "step0")]
    with serving(kinds) as url:
        there = [f"{url}/{kind}-{i}" for i in range(30) for kind in ("neox", "llama")] + [f"{url}/none-1"]
        path = listed(tmp_path, [*here, *there])
        code, printed, err = deadbench("census", path, "--out", tmp_path / "out", "--json")
    assert (code, bool(printed)) == (1, True), err
    told = json.loads(printed)
    assert (told["sources"], told["ok"], told["failed"], told["skipped"]) == (64, 62, 2, 0)
    assert told["families"] == {"layernorm": 31, "rmsnorm": 31}
    assert sorted(each["source"] for each in told["errors"]) == sorted([here[1], there[-1]])
    rows = reads(tmp_path / "out")
    assert sorted(rows["model"]) == sorted([*here, *there])
    errors = rows.filter(status="failed")["error"].to_list()
    assert any("config.json is not JSON" in error for error in errors)
    assert any("no config.json" in error for error in errors)
    code, printed, _ = deadbench("leaderboard", tmp_path / "out", "--json")
    assert (code, len(json.loads(printed)["leaderboard"])) == (0, 64)
    # Again, with the broken one mended and a new one: only these and the missing one are read.
    save_tiny(tmp_path / "broken")
    path = listed(tmp_path, [*here, *there, str(TWINS / "layernorm" / "step0")])
    code, printed, _ = deadbench("census", path, "--out", tmp_path / "out", "--json")
    told = json.loads(printed)
    assert (told["ok"], told["failed"], told["skipped"]) == (2, 1, 62)
    assert reads(tmp_path / "out").height == 67


@pytest.mark.ray
def test_a_worker_that_is_killed_costs_no_source(ray_session, deadbench, tmp_path, kinds):
    killed = []

    def kill():
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            with contextlib.suppress(psutil.Error):  # a child that has ended meanwhile
                for process in psutil.Process().children(recursive=True):
                    if "CensusWorker" in " ".join(process.cmdline()) and (tmp_path / "out").exists():
                        time.sleep(1.0)
                        process.kill()
                        killed.append(process.pid)
                        break
            time.sleep(0.05)

    with serving(kinds, limit=100) as url:  # so slow that the worker is at work when it dies
        path = listed(tmp_path, [f"{url}/neox-{i}" for i in range(120)])
        killer = threading.Thread(target=kill)
        killer.start()
        code, printed, err = deadbench("census", path, "--out", tmp_path / "out", "--json")
        killer.join()
    assert killed, "nobody was killed"
    assert code == 0, err
    assert "A worker died" not in printed
    assert json.loads(printed)["ok"] == 120
    assert reads(tmp_path / "out")["model"].n_unique() == reads(tmp_path / "out").height == 120


@pytest.mark.ray
def test_a_driver_killed_at_any_instant_is_resumed(ray_session, deadbench, tmp_path, kinds):
    """In a process of its own; what was written is whole, and the next run reads the rest."""
    sources = 180  # of which the server lets some ten a second through: far more than one flush of the results
    out, address = tmp_path / "out", ray_session.get_runtime_context().gcs_address
    with serving(kinds, limit=60) as url:
        path = listed(tmp_path, [f"{url}/neox-{i}" for i in range(sources)])
        command = [sys.executable, "-m", "deadbench", "census", str(path), "--out", str(out), "--address", address]
        first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not list(out.glob("reads/*.parquet")) and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.05)
        first.kill()
        _, told = first.communicate(timeout=30)
        assert list(out.glob("reads/*.parquet")), told.decode()
        before = reads(out).height
        code, printed, err = deadbench("census", path, "--out", out, "--json")
    assert code == 0, err
    told = json.loads(printed)
    assert (told["ok"], told["failed"], told["skipped"]) == (sources - before, 0, before)
    assert 0 < before < sources
    assert reads(out)["model"].n_unique() == reads(out).height == sources


def test_what_a_full_disk_refuses_is_kept_and_written_when_there_is_room(tmp_path, monkeypatch):
    store, said, full = ResultStore(str(tmp_path / "out")), [], [True]
    write = store._write_whole

    def refusing(path, contents):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, contents)

    monkeypatch.setattr(store, "_write_whole", refusing)
    monkeypatch.setattr(outbox, "_FIRST_PAUSE", 0.01)
    writer = census._Writer(store, said.append)
    for name in "ab":
        writer.add(to_table("reads", [{"run_id": "r", "model": name, "read": "parameters", "status": "ok"}]))
        writer.flush()
    assert said == [f"results in {tmp_path}/out cannot be written (No space left on device); kept and tried again"]
    full[0] = False
    writer.drain()
    assert sorted(reads(tmp_path / "out")["model"]) == ["a", "b"]


def test_a_disk_that_stays_full_is_one_line_that_says_how_to_go_on(tmp_path, deadbench, monkeypatch):
    def refused(*given):
        raise UnwritableError("out: cannot be written for 600 s")

    left = []
    monkeypatch.setattr(census, "take_census", refused)
    monkeypatch.setattr(joining, "connect", lambda address: SimpleNamespace(leave=lambda: left.append(address)))
    code, printed, err = deadbench("census", listed(tmp_path, ["a/b"]), "--out", tmp_path / "out")
    told = "out: cannot be written for 600 s; what is written is kept: give the same command to go on"
    assert (code, printed, err) == (1, "", f"deadbench: {told}\n")
    assert left


def test_a_pause_holds_for_all_who_ask_the_host(monkeypatch):
    slept, told = [], []
    monkeypatch.setattr(
        host_limits.time, "sleep", lambda seconds: (slept.append(seconds), now.__setitem__(0, now[0] + seconds))
    )
    now = [100.0]
    monkeypatch.setattr(host_limits.time, "monotonic", lambda: now[0])
    limits = HostLimits()
    limits.on_pause = lambda host, seconds: told.append((host, seconds))
    limits.pause("a", 5.0)
    limits.pause("a", 2.0)  # shorter than what is known: no news
    limits.pause("b", 1.0, heard=False)
    assert told == [("a", 5.0)]
    limits.wait("c")
    assert slept == []
    limits.wait("a")
    assert 5.0 <= sum(slept) <= 5.5
    assert limits.left("a") == 0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55.0),
        ({"RateLimit": '"api";r=12;t=55'}, None),
        ({}, None),
    ],
)
def test_the_wait_that_a_server_names(headers, seconds):
    assert named_wait(headers) == seconds


def test_workers_hear_of_each_others_pauses():
    async def told_and_heard():
        board = PauseBoard()
        waiting = asyncio.create_task(board.hear(0))
        await asyncio.sleep(0)
        await board.tell("a", 5.0)
        first = await waiting
        await board.tell("b", 1.0)
        return first, await board.hear(1)

    first, second = asyncio.run(told_and_heard())
    assert first[0][0] == "a"
    assert first[0][1] == pytest.approx(5.0, abs=0.5)
    assert [host for host, _ in second] == ["b"]


def test_a_host_that_limits_requests_is_told_of_once_a_minute(monkeypatch):
    now, said = [1000.0], []
    monkeypatch.setattr(census.time, "monotonic", lambda: now[0])
    pauses = census._Pauses(said.append)
    for seconds in (0, 30, 61):
        now[0] = 1000.0 + seconds
        pauses.tell("hub\x1b[31m", 30.0, heard=False)
    pauses.tell("other", 5.0, heard=False)
    line = "hub\\x1b[31m limits requests: nobody asks it for 30 s; sources elsewhere go on"
    assert said == [line, line, line.replace("hub\\x1b[31m", "other").replace("30 s", "5 s")]


def test_a_census_has_no_address_without_ray(deadbench, tmp_path):
    code, _, err = deadbench("census", "sources.txt", "--out", tmp_path / "out", "--address", "none")
    assert (code, err) == (
        2, "deadbench: --address none: a census is read on Ray Data; give local, auto or host:port\n"
    )  # fmt: skip
