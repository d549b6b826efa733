"""Broken machines, made up: each is wrong in the right line, and in no other."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deadbench.runners.doctor import device_checks
from deadbench.runners.doctor.device_checks import Bench
from deadbench.runners.doctor.facts import Facts, Gpu
from deadbench.runners.doctor.lines import node_lines
from deadbench.runners.doctor.one_process import device_lines
from deadbench.runners.planning.seconds import Rates
from deadbench.suite.spectra.solvers import Checked, Lapack

VERSIONS = {"python": "3.11", "ray": "2.60.0", "deadbench": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0"}
WELL = Facts(
    node="n1", num_nodes=2, cpus=192, threads=23, memory=int(9e11), shared=int(6e10), disk=int(1e12), cache=int(1e12),
    files=65536, address="10.0.0.7", gloo_address="10.0.0.7", given=1, gpus=(Gpu("H200", int(141e9), int(140e9)),),
    num_gpus=8, torch="2.13.0", built="13.0", driver="580.95", versions=VERSIONS, vllm="0.32.0",
)  # fmt: skip
BROKEN = {
    "an old driver": ({"gpus": (), "driver": "470.1"}, "gpus", "driver 470.1 is too old for that"),
    "fewer GPUs than were given": (
        {"given": 8, "gpus": WELL.gpus * 7}, "gpus", "8 GPUs were given and torch has 7 (torch 2.13.0, built for 13.0)",
    ),
    "no /dev/shm": ({"shared": None}, "shared memory", "mount it"),
    "another version": ({"versions": VERSIONS | {"torch": "2.12.0"}}, "versions", "n1 has torch 2.12.0 (here 2.13.0)"),
    "a hostname that resolves to loopback": (
        {"address": "127.0.1.1", "gloo_address": "127.0.1.1"}, "network", "127.0.1.1, which no other node reaches",
    ),
    "an address that no interface has": ({"gloo_address": "127.0.1.1"}, "network", "ranks would listen at 127.0.1.1"),
    "no room on the disk": ({"disk": int(1e8)}, "disk", "0.1 GB are free in the temporary folder"),
    "a read-only home": ({"cache": None}, "cache", "nothing can be written where checkpoints are kept; set DEADBENCH"),
    "no room in the cache": ({"cache": int(1e8)}, "cache", "0.1 GB are free where checkpoints are kept"),
    "few open files": ({"files": 256}, "open files", "256 files open, and 1024 are the least; ulimit -n 65536"),
    "a CPU torch": ({"gpus": (), "built": None}, "gpus", "a CPU build"),
    "all GPUs for one rank": ({"gpus": WELL.gpus * 8}, "gpus", "unset RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"),
    "too little memory": ({"memory": int(1e9)}, "memory", "1.0 GB of host memory are free"),
    "one thread": ({"threads": 1}, "threads", "1 of 192 CPUs compute (23 would be this process's part)"),
    "half a vLLM": ({"vllm_lacks": "vllm.forward_context"}, "vllm", "lacks vllm.forward_context"),
    "an old vLLM": ({"vllm": "0.10.1"}, "vllm", "vLLM 0.10.1 is not 0.32.x"),
    "a GPU in use": ({"gpus": (Gpu("H200", int(141e9), int(20e9)),)}, "gpu memory", "20 of 141 GB free"),
    "a process that was left on the last GPU": (
        {"given": 8, "gpus": (*WELL.gpus * 7, Gpu("H200", int(141e9), int(2e9)))}, "gpu memory", "1 GPUs are in use",
    ),
}  # fmt: skip


def test_a_machine_that_is_well_is_well_in_every_line():
    lines = list(node_lines(WELL, VERSIONS))
    assert {line.verdict for line in lines} == {"ok"}, lines


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_machine_is_wrong_in_the_right_line(name):
    change, check, told = BROKEN[name]
    lines = list(node_lines(replace(WELL, **change), VERSIONS))
    (wrong,) = (line for line in lines if line.verdict == "wrong")
    assert (wrong.node, wrong.check) == ("n1", check)
    assert told in wrong.told
    assert "\n" not in wrong.told


def test_a_laptop_is_not_a_broken_cluster():
    alone = replace(WELL, num_nodes=1, cpus=2, threads=1, address=None, gloo_address=None, given=0, gpus=(), num_gpus=0,
                    built=None, vllm=None)  # fmt: skip
    lines = list(node_lines(alone, VERSIONS))
    assert {line.check for line in lines if line.verdict == "skipped"} == {"gpu memory", "network", "vllm"}
    assert "wrong" not in {line.verdict for line in lines}


class WrongEigenvalues(Lapack):
    def eigh(self, matrix_DD: Tensor, uplo: str) -> tuple[Tensor, Tensor]:
        values_D, vectors_DD = super().eigh(matrix_DD, uplo)
        return values_D * (1 + 1e-10), vectors_DD


class WrongSolve(Lapack):
    def solve(self, factor_DD: Tensor, columns_DK: Tensor, *, upper: bool) -> Tensor:
        return super().solve(factor_DD, columns_DK, upper=upper) * (1 + 1e-8)


class NoFactor(Lapack):
    def cholesky(self, matrix_DD: Tensor) -> tuple[Tensor, bool]:
        return matrix_DD, False


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Rates take a fifth of a second, and are another test's."""
    monkeypatch.setattr(device_checks, "measured", lambda device: Rates("fake", 0.0, 1e12, 1e11, 1e11, 1e9))


@pytest.mark.parametrize(
    ("fake", "check"), [(WrongEigenvalues(), "eigh"), (WrongSolve(), "triangular solve"), (NoFactor(), "cholesky")]
)
def test_a_wrong_solver_is_wrong_in_its_own_line(fake, check):
    lines = list(device_lines("n1", Bench(torch.device("cpu"), Checked("fake", fake))))
    assert [line.check for line in lines if line.verdict == "wrong"] == [check]


def test_a_device_whose_products_are_wrong_has_a_wrong_gram_matrix(monkeypatch):
    add, calls = device_checks.add_gram, []

    def second_wrong(upper_DD, rows_ND):
        add(upper_DD, rows_ND)
        calls.append(1)
        if len(calls) == 2:
            upper_DD[0, 5] *= 1 + 1e-6

    monkeypatch.setattr(device_checks, "add_gram", second_wrong)
    lines = list(device_lines("n1", Bench(torch.device("cpu"))))
    assert [line.check for line in lines if line.verdict == "wrong"] == ["gram"]


def test_a_check_that_fails_unforeseen_is_a_wrong_line_and_the_others_go_on(monkeypatch):
    def broken(bench):
        raise OSError("no such device\nmore of it")

    monkeypatch.setitem(device_checks.DEVICE_CHECKS, "precision", broken)
    lines = list(device_lines("n1", Bench(torch.device("cpu"))))
    assert len(lines) == len(device_checks.DEVICE_CHECKS)
    assert [(line.check, line.told) for line in lines if line.verdict == "wrong"] == [
        ("precision", "OSError: no such device more of it")
    ]
