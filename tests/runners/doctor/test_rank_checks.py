"""What is said of ranks that are no group: sums that differ, ranks that fail, die, hang, or leave memory held."""

import multiprocessing
from types import SimpleNamespace

import pytest

from deadbench.runners.doctor import one_process, rank_checks, vllm_check
from deadbench.runners.doctor.lines import line_of
from deadbench.runners.doctor.node_checks import NotHereError, UnwellError
from deadbench.runners.doctor.rank_checks import Group, Reduced, agreed, rank_lines, shared_by
from deadbench.runners.doctor.small_models import HYBRID, LLAMA, NUMBERS
from deadbench.runners.doctor.vllm_check import vllm_start, vllm_state_space

TWIN = {"status": "ok", "alignment": 1.0, "num_dead_1e6": 1, "depth": 13.9, "engine_detail": ""}
WELL = [(None, Reduced("a", 2e9)), (None, TWIN), (None, 4096)]


class Process:
    """A rank's process that ends when it is killed, or does not."""

    def __init__(self, code=-9):
        self.exitcode, self.code = None, code

    def kill(self):
        self.exitcode = self.code

    def join(self, timeout=None):
        self.exitcode = 1 if timeout is None else self.exitcode


@pytest.fixture
def group():
    """`group(rank 0's messages, rank 1's)`: a group that says this and no more; None at the end: its pipe is closed."""

    def of(*said, on_gpus=False, code=-9):
        pipes = []
        for messages in said:
            ours, theirs = multiprocessing.Pipe()
            for message in messages:
                theirs.close() if message is None else theirs.send(message)
            pipes.append(ours)
            open_ends.append(theirs)
        return Group(pipes, [Process(code) for _ in said], on_gpus)

    open_ends = []
    return of


def lines(group):
    checks = {"reduce": group.reduce, "tensor parallel": group.tensor_parallel, "killed rank": group.killed}
    return {name: (line.verdict, line.told) for name, check in checks.items() for line in [line_of("n1", name, check)]}


def test_ranks_that_agree_are_well(group):
    told = lines(group(WELL, WELL))
    assert told["reduce"] == ("ok", "2 ranks here sum at 2 GB/s, to the same bits")
    assert told["tensor parallel"] == ("ok", "depth 13.90 by 2 ranks")
    assert told["killed rank"][0] == "ok"


def test_the_slowest_rank_is_the_rate_and_other_bits_are_named():
    assert agreed([Reduced("a", 4e9), Reduced("a", 3e9)], "here").startswith("2 ranks here sum at 3 GB/s")
    with pytest.raises(UnwellError, match=r"^sums of rank 1, 3 are not those of rank 0"):
        agreed([Reduced(digest, 1e9) for digest in "abac"], "here")


@pytest.mark.parametrize(
    ("second", "check", "said"),
    [
        ([("NCCL error: no route", None)], "reduce", "rank 1 of 2: NCCL error: no route"),
        ([None], "reduce", "rank 1 of 2 died (exit code 1)"),
        ([], "reduce", "rank 1 of 2 said nothing for 0 s; see that the interface lo is up"),
        ([WELL[0], ("the canary", None)], "tensor parallel", "rank 1 of 2: the canary"),
    ],
)
def test_a_rank_that_fails_dies_or_hangs_is_wrong_in_the_line_where_it_did(group, monkeypatch, second, check, said):
    monkeypatch.setattr(rank_checks, "_ANSWER_SECONDS", 0)
    told = lines(group(WELL, second))
    assert told[check] == ("wrong", said)
    verdicts = [verdict for verdict, _ in told.values()]
    assert set(verdicts[verdicts.index("wrong") + 1 :]) == {"skipped"}, "what comes after it is not tried"


def test_the_rank_that_failed_is_told_and_not_the_one_that_waits_for_it(group):
    assert lines(group([], [("out of memory", None)]))["reduce"] == ("wrong", "rank 1 of 2: out of memory")


def test_a_shared_model_that_reads_otherwise_is_wrong(group):
    other = [WELL[0], (None, TWIN | {"alignment": 0.5}), WELL[2]]
    verdict, told = lines(group(other, WELL))["tensor parallel"]
    assert verdict == "wrong"
    assert told.startswith("twin-layernorm shared by 2 ranks: alignment 0.5000")


def test_memory_that_a_killed_rank_leaves_held_is_wrong(group, monkeypatch):
    monkeypatch.setattr(rank_checks, "_FREE_SECONDS", 0)
    free = iter([10_000, 10_100, 10_100])
    monkeypatch.setattr(rank_checks, "free_bytes", lambda device: next(free))
    assert (
        "memory is not free after 0 s; something outlives it on GPU 1"
        in (lines(group(WELL, WELL, on_gpus=True))["killed rank"][1])
    )
    free = iter([10_000, 14_096])
    assert lines(group(WELL, WELL, on_gpus=True))["killed rank"][0] == "ok"
    assert "is there after 0 s" in lines(group(WELL, WELL, code=None))["killed rank"][1]


def test_one_gpu_has_no_group_and_no_more_ranks_share_than_there_are_heads():
    assert {line.verdict for line in rank_lines("n1", 1)} == {"skipped"}
    assert [shared_by(size) for size in (2, 3, 4, 8)] == [2, 2, 4, 4]


@pytest.fixture
def rows(monkeypatch):
    """vLLM is there; its row and torch's, which a test may change."""
    known = {"status": "ok", "num_tokens": 1024, "load_seconds": 9.0} | dict.fromkeys(NUMBERS, 2.0)
    found = SimpleNamespace(vllm=dict(known), torch=known, asked=[])
    monkeypatch.setattr(vllm_check.importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setattr(vllm_check, "_apart", lambda *asked: found.asked.append(asked) or found.vllm)
    monkeypatch.setattr(vllm_check, "small_row", lambda config, engine: found.torch)
    return found


def test_vllm_is_started_over_two_gpus_where_there_are(rows):
    assert vllm_start(0).startswith("1024 tokens are as many rows, and torch's numbers; started in 9 s")
    assert "torch's numbers over 2 GPUs" in vllm_start(8)
    assert vllm_state_space().startswith("1024 tokens are as many rows, and torch's numbers; started")
    assert rows.asked == [(LLAMA, 1), (LLAMA, 2), (HYBRID, 1)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lambda_min": 2.1}, "lambda_min is 2.1, and 2 by torch"),
        ({"lambda_max": float("nan")}, "lambda_max is nan"),
        ({"status": "failed", "error": "vLLM ran 7 rows for 1024 tokens"}, "vLLM ran 7 rows for 1024 tokens"),
    ],
)
def test_a_vllm_that_reads_otherwise_is_wrong(rows, change, said):
    rows.vllm |= change
    for start, name in ((lambda: vllm_start(0), "a small Llama"), (vllm_state_space, "a small hybrid")):
        with pytest.raises(UnwellError, match=f"^{name}.*by --engine vllm: {said}"):
            start()


def test_without_vllm_there_is_nothing_to_start(monkeypatch):
    monkeypatch.setattr(vllm_check.importlib.util, "find_spec", lambda name: None)
    for start in (lambda: vllm_start(0), vllm_state_space):
        with pytest.raises(NotHereError, match="not installed"):
            start()


def test_neither_ranks_nor_vllm_start_where_a_gpu_is_missing_or_no_model_goes(monkeypatch):
    begun = []
    found = SimpleNamespace(node="n1", gpus=(), given=1, versions={})
    monkeypatch.setattr(one_process, "facts", lambda *_: found)
    monkeypatch.setattr(one_process, "node_lines", lambda *_: [])
    monkeypatch.setattr(one_process, "device_lines", lambda *_: [])
    monkeypatch.setattr(one_process, "READ_CHECKS", {"twin": lambda: "well"})
    monkeypatch.setattr(one_process, "rank_lines", lambda *_: begun.append("ranks") or [])
    monkeypatch.setattr(one_process, "vllm_start", lambda *_: begun.append("vLLM") or "well")
    monkeypatch.setattr(one_process, "vllm_state_space", lambda: begun.append("its Mamba") or "well")
    one_process.examine_process()
    found.given = 0
    one_process.examine_process(takes_models=False)
    assert begun == []
    lines = one_process.examine_process().lines
    assert begun == ["ranks", "vLLM", "its Mamba"]
    assert [line.check for line in lines] == ["twin", "vllm start", "vllm state space"]


@pytest.mark.vllm
@pytest.mark.full
@pytest.mark.subprocess
@pytest.mark.skipif(vllm_check.importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm")
@pytest.mark.parametrize("start", [lambda: vllm_start(0), vllm_state_space], ids=["Llama", "Mamba and attention"])
def test_vllm_starts_here_and_reads_as_torch(start):
    assert start().startswith("1024 tokens are as many rows, and torch's numbers")
