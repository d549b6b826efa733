"""GGUF: metadata, where each tensor lies, the tensors (github.com/ggml-org/ggml, docs/gguf.md).

The metadata are the configuration: which architecture, how wide, and an epsilon whose key names the norms' family. The
header is read in order, since its strings say nowhere how long they are together; arrays of numbers are passed over.
"""

import itertools
import math
import struct
from typing import Any

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.checkpoints.tensors import (
    MAX_DIMENSIONS,
    MAX_EXTENT,
    Contents,
    StoredNorm,
    TensorEntry,
    check_name,
)
from deadbench.suite.errors import CheckpointError

MAGIC = b"GGUF"
_MAX_HEADER_BYTES, _MAX_KEYS, _MAX_TENSORS, _MAX_ITEMS, _MAX_TEXT = 256_000_000, 100_000, 1_000_000, 10_000_000, 2**24
_WINDOW = 2**18
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
# By type: its name, how many values a block has, and its bytes.
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
# transformers' model types under other names, and the keys of a configuration that are not the usual ones.
_MODEL_TYPES = {
    "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text", "phi2": "phi", "gptneox": "gpt_neox",
    "command-r": "cohere", "gpt-oss": "gpt_oss",
}  # fmt: skip
_LAYERS = {"gpt2": "n_layer", "bloom": "n_layer", "gptj": "n_layer", "t5": "num_decoder_layers"}
_WIDTHS = {"gpt2": "n_embd", "gptj": "n_embd", "t5": "d_model"}
_HEADS = {"gpt2": "n_head", "gptj": "n_head", "bloom": "n_head"}
_EPSILONS = {
    "gpt2": "layer_norm_epsilon", "gptj": "layer_norm_epsilon", "bloom": "layer_norm_epsilon",
    "falcon": "layer_norm_epsilon", "starcoder2": "norm_epsilon", "mamba": "layer_norm_epsilon",
    "nemotron": "norm_eps", "t5": "layer_norm_epsilon",
}  # fmt: skip
_WHOLE = ("gemma", "gemma2", "gemma3_text", "nemotron")  # their scales are 1 + weight, and stored as that sum
_BY_EPSILON = {"attention.layer_norm_rms_epsilon": "rmsnorm", "attention.layer_norm_epsilon": "layernorm"}


def read_gguf(files: Files, name: str) -> Contents:
    """The tensors of a GGUF, and the configuration that its metadata are.

    Raises:
        CheckpointError: a header that is cut off, contradicts itself, or is of another version; one line.
    """
    cursor = _Cursor(files, name)
    try:
        if cursor.take(4) != MAGIC:
            raise CheckpointError(f"{name}: not a GGUF; give a file that begins as one")
        version = cursor.number("<I")
        if version not in (2, 3):
            raise CheckpointError(f"{name}: GGUF of version {version}; 2 and 3 are read, little-endian")
        num_tensors, num_keys = cursor.count(_MAX_TENSORS), cursor.count(_MAX_KEYS)
        facts = {}
        for _ in range(num_keys):
            key = cursor.text()
            facts[key] = cursor.value(cursor.number("<I"))
        told = [cursor.tensor() for _ in range(num_tensors)]
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{name}: the header is cut off or corrupt; download the file again") from error
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20:
        raise CheckpointError(f"{name}: an alignment of {shown(alignment)}; corrupt")
    start = -(-cursor.position // alignment) * alignment
    entries = [_entry(name, *each, start, files.size(name)) for each in told]
    if len({entry.name for entry in entries}) != len(entries):
        raise CheckpointError(f"{name}: two tensors have one name; corrupt or hostile")
    for before, after in itertools.pairwise(sorted(entries, key=lambda each: (each.start, each.end))):
        if after.start < before.end:
            raise CheckpointError(f"{name}: {shown(before.name)} and {shown(after.name)} overlap; corrupt header")
    return Contents(entries, config=_config(facts, entries), norm=_norm(facts, {entry.name for entry in entries}))


class _Cursor:
    """Bytes of a file in their order, fetched by windows."""

    def __init__(self, files: Files, name: str):
        self._files, self._name, self._size = files, name, files.size(name)
        self._start, self._raw = 0, b""
        self.position = 0

    def take(self, count: int) -> bytes:
        begin = self.position - self._start
        if not 0 <= begin <= begin + count <= len(self._raw):
            self._start, begin = self.position, 0
            end = min(self.position + max(count, _WINDOW), self._size)
            self._raw = self._files.read(self._name, self.position, end) if end > self.position else b""
        self._move(count)
        return self._raw[begin : begin + count]

    def _move(self, count: int) -> None:
        self.position += count
        if self.position > min(self._size, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{self._name}: the header is cut off, or longer than any; download the file again")

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, most: int) -> int:
        found = int(self.number("<Q"))
        if found > most:
            raise CheckpointError(f"{self._name}: a header with {found:,} of what at most {most:,} are read; corrupt")
        return found

    def text(self) -> str:
        return self.take(self.count(_MAX_TEXT)).decode()

    def value(self, kind: int) -> Any:
        """A value; of an array its number of items alone."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise CheckpointError(f"{self._name}: a value of the unknown type {kind}; corrupt, or a later GGUF")
        inner, items = self.number("<I"), self.count(_MAX_ITEMS)
        if inner in _NUMBERS:
            self._move(items * struct.calcsize(_NUMBERS[inner]))
        elif inner == _STRING:
            for _ in range(items):
                self._move(self.count(_MAX_TEXT))
        else:
            raise CheckpointError(f"{self._name}: an array of the type {inner}; corrupt, or a later GGUF")
        return _Items(items)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self.text(), self.number("<I")
        if axes > MAX_DIMENSIONS:
            raise CheckpointError(f"{self._name}: tensor {shown(name)} has {axes} axes; corrupt")
        shape = tuple(self.count(MAX_EXTENT) for _ in range(axes))
        return name, shape[::-1], self.number("<I"), self.count(2**60)


class _Items(int):
    """How many items an array has, which are not read."""


def _entry(file: str, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, size: int) -> TensorEntry:
    check_name(file, name)
    dtype, block, block_bytes = _TYPES.get(kind, (f"type {kind}", 0, 0))
    values = math.prod(shape)
    if block and (shape or (1,))[-1] % block:
        raise CheckpointError(
            f"{file}: tensor {shown(name)} of shape {list(shape)} is no whole number of {dtype} blocks"
        )
    end = start + offset + (values // block * block_bytes if block else 0)
    if end > size:
        raise CheckpointError(f"{file}: tensor {shown(name)} lies beyond the end of the file; truncated")
    return TensorEntry(name, file, dtype, shape, start + offset, end)


def _architecture(facts: dict[str, Any]) -> tuple[str, str] | None:
    told = facts.get("general.architecture")
    return (told, _MODEL_TYPES.get(told, told.replace("-", "_"))) if isinstance(told, str) else None


def _config(facts: dict[str, Any], entries: list[TensorEntry]) -> dict[str, Any] | None:
    """The config.json of the same model, as far as its norms and sizes go."""
    known = _architecture(facts)
    if known is None:
        return None
    told, model_type = known
    keys = {
        "embedding_length": _WIDTHS.get(model_type, "hidden_size"),
        "block_count": _LAYERS.get(model_type, "num_hidden_layers"),
        "attention.head_count": _HEADS.get(model_type, "num_attention_heads"),
        "attention.head_count_kv": "num_key_value_heads",
        "feed_forward_length": "intermediate_size",
        "attention.layer_norm_rms_epsilon": _EPSILONS.get(model_type, "rms_norm_eps"),
        "attention.layer_norm_epsilon": _EPSILONS.get(model_type, "layer_norm_eps"),
    }
    if model_type in _HEADS:
        del keys["attention.head_count_kv"], keys["feed_forward_length"]
    found = {ours: facts.get(f"{told}.{theirs}") for theirs, ours in keys.items()}
    vocabulary = next((entry.shape[0] for entry in entries if entry.name == "token_embd.weight"), None)
    numbers = {k: v for k, v in (found | {"vocab_size": vocabulary}).items() if type(v) in (int, float)}
    return {"model_type": model_type} | numbers


def _norm(facts: dict[str, Any], names: set[str]) -> StoredNorm | None:
    """What is told of the norms, and what the final one is called."""
    known = _architecture(facts)
    told, model_type = known or ("", "")
    blocks = facts.get(f"{told}.block_count")
    candidates = (
        "output_norm",
        "dec.output_norm",
        f"blk.{blocks - 1}.layer_output_norm" if type(blocks) is int else "",
    )
    name = next((each for each in candidates if f"{each}.weight" in names), None)
    keys = [(family, facts[f"{told}.{key}"]) for key, family in _BY_EPSILON.items() if f"{told}.{key}" in facts]
    width = facts.get(f"{told}.embedding_length")
    family, eps = keys[0] if keys else (None, None)
    return StoredNorm(
        name=name,
        family=family,
        eps=eps if type(eps) is float else None,
        hidden_size=width if type(width) is int else None,
        num_blocks=blocks if type(blocks) is int else None,
        whole_scale=model_type in _WHOLE,
    )
