"""What transformers calls a tensor that a checkpoint stores under another name.

transformers renames on loading (its `conversion_mapping.py`): the names of published checkpoints stay, its modules
move. The rules are plain patterns, so that the atlas holds them too and no torch is needed to follow them.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Renaming:
    """One rule: where a name holds `source`, a regular expression, `target` takes its place.

    Attributes:
        source: pattern of a stored name; `*.` stands for any part of a path.
        target: what it becomes; a backslash and a digit stand for what that group of the pattern holds.
        scope: only names below this path are renamed, their rest alone; with `base` before it or not.
        base: prefix of the bare model in a model with heads.
    """

    source: str
    target: str
    scope: str = ""
    base: str = ""

    def __call__(self, name: str) -> str:
        """The name after this rule; the name itself where the rule does not apply."""
        scope = f"{self.scope}." if self.scope else ""
        based = f"{self.base}.{scope}" if self.base else scope
        prefix = based if name.startswith(based) else scope
        if not name.startswith(prefix):
            return name
        below = name.removeprefix(prefix)
        match = _compiled(self.source).search(below)
        if match is None:
            return name
        replacement = re.sub(r"\\(\d+)", lambda digit: match[int(digit[1])] or "", self.target)
        return prefix + below.replace(match[0], replacement, 1)


def renamed(name: str, rules: Iterable[Renaming]) -> str:
    """What transformers calls a stored tensor."""
    for rule in rules:
        name = rule(name)
    return name


@dataclass(frozen=True)
class Naming:
    """How transformers leads stored names to those of a bare model.

    Attributes:
        rules: by which it renames, in their order.
        base: where a published class holds the bare model (`base_model_prefix`): taken off, or put before.
    """

    rules: tuple[Renaming, ...] = ()
    base: str = ""

    def further(self, rules: Iterable[Renaming]) -> "Naming":
        """With more rules, after these."""
        return replace(self, rules=(*self.rules, *rules))


def naming(model: Any) -> Naming:
    """How transformers loads a checkpoint into `model`.

    Rules that merge or split tensors are left out: no norm is stored in parts. So are those of groups that hold only
    together; of transformers 5.19's models one has such a group, inside its vision tower's blocks.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import GroupWeightRename, WeightRenaming

    rules = tuple(
        Renaming(
            each.source_patterns[0], each.target_patterns[0], each.scope_prefix or "", each.base_model_prefix or ""
        )
        for each in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(each, WeightRenaming) and not isinstance(each, GroupWeightRename)
    )
    return Naming(rules, model.base_model_prefix)


# Parts that torch.compile, activation checkpointing, FSDP and DeepSpeed put into the paths of what they wrap.
_WRAPPERS = r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\."
_INSIDE, _LEADING, _PARALLEL = rf"\.(?:{_WRAPPERS})+", rf"^(?:{_WRAPPERS})+", r"^(?:module\.)+"
_RUNS = 4  # of wrappers in one path: transformers' rules replace one at a time


def unwrapped(name: str) -> str:
    """A stored name without what wrappers have left in it; DataParallel's `module.` only at its beginning."""
    plain = re.sub(_INSIDE, ".", re.sub(_LEADING, "", name))
    return re.sub(_LEADING, "", re.sub(_PARALLEL, "", plain))


def wrapped(names: Iterable[str]) -> str | None:
    """The first name that a wrapper has left something in; None if there is none."""
    return next((name for name in names if unwrapped(name) != name), None)


def unwrapping() -> dict[str, str]:
    """`unwrapped` as rules for `from_pretrained(key_mapping=…)`."""
    inside = {_INSIDE + "(?:)" * run: "." for run in range(_RUNS)}
    return {_LEADING: "", _PARALLEL: "", f"{_LEADING}(?:)": ""} | inside


@functools.cache
def _compiled(source: str) -> re.Pattern[str]:
    return re.compile(source.replace("*.", r".*\."))
