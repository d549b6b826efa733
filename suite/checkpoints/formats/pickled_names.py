"""What the names in a pickle stand for here: constructors of our own, and plain records for classes.

Whatever is made is plain: numbers, text, lists, dicts, records. No name leads to anything of another module.
"""

from collections.abc import Callable, Mapping
from typing import Any

from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.errors import CheckpointError

MAX_TEXT = 65_536  # bytes of a name, a key, an option
_MAX_KEY_ITEMS = 16  # of a tuple that is a key

_SCALARS = (str, int, float, bool, bytes, type(None))


class Constructor:
    """A name that a pickle may hold: what it is called there, and what stands for it here.

    Attributes:
        name: module and name.
        make: makes a value of the arguments.
        of_numbers: `make`, where its one argument is a tuple of whole numbers for certain.
        records: it makes records.
    """

    __slots__ = ("make", "name", "of_numbers", "records")

    def __init__(
        self,
        name: str,
        make: Callable[..., Any],
        *,
        of_numbers: Callable[[tuple[int, ...]], Any] | None = None,
        records: bool = False,
    ):
        """What `make` makes takes the place of what `name` would."""
        self.name, self.make, self.of_numbers, self.records = name, make, of_numbers or make, records


class Record:
    """An object of a class that is known: its name and its fields, and nothing that it does.

    Attributes:
        kind: the name of its class.
        fields: what was set on it; `state` of it where that was no dict.
    """

    __slots__ = ("fields", "kind")

    def __init__(self, kind: str, fields: dict[Any, Any] | None = None):
        """A record of the class `kind`."""
        self.kind, self.fields = kind, {} if fields is None else fields


def record(name: str) -> Constructor:
    """A class whose objects are plain records."""

    def make(*args: Any) -> Record:
        return Record(name, {"args": args} if args else None)

    return Constructor(name, make, records=True)


class RefusedError(Exception):
    """What is wrong with a pickle; becomes the one line of a CheckpointError."""


class CutOffError(CheckpointError):
    """A pickle whose end is not there."""


def plain_key(key: Any) -> Any:
    """A key whose hash takes no time and no depth: a plain value, or a flat tuple of such."""
    if isinstance(key, (*_SCALARS, Record)):
        return key
    if type(key) is tuple and len(key) <= _MAX_KEY_ITEMS and all(isinstance(each, _SCALARS) for each in key):
        return key
    raise RefusedError(f"has a {type(key).__name__} as a key")


def _ordered_dict(*args: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    first = args[0] if args else ()
    for pair in first.items() if type(first) is dict else first:
        key, value = pair
        found[plain_key(key)] = value
    return found


def _default_dict(factory: Any = None, *args: Any) -> dict[Any, Any]:
    """A dict without what it would make of itself."""
    return _ordered_dict(*args)


def _queue(*args: Any) -> list[Any]:
    return list(args[0]) if args and isinstance(args[0], (list, tuple)) else []


def _members(*args: Any) -> set[Any]:
    return {plain_key(each) for each in args[0]} if args else set()


def _encoded(text: Any, encoding: Any = "utf-8") -> bytes:
    """`_codecs.encode`, by which protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8", "ascii") or len(text) > MAX_TEXT:
        raise RefusedError(f"calls _codecs.encode with {shown(text)}, {shown(encoding)}")
    return text.encode(encoding)


def _byte_array(*args: Any) -> bytes:
    if args and not isinstance(args[0], bytes):
        raise RefusedError(f"calls bytearray with {shown(args[0])}")
    return args[0] if args else b""


# What training scripts keep beside weights: numbers of numpy, and settings; none of it is looked into.
_CLASSES = (
    "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "signal.Signals", "megatron.core.enums.ModelType",
    "megatron.model.enums.ModelType", "megatron.model.enums.PositionEmbeddingType",
    *(f"megatron.core.transformer.enums.{name}" for name in (
        "AttnBackend", "AttnMaskType", "CudaGraphScope", "LayerType", "ModelType",
    )),
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler", "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address", "types.SimpleNamespace", "datetime.datetime",
    "datetime.timedelta", "datetime.timezone", "torch.torch_version.TorchVersion", "typing.Any",
    "_io.BytesIO",  # in which Transformer Engine keeps what scales its maps in FP8
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "_local.PosixPath", "PurePosixPath")),
    *(f"omegaconf.{kind}" for kind in (
        "dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata", "nodes.AnyNode",
        "nodes.StringNode", "nodes.IntegerNode", "nodes.FloatNode", "nodes.BooleanNode", "nodes.EnumNode",
        "nodes.PathNode", "nodes.BytesNode",
    )),
)  # fmt: skip
# Dicts with attributes of their own, and types that are named beside them.
_DICTS = (
    "collections.OrderedDict", "collections.Counter", "easydict.EasyDict", "addict.addict.Dict",
    "yacs.config.CfgNode",
    *(f"{module}.utilities.parsing.AttributeDict" for module in ("lightning.pytorch", "pytorch_lightning")),
    *(f"{module}.utilities.data.AttributeDict" for module in ("lightning.fabric", "lightning_fabric")),
)  # fmt: skip
_TYPES = ("int", "long", "float", "bool", "str", "unicode", "list", "tuple")
CONSTRUCTORS: Mapping[str, Any] = {
    each.name: each
    for each in (
        *(Constructor(name, _ordered_dict) for name in _DICTS),
        Constructor("collections.defaultdict", _default_dict),
        Constructor("collections.deque", _queue),
        *(
            Constructor(f"{module}.{name}", make)
            for module in ("builtins", "__builtin__")  # the latter in protocol 2, which keeps Python 2's names
            for name, make in (
                ("set", _members), ("frozenset", _members), ("dict", _ordered_dict),
                ("bytearray", _byte_array), ("bytes", _byte_array),
            )
        ),
        *(record(f"{module}.{name}") for module in ("builtins", "__builtin__") for name in _TYPES),
        Constructor("_codecs.encode", _encoded),
        record("argparse.Namespace"),
        *map(record, _CLASSES),
    )
}  # fmt: skip
