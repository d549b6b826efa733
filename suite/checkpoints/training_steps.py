"""The training step that the name of a checkpoint tells."""

import re

# How people name the steps of training, the surest first; 50k are 50 000.
_COUNT = r"s?[-_=]?(\d{1,15})(?![\d]|\.\d)([km]?)(?![a-z\d])"
_STEPS = [
    re.compile(word + _COUNT, re.IGNORECASE)
    for word in ("step", r"(?<![a-z])iter(?:ation)?", r"(?<![a-z\d])ba", r"(?<![a-z])(?:checkpoint|ckpt)")
]
_WITHIN_EPOCH = re.compile(r"ep(?:och)?[-_=]?\d+.*(?<![a-z])iter", re.IGNORECASE)  # may begin anew in each


def checkpoint_step(name: str | None) -> int | None:
    """Training step that a revision or folder name tells, None where it tells none.

    7 for `step7`, `global_step_7`, `stage1-step7-tokens1B`, `epoch=2-step=7`, `iter_0000007`, `ep1-ba7` (batches),
    `checkpoint-7`, `ckpt_7` and `7`. An epoch is no step, nor is an iteration within one.
    """
    last = (name or "").rstrip("/").rsplit("/", 1)[-1]
    if re.fullmatch(r"\d{1,15}", last):
        return int(last)
    for text in (last, name or ""):
        for pattern in _STEPS:
            match = pattern.search(text)
            if match and not ("iter" in pattern.pattern and _WITHIN_EPOCH.search(text)):
                return int(match[1]) * {"": 1, "k": 1000, "m": 1_000_000}[match[2].lower()]
    return None
