"""models.yaml: suites, protocols and models, validated.

One obvious place to add a model is the file itself; what may stand there is declared here. Every mistake is one line
with file, entry, value and what is allowed.
"""

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, field_validator, model_validator

from deadbench.suite.read_specs import DEFAULT_READS, READ_SPECS

if TYPE_CHECKING:
    ReadName = str
else:
    ReadName = Literal[tuple(READ_SPECS)]
Modality = Literal["text", "image", "audio"]
Family = Literal["layernorm", "rmsnorm", "none", "other"]
Dtype = Literal["auto", "float32", "float16", "bfloat16", "float64"]
Engine = Literal["auto", "torch", "streaming", "vllm"]
Stack = Literal["encoder", "decoder"]
TAP_RULE = r"all|none|every:[1-9]\d*"
TokenRule = Annotated[str, Field(pattern=r"^[1-9]\d*D$")] | Annotated[int, Field(gt=0)]


class RegistryError(ValueError):
    """A registry that does not hold; one line."""


class Strict(BaseModel):
    """An entry that refuses keys which it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Protocol(Strict):
    """How a read is made; only reads of one protocol are compared.

    `tokens` is a number, or a multiple of the hidden size (`8D`). `taps` says which places of the residual stream are
    read: `all`, `none`, or `every:K`, the embedding output, each K-th block's and the last one's. The first
    `skip_positions` tokens of each sequence are run and left out of the statistics: attention sinks and massive
    activations sit there. `inputs` are what models of a modality are fed that have no input of their own: the first
    that can be had where the command is given, so that the others stand for it without a network or a tokenizer.
    """

    tokens: TokenRule = "8D"
    sequence_length: Annotated[int, Field(gt=0)] = 256
    skip_positions: Annotated[int, Field(ge=0)] = 0
    taps: Annotated[str, Field(pattern=rf"^({TAP_RULE})$")] = "all"
    inputs: dict[Modality, Annotated[list[str], Field(min_length=1)]] = {}

    @property
    def tap_stride(self) -> int:
        """Each so-many-th tap is read, and the last; 0: none."""
        named = {"all": 1, "none": 0}
        return named[self.taps] if self.taps in named else int(self.taps.removeprefix("every:"))

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        if self.skip_positions >= self.sequence_length:
            raise ValueError(
                f"skip_positions {self.skip_positions} leaves nothing of sequences of {self.sequence_length} tokens; "
                "give less, or longer sequences"
            )
        return self


class CheckpointPattern(Strict):
    """A series of checkpoints by rule: `pattern` with `{step}`, and the steps as a list, as first, last, every.

    Or as both: the listed steps then come first.
    """

    pattern: str
    steps: list[int] | None = None
    first: int | None = None
    last: int | None = None
    every: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if "{step}" not in self.pattern:
            raise ValueError("pattern has no {step}")
        ranged = [self.first, self.last, self.every]
        if ranged.count(None) not in (0, 3) or (self.steps is None and self.first is None):
            raise ValueError("give steps, or first, last and every, or both")
        return self

    def names(self) -> list[str]:
        """Checkpoint names in training order."""
        steps = list(self.steps or ())
        if self.first is not None and self.last is not None and self.every is not None:
            steps += range(self.first, self.last + 1, self.every)
        return [self.pattern.replace("{step}", str(step)) for step in steps]

    def step_of(self, name: str) -> int | None:
        """The `{step}` of a checkpoint's name; None for a name of another series."""
        return _step_in(self.pattern, name)


class ListedCheckpoints(Strict):
    """A series whose names are listed where it is, because no rule gives them all: branches, tags or folders.

    Those count that match `listed`, in which `{step}` and any other `{name}` stand for digits; `every` keeps the steps
    that it divides.
    """

    listed: str
    every: Annotated[int, Field(gt=0)] = 1

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if "{step}" not in self.listed:
            raise ValueError("listed has no {step}")
        return self

    def names(self, found: list[str]) -> list[str]:
        """Those of `found` that belong to the series, in training order."""
        steps = {name: step for name in found if (step := self.step_of(name)) is not None}
        return sorted((name for name in steps if steps[name] % self.every == 0), key=lambda name: (steps[name], name))

    def step_of(self, name: str) -> int | None:
        """The `{step}` of a checkpoint's name; None for a name of another series."""
        return _step_in(self.listed, name)


def _step_in(rule: str, name: str) -> int | None:
    """The number at `{step}` of `rule` in `name`; any other `{name}` stands for digits."""
    digits = re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(rule).replace(r"\{step\}", r"(?P<step>\d+)", 1))
    match = re.fullmatch(digits, name)
    return int(match["step"]) if match else None


def _series_kind(value: Any) -> str:
    """Which form of `checkpoints` the user meant, so that a mistake in it is told in its terms."""
    if isinstance(value, dict):
        return "ListedCheckpoints" if "listed" in value else "CheckpointPattern"
    return type(value).__name__ if isinstance(value, (CheckpointPattern, ListedCheckpoints)) else "list[str]"


Series = Annotated[
    Annotated[list[str], Tag("list[str]")]
    | Annotated[CheckpointPattern, Tag("CheckpointPattern")]
    | Annotated[ListedCheckpoints, Tag("ListedCheckpoints")],
    Discriminator(_series_kind),
]


class Seen(Strict):
    """Where the configuration was read: on the model's own page, on a copy or a derivative, or in parts only."""

    by: Literal["official", "mirror", "derivative", "partly"]
    page: str


class Model(Strict):
    """One model: where it is and what is expected of it.

    `source` is a Hub id, a URL, or a folder relative to the registry; `checkpoints` are Hub revisions or folders below
    the source. Where there is a `revision` too, it stands for the model, and the series is read by the suites that say
    `checkpoints: true`. With an inline `config` (contents of a config.json) a random-init read needs no source at all.
    `stack` says which half of an encoder-decoder a forward pass is read in, `tokens_per_step` how many tokens a step of
    training took. `seen` and `unverified` say how well the entry is known: `unverified` names keys of the entry, or
    `config.KEY`, that no page has shown. In the file one entry with `seeds` stands for a model of each
    (`suite/registry/seeds.py`).
    """

    id: Annotated[str, Field(pattern=r"^[\w][\w.\-/]*$")]
    source: str | None = None
    revision: str | None = None
    modality: Modality = "text"
    family: Family | None = None
    parameters: Annotated[int, Field(gt=0)] | None = None
    dtype: Dtype = "auto"
    engine: Engine = "auto"
    gpus: Annotated[int, Field(ge=1)] = 1
    config: dict[str, Any] | None = None
    checkpoints: Series | None = None
    tokens_per_step: Annotated[int, Field(gt=0)] | None = None
    input: str | None = None
    stack: Stack = "encoder"
    licence: str | None = None
    gated: bool = False
    seen: Seen | None = None
    unverified: list[str] = []
    notes: str | None = None

    @field_validator("config")
    @classmethod
    def _as_json_has_it(cls, config: dict[str, Any] | None) -> Any:
        return json.loads(json.dumps(config))  # keys that are numbers are text there

    @model_validator(mode="after")
    def _has_origin(self) -> Self:
        if self.source is None and self.config is None:
            raise ValueError("needs a source, an inline config, or both")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type")
        if isinstance(self.checkpoints, ListedCheckpoints) and self.revision is None:
            raise ValueError("listed checkpoints need a revision, which stands for the model")
        for name in self.unverified:
            key, *below = name.split(".")
            if key not in self.model_fields_set or (below and not _has_key(self.config, below)):
                raise ValueError(f"unverified {name!r} is no key of this entry")
        return self

    def main_checkpoint(self) -> str | None:
        """The revision or folder that stands for the model: its revision, else the first of its series, else None."""
        if self.revision is None and isinstance(self.checkpoints, CheckpointPattern):
            return self.checkpoints.names()[0]
        return self.checkpoints[0] if self.revision is None and isinstance(self.checkpoints, list) else self.revision


class SuiteEntry(Strict):
    """A model of a suite, with what differs there."""

    model: str
    reads: list[ReadName] | None = None
    input: str | None = None


class Suite(Strict):
    """A named list of models under one protocol; with `checkpoints`, every checkpoint of those that have a series."""

    protocol: str
    models: list[str | SuiteEntry]
    checkpoints: bool = False
    reads: list[ReadName] = list(DEFAULT_READS)

    def entries(self) -> list[SuiteEntry]:
        """Every entry in full."""
        return [SuiteEntry(model=m) if isinstance(m, str) else m for m in self.models]


class Registry(Strict):
    """The whole file; `models` alone is enough, which are then one suite, `all`, under the protocol `standard`."""

    protocols: dict[str, Protocol] = {"standard": Protocol()}
    suites: dict[str, Suite]
    models: list[Model]
    _indexed: list[Model] | None = PrivateAttr(None)
    _by_id: dict[str, Model] = PrivateAttr({})

    @model_validator(mode="before")
    @classmethod
    def _one_suite(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "suites" in raw or not isinstance(raw.get("models"), list):
            return raw
        ids = [model["id"] for model in raw["models"] if isinstance(model, dict) and isinstance(model.get("id"), str)]
        return raw | {"suites": {"all": {"protocol": "standard", "models": ids}}}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ids = dict[str, None]()
        for model in self.models:
            if model.id in ids:
                raise ValueError(f"{model.id}: duplicate id; every model needs its own")
            ids[model.id] = None
        if "standard" not in self.protocols:
            raise ValueError("protocols: 'standard' is missing; it is used for models named on the command line")
        for name, suite in self.suites.items():
            if suite.protocol not in self.protocols:
                raise ValueError(
                    f"suite {name}: protocol {suite.protocol!r} is unknown; choose {choices(self.protocols)}"
                )
            for entry in suite.entries():
                if entry.model not in ids:
                    raise ValueError(f"suite {name}: model {entry.model!r} is unknown; choose {choices(ids)}")
        return self

    def model(self, model_id: str) -> Model | None:
        """The model of that id, None if there is none."""
        if self._indexed is not self.models:  # a copy may have others
            self._indexed, self._by_id = self.models, {model.id: model for model in self.models}
        return self._by_id.get(model_id)

    def default_suite(self) -> str | None:
        """The suite that is read where none is named: `quick`, else the first one; None where there is none."""
        return "quick" if "quick" in self.suites else next(iter(self.suites), None)


def _has_key(config: dict[str, Any] | None, path: list[str]) -> bool:
    for key in path:
        if not isinstance(config, dict) or key not in config:
            return False
        config = config[key]
    return True


def choices(names: Any) -> str:
    """`a, b or c`."""
    ordered = [str(n) for n in names]
    return ", ".join(ordered[:-1]) + f" or {ordered[-1]}" if len(ordered) > 1 else "".join(ordered)
