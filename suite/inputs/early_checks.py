"""Whether an input fits a model, as far as its config.json and the names of its files tell: before anything is loaded.

What they do not tell is found where the read runs (`suite/inputs/feed.py`); nothing is refused on a guess.
"""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.errors import InputError, first_line
from deadbench.suite.inputs.specs import MIXED, TOKENIZER_FILES

# Architectures whose positions are a table, and how many of its entries no token can have.
_TABLES = {
    "albert": 0, "bert": 0, "biogpt": 0, "camembert": 2, "distilbert": 0, "electra": 0, "gpt2": 0, "gpt_bigcode": 0,
    "gpt_neo": 0, "openai-gpt": 0, "opt": 0, "roberta": 2, "xlm-roberta": 2,
}  # fmt: skip
_HEAD_BYTES = 1_000_000
_POSITIONS = ("n_positions", "max_position_embeddings")
_PICTURE_WORDS = ("image", "patch", "pixel", "vision", "visual", "num_channels", "backbone", "video")
_SOUND_WORDS = ("audio", "mel_bins", "sampling_rate", "speech", "feat_extract", "codebook", "wav")
_TEXT_WORDS = ("vocab", "text", "llm", "language", "thinker")


def check_config(spec: str, modality: str, config: Mapping[str, Any], names: Sequence[str] | None) -> None:
    """Raise InputError where the model of `config` cannot take `spec`, which is of `modality`.

    `names` are those of its files, None where they are not known.
    """
    kind, _, rest = spec.partition(":")
    keys = set(_keys(config))
    pictures, sound, text = (
        any(word in key for key in keys for word in words) for words in (_PICTURE_WORDS, _SOUND_WORDS, _TEXT_WORDS)
    )
    model_type = config.get("model_type")
    if modality == "text" and not text and (pictures or sound):
        other = "image" if pictures else "audio:noise"
        raise InputError(f"input {spec!r} is text, and {model_type} takes none; give --input {other}")
    if kind in MIXED and not (text and pictures):
        raise InputError(f"input {spec!r} is pictures and text, and {model_type} does not take both; give --input text")
    of_text_alone = text and not (pictures or sound) and not keys.isdisjoint((*_POSITIONS, "rope_theta"))
    if modality != "text" and of_text_alone:
        raise InputError(f"input {spec!r} is {modality}, and {model_type} takes text; give --input text, tokens:random")
    if modality == "text" and kind in ("text", "hf") and names is not None and not has_tokenizer(names):
        raise InputError(
            f"input {spec!r} needs the model's tokenizer, and there is none; give --input tokens:random or "
            "tokens:FILE.npy"
        )
    if kind == "text" and rest:
        check_text(Path(rest))
    if kind == "tokens" and rest != "random":
        ids_ST = open_ids(Path(rest))
        vocabulary = (config.get("text_config") or config).get("vocab_size")
        if isinstance(vocabulary, int):
            check_vocabulary(ids_ST, rest, vocabulary)
        check_positions(ids_ST.shape[1], _positions(config))


def check_text(path: Path) -> None:
    """Raise InputError where a file begins with what is no text."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # which bears a letter that is cut off
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if b"\0" in head:
        raise InputError(f"{path}: not text (a zero at byte {head.index(0)}); token ids are given as tokens:FILE.npy")


def open_ids(path: Path) -> NDArray[np.integer[Any]]:
    """The token ids in a .npy file, left on the disk.

    Raises:
        InputError: it is no integer array of sequences x length.
    """
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise InputError(
                f"{path}: not a .npy array; where it is bare ids, their type and the length are yours to say: "
                f"numpy.save('ids.npy', numpy.fromfile({str(path)!r}, 'uint16').reshape(-1, 256))"
            )
    try:
        ids: NDArray[np.integer[Any]] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        # The last four of headers that numpy takes apart as Python's own text.
        raise InputError(f"{path}: not a .npy array of integers ({first_line(error)})") from error
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.size == 0:
        raise InputError(
            f"{path}: expected an integer array (sequences x length), found {ids.dtype} of shape {ids.shape}"
        )
    return ids


def check_vocabulary(ids_ST: NDArray[np.integer[Any]], path: str, vocab_size: int) -> None:
    """Raise InputError where an id is none of the model's."""
    lowest, highest = int(ids_ST.min()), int(ids_ST.max())
    if lowest < 0 or highest >= vocab_size:
        raise InputError(f"{path}: token ids {lowest} to {highest}, the model knows 0 to {vocab_size - 1}")


def check_positions(length: int, positions: int | None) -> None:
    """Raise InputError where sequences are longer than the model's table of positions; None: it has none."""
    if positions is not None and length > positions:
        raise InputError(f"{length} tokens a sequence, and the model has {positions} positions; cut the sequences")


def _positions(config: Mapping[str, Any]) -> int | None:
    taken = _TABLES.get(str(config.get("model_type")))
    if taken is None or config.get("position_embedding_type", "absolute") != "absolute":
        return None
    said = next((config[key] for key in _POSITIONS if isinstance(config.get(key), int)), None)
    return None if said is None else int(said) - taken


def has_tokenizer(names: Sequence[str]) -> bool:
    """Whether a folder of files with these names has a tokenizer.

    Those without a vocabulary file (of bytes, of characters) have their configuration alone.
    """
    return any(name in names for name in (*TOKENIZER_FILES, "tokenizer_config.json"))


def _keys(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        yield key
        if isinstance(value, dict):
            yield from _keys(value)
