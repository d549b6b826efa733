"""A machine's faults as a process on it finds them: by torch, the kernel's files and the network; and its red lines."""

import shutil
import socket
import sys
from importlib import metadata
from types import SimpleNamespace

import psutil
import pytest
import torch

from deadbench.runners.doctor import facts
from deadbench.runners.doctor.lines import node_lines
from deadbench.runners.engines import device

GIB = 2**30


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A node of a cluster with one GPU that was given, and all that is well; a test breaks a part of it."""
    (tmp_path / "dev" / "shm").mkdir(parents=True)
    version = tmp_path / "sys" / "module" / "nvidia" / "version"
    version.parent.mkdir(parents=True)
    version.write_text("580.95\n")
    monkeypatch.setattr(facts, "Path", lambda place: tmp_path / str(place).lstrip("/"))
    monkeypatch.setattr(facts, "_vllm", lambda: (None, None))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100 * GIB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(device, "assigned_gpus", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, answer in (
        ("is_available", lambda: True), ("device_count", lambda: 1), ("get_device_name", lambda index: "H200"),
        ("mem_get_info", lambda index: (140 * GIB, 141 * GIB)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, answer)
    at = {"eth0": [SimpleNamespace(family=socket.AF_INET, address="10.0.0.7")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: at)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    return tmp_path


def wrong(address="10.0.0.7"):
    found = facts.facts(2, 1, address)
    return {line.check: line.told for line in node_lines(found, found.versions) if line.verdict == "wrong"}


def test_the_machine_is_well(machine):
    assert wrong() == {}


def test_an_old_driver_is_red_though_it_counts_its_gpus(machine, monkeypatch):
    (machine / "sys/module/nvidia/version").write_text("470.1\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # torch warns and counts none, NVML counts one
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: pytest.fail("torch would raise"))
    assert wrong() == {
        "gpus": f"1 GPUs were given and torch has 0 (torch {torch.__version__}, built for 13.0); driver 470.1 is too "
        "old for that, or sees less: update it, or take an older torch"
    }


def test_memory_that_a_dead_process_holds_is_red(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (20 * GIB, 141 * GIB))
    assert list(wrong()) == ["gpu memory"]


def test_a_machine_without_shared_memory_is_red(machine):
    (machine / "dev" / "shm").rmdir()
    assert list(wrong()) == ["shared memory"]


def test_a_full_disk_and_little_memory_are_red(machine, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=GIB))
    assert list(wrong()) == ["memory"]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=GIB))
    assert list(wrong()) == ["memory", "disk", "cache"]


def test_a_cache_that_takes_nothing_no_temporary_folder_and_few_files_are_red(machine, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("DEADBENCH_CACHE", str(file / "checkpoints"))
    assert list(wrong()) == ["cache"]
    monkeypatch.setenv("DEADBENCH_CACHE", str(tmp_path / "not" / "yet" / "there"))
    assert wrong() == {}
    monkeypatch.setattr(facts.os, "access", lambda place, how: False)  # root may write anywhere but on a read-only disk
    assert list(wrong()) == ["disk", "cache"]
    monkeypatch.undo()
    monkeypatch.setattr(facts.resource, "getrlimit", lambda what: (64, 256))
    assert facts._most_files() == 256
    monkeypatch.setattr(facts.resource, "getrlimit", lambda what: (64, facts.resource.RLIM_INFINITY))
    assert facts._most_files() > 2**40


def test_a_hostname_that_resolves_to_loopback_is_red(machine, monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert "ranks would listen at 127.0.1.1 and Ray's address is 10.0.0.8" in wrong("10.0.0.8")["network"]
    assert "mend /etc/hosts" in wrong("127.0.1.1")["network"]


def test_one_thread_of_many_cpus_is_red(machine, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 192)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert list(wrong()) == ["threads"]


@pytest.mark.parametrize("missing", [None, "vllm/forward_context.py", "vllm/model_executor/model_loader/__init__.py"])
def test_a_vllm_of_which_files_are_missing_is_red(machine, monkeypatch, tmp_path, missing):
    monkeypatch.undo()  # the finder looks at real files
    for part in facts._VLLM_PARTS:
        package = part in ("vllm", "vllm.model_executor.model_loader")
        file = tmp_path / (part.replace(".", "/") + ("/__init__.py" if package else ".py"))
        file.parent.mkdir(parents=True, exist_ok=True)
        if missing is None or not file.as_posix().endswith(missing):
            file.touch()
    if missing and missing.endswith("__init__.py"):
        (tmp_path / missing).parent.rmdir()
    for name in [each for each in sys.modules if each.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0")
    lacking = {None: None, "vllm/forward_context.py": "vllm.forward_context"}
    assert facts._vllm() == ("0.32.0", lacking.get(missing, "vllm.model_executor.model_loader"))
