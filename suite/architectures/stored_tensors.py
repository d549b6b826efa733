"""Which stored tensor is a module's parameter: the one that transformers would load.

A checkpoint may hold more than one model: an average beside the weights, a policy beside its reference, an adapter's
copy beside what it replaces, draft heads behind the last block. A norm of the wanted name may be in each of them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property

from deadbench.suite.architectures.stored_names import Naming, renamed, unwrapped
from deadbench.suite.checkpoints.tensors import TensorEntry

_LEGACY_NAMES = {"weight": "gamma", "bias": "beta"}  # tensor names of checkpoints from before 2019
_HOLDERS = re.compile(r"(?:base_model\.model|model|module)(?:\.(?:base_model\.model|model|module))*|")  # or nothing
# PEFT's copies of a module that is trained as a whole, below the module's own path.
_COPY = re.compile(r"\.(?:original_module|modules_to_save\.[^.]+|base_layer|ln_tuning_layers\.[^.]+)(?=\.[^.]+$)")
_INSIDE_A_BLOCK = re.compile(r"\.\d+(?:\.|$)")  # though nn.Sequential may hold a whole model as `0`
_MOST = 0.5  # of the tensors, shared by the roots that hold one of the name

_Places = dict[str, list[tuple[str, TensorEntry]]]  # name below a root: the root, "" for none, and the tensor


def whole_models(roots: Iterable[str]) -> list[str]:
    """Which of the paths that a model's tensors lie below may hold the one meant: those that scripts give it, else all.

    A model inside another's block, a draft head as a rule, is none of them.
    """
    outside = [root for root in roots if not _INSIDE_A_BLOCK.search(root)]
    return [root for root in outside if _HOLDERS.fullmatch(root)] or outside


class StoredTensors:
    """The tensors of a checkpoint, found by the names that transformers has for them."""

    def __init__(self, entries: Mapping[str, TensorEntry], naming: Naming | None = None):
        self._entries, self._naming = entries, naming or Naming()
        self._own: dict[str, list[TensorEntry]] = defaultdict(list)
        for name, entry in self._vectors:
            self._own[renamed(name, self._naming.rules)].append(entry)

    def find(self, path: str, parameter: str | None) -> list[TensorEntry]:
        """What may be the parameter of the module at `path` of the bare model: one tensor where that is clear.

        What wrappers leave in names is passed over. First come the names that transformers loads, the published
        class's before the bare model's; then those below the prefixes that other libraries put before a whole model;
        then those below any one prefix that most of the checkpoint lies below.
        """
        if parameter is None:
            return []
        base = f"{self._naming.base}." if self._naming.base else ""
        names = [f"{path}.{name}" for name in dict.fromkeys((parameter, _LEGACY_NAMES.get(parameter, parameter)))]
        called = [f"{prefix}{name}" for prefix in dict.fromkeys((base, "")) for name in names]
        for name in called:
            found = self._own.get(name) or [entry for entry in [self._entries.get(name)] if entry]
            if found:
                plain = [entry for entry in found if unwrapped(entry.name) == entry.name]
                return plain if len(plain) == 1 else found
        twice = [entry for name in called for entry in self._twice.get(name, ())]
        if twice:
            return twice
        below = [place for name in called for place in self._below.get(name, ())]
        held = {entry.name: entry for root, entry in below if _HOLDERS.fullmatch(root)}
        if held:
            return list(held.values())
        roots: dict[str, str] = {}
        for root, entry in below:  # the published class's name leaves the shorter one
            roots.setdefault(entry.name, root)
        roots = {name: root for name, root in roots.items() if not _INSIDE_A_BLOCK.search(root)}
        most = _MOST * len(self._entries) / max(len(set(roots.values())), 1)
        return [self._entries[name] for name, root in roots.items() if self._sizes[root] >= most]

    @cached_property
    def _vectors(self) -> list[tuple[str, TensorEntry]]:
        return [(unwrapped(name), entry) for name, entry in self._entries.items() if len(entry.shape) < 2]

    @cached_property
    def _twice(self) -> Mapping[str, list[TensorEntry]]:
        """By names that the rules have led on once more.

        Where a class and its base both rename, transformers may save with both undone, one on top of the other
        (`language_model.model.model.norm` of six audio models in 5.19).
        """
        twice: dict[str, list[TensorEntry]] = defaultdict(list)
        for own, found in self._own.items():
            if (again := renamed(own, self._naming.rules)) != own:
                twice[again] += found
        return twice

    @cached_property
    def _below(self) -> _Places:
        """Every vector by the names that it has below each part of its path, a copy as what it is a copy of."""
        places: _Places = defaultdict(list)
        for name, entry in self._vectors:
            parts = _COPY.sub("", name).split(".")
            for cut in range(len(parts) - 1):
                root, rest = ".".join(parts[:cut]), ".".join(parts[cut:])
                places[renamed(rest, self._naming.rules)].append((root, entry))
        return places

    @cached_property
    def _sizes(self) -> Counter[str]:
        """How many tensors lie below each path."""
        sizes: Counter[str] = Counter()
        for name in self._entries:
            parts = unwrapped(name).split(".")
            sizes.update(".".join(parts[:cut]) for cut in range(1, len(parts)))
        return sizes
