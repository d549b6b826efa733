"""The training steps that the names of checkpoints tell."""

import re
from collections.abc import Iterable

LARGEST_STEP = 2**63 - 1  # that a table holds; a larger number in a name is none of training

# How people name the steps of training, the surest first; 50k are 50 000.
_COUNT = r"s?[-_=. ]?(\d{1,15})(?![\d]|\.\d)([km]?)(?![a-z\d])"
_STEPS = [
    re.compile(word + _COUNT, re.IGNORECASE)
    for word in (
        "step", r"(?<![a-z])iter(?:ation)?", r"(?<![a-z\d])ba",
        r"(?<![a-z])(?:checkpoint|ckpt|chkpt)(?:_\d{1,4}(?=_\d))?",  # fairseq puts the epoch between
    )
]  # fmt: skip
_ALONE = re.compile(r"(\d{1,15})(?:([km]?)[-_ ]?steps?)?(?:\.[a-z]\w*)?", re.IGNORECASE)  # all of a name: 7, 7-steps
_EPOCH = re.compile(r"(?<![a-z])ep(?:och)?[-_= ]?(\d{1,9})(?![a-z\d])", re.IGNORECASE)
_WITHIN_EPOCH = re.compile(r"ep(?:och)?[-_=]?\d+.*(?<![a-z])iter", re.IGNORECASE)  # may begin anew in each


def checkpoint_step(name: str | None) -> int | None:
    """Training step that a revision or folder name tells, None where it tells none.

    7 for `step7`, `global_step_7`, `stage1-step7-tokens1B`, `epoch=2-step=7`, `iter_0000007`, `ep1-ba7` (batches),
    `checkpoint-7`, `checkpoint_2_7` (fairseq), `ckpt.7`, `7-steps` and `7`. An epoch is no step, nor is an iteration
    within one.
    """
    last = (name or "").rstrip("/").rsplit("/", 1)[-1]
    if alone := _ALONE.fullmatch(last):
        return _counted(alone)
    for text in (last, name or ""):
        for pattern in _STEPS:
            match = pattern.search(text)
            if match and not ("iter" in pattern.pattern and _WITHIN_EPOCH.search(text)):
                return _counted(match)
    return None


def epoch_of(name: str) -> int | None:
    """The epoch that a name tells, None where it tells none."""
    match = _EPOCH.search(name)
    return int(match[1]) if match else None


def steps_told(names: Iterable[str]) -> dict[str, int | None]:
    """`checkpoint_step` of each checkpoint of one series.

    Where later epochs have smaller steps than earlier ones, those are counted within their epochs and are none of
    training: None for every name that tells an epoch.
    """
    steps = {name: checkpoint_step(name) for name in names}
    both = [(epoch, step) for name, step in steps.items() if (epoch := epoch_of(name)) is not None and step is not None]
    counted = [step for _, step in sorted(both)]
    if counted == sorted(counted):
        return steps
    return {name: step if epoch_of(name) is None else None for name, step in steps.items()}


def _counted(match: re.Match[str]) -> int | None:
    count = int(match[1]) * {"": 1, "k": 1000, "m": 1_000_000}[(match[2] or "").lower()]
    return count if count <= LARGEST_STEP else None
