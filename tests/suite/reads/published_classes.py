"""Every published class of the installed transformers, saved small by transformers: is its final norm's tensor found?

    python -m tests.suite.reads.published_classes [CLASS_OR_MODEL_TYPE…]

Some twenty minutes of one core, most of it for small configurations; prints a line for each class that is not right.
"""

import contextlib
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from deadbench.suite.architectures.build import build_config, build_model, build_published
from deadbench.suite.architectures.locate import locate_final_norm
from deadbench.suite.architectures.norms import FinalNorm
from deadbench.suite.atlas.config_keys import nest
from deadbench.suite.atlas.lookup import lookup
from deadbench.suite.atlas.small_configs import small_config
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.tensors import read_vector
from deadbench.suite.reads.parameters import read_parameters

_SECONDS = 60  # for one class
_MANY = 40_000_000  # parameters: what no configuration makes small is not written to disk


@dataclass(frozen=True)
class Found:
    """What was read of a class, and which of the stored tensors are the final norm's.

    `true` is empty where the class does not have the norm of the bare model; `read` is None where none was found.
    """

    read: str | None
    true: tuple[str, ...]
    told: str

    @property
    def verdict(self) -> str:
        """right, wrong or undetermined."""
        if self.read is None:
            return "undetermined" if self.true else "right"
        return "right" if self.read in self.true else "wrong"


def published_classes() -> list[tuple[str, str]]:
    """(model type, class) of all AutoModelFor… mappings."""
    mappings = [name for name in dir(modeling_auto) if name.startswith("MODEL_FOR_") and name.endswith("_NAMES")]
    pairs = set()
    for mapping in mappings:
        for model_type, classes in getattr(modeling_auto, mapping).items():
            pairs |= {(model_type, each) for each in ([classes] if isinstance(classes, str) else classes)}
    return sorted(pairs)


def found_in(raw_config: dict[str, Any], folder: Path) -> Found | None:
    """Save the published class of a configuration with random vectors, and read it; None if it has no norm to read.

    The truth is by value: what the saved model holds, at the norm's path, in the module of the bare model's class;
    where it has no such module, what AutoModel loads.
    """
    config = build_config(raw_config)
    torch.manual_seed(0)
    model = build_published(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    checkpoint = Checkpoint(str(folder))
    final = _final(checkpoint.config())
    if final.path is None or final.behaviour.scale_parameter is None:
        return None
    name = f"{final.path}.{final.behaviour.scale_parameter}"
    bare_class = type(build_model(build_config(checkpoint.config()), "meta"))
    bare = next((module for module in model.modules() if type(module) is bare_class), None)
    if bare is None:
        bare, report = bare_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        bare = None if name in report["missing_keys"] else bare
    true: tuple[str, ...] = ()
    if bare is not None:
        scale_D = bare.get_parameter(name).detach().double().numpy()
        vectors = [entry for entry in checkpoint.headers().values() if entry.shape == scale_D.shape]
        true = tuple(e.name for e in vectors if (read_vector(checkpoint, e) == scale_D).all())
    read = read_parameters(checkpoint)
    return Found(read.final_norm_tensor, true, f"{name}: {read.reason or read.final_norm_tensor}")


def _final(raw_config: dict[str, Any]) -> FinalNorm:
    return lookup(raw_config) or locate_final_norm(build_config(raw_config))


def sweep(named: list[str]) -> Iterator[tuple[str, str, str]]:
    """(class, verdict, what is to be told) of the published classes, or of those named by class or model type.

    Beside right, wrong and undetermined a verdict is `no norm`, `large` or `not built`: those are not counted.
    """
    for model_type, name in published_classes():
        if named and not {model_type, name} & {*named}:
            continue
        try:
            with _within(_SECONDS):
                judged = _judged(model_type, name)
        except (Exception, _TooLongError) as error:
            judged = "not built", f"{type(error).__name__}: {error}"[:160]
        yield name, *judged


def _judged(model_type: str, name: str) -> tuple[str, str]:
    raw_config = nest(_small(model_type)) | {"model_type": model_type, "architectures": [name]}
    if sum(p.numel() for p in build_published(build_config(raw_config), "meta").parameters()) > _MANY:
        return "large", ""
    with tempfile.TemporaryDirectory() as folder:
        found = found_in(raw_config, Path(folder))
    return ("no norm", "") if found is None else (found.verdict, f"{found.told}; true: {', '.join(found.true)}")


@cache
def _small(model_type: str) -> dict[str, Any]:
    return small_config(model_type)


class _TooLongError(BaseException):
    """Not an Exception: what tries inputs in turn must let it pass."""


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    def too_long(signum: int, frame: Any) -> None:
        raise _TooLongError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # and again: what it interrupts may catch everything
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    """Sweep, and print what is not right."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    counts: Counter[str] = Counter()
    for name, verdict, told in sweep(sys.argv[1:]):
        counts[verdict] += 1
        if verdict not in ("right", "no norm"):
            print(f"{name}: {verdict}: {told}", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
