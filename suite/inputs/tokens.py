"""What a model is fed: `--input SPEC` becomes batches of model inputs, with padding marked once and for all.

    text                     the bundled corpus            text:FILE    a UTF-8 text file
    image                    the bundled photographs       image:DIR    a folder of photographs
    tokens:random            seeded uniform token ids      tokens:FILE.npy   ids exactly as given, in order
    hf:DATASET[:CONFIG][:SPLIT]    a Hub dataset's text column, or of a model of pictures its pictures
    audio:noise              seeded Gaussian noise
    image-text               photographs, each with its caption: `suite/inputs/mixed.py`

Nothing falls back to something else: a model without a tokenizer cannot read text, and says so.
Shapes: S sequences, T positions, N tokens, B images.
"""

import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deadbench.suite.architectures.no_network import nothing_fetched
from deadbench.suite.errors import InputError, is_of_work, reason_of
from deadbench.suite.inputs.batches import Batch, Inputs
from deadbench.suite.inputs.early_checks import check_vocabulary, open_ids
from deadbench.suite.inputs.hub_text import read_hub_text
from deadbench.suite.inputs.specs import MOST_TEXT_BYTES, TOKENIZER_FILES, text_path
from deadbench.suite.inputs.tokenizer_trial import check as check_tokenizer

_CHARACTERS_PER_PIECE, _LONGEST_LINE = 100_000, 1_000_000


def token_batches(
    spec: str,
    *,
    vocab_size: int,
    num_tokens: int,
    sequence_length: int,
    seed: int,
    tokenizer_folder: Path | None,
    batch_tokens: int,
    avoided_ids: Sequence[int] = (),
) -> Inputs:
    """Batches of token ids: `num_tokens` of them (all of a `tokens:FILE.npy`), in sequences of `sequence_length`.

    Random ids are none of `avoided_ids`. Text is cut into windows, each with the special tokens that the tokenizer puts
    around a text. The last sequence is shorter and padded; padding is masked out of attention and of the statistics.

    Raises:
        InputError: no tokenizer, too little text, ids outside the vocabulary, a file that is no integer array.
    """
    kind, _, rest = spec.partition(":")
    if kind == "tokens" and rest != "random":
        sequences = list(_load_ids(Path(rest), vocab_size))
        sequence_length = len(sequences[0])
    elif kind == "tokens":
        ids_N = np.random.default_rng(seed).integers(0, vocab_size, num_tokens)
        for avoided in (a for a in avoided_ids if len(avoided_ids) < vocab_size):
            other = next(i % vocab_size for i in itertools.count(avoided + 1) if i % vocab_size not in avoided_ids)
            ids_N[ids_N == avoided] = other
        sequences = _cut(ids_N, sequence_length)
    else:
        sequences = _tokenised(spec, num_tokens, sequence_length, tokenizer_folder)
        highest = max(int(s.max()) for s in sequences)
        if highest >= vocab_size:
            raise InputError(
                f"the tokenizer gives id {highest}, the model knows {vocab_size}: not this model's tokenizer"
            )
    distinct = len(np.unique(np.concatenate(sequences)))
    per_batch = max(1, batch_tokens // sequence_length)
    batches = [_pad(sequences[i : i + per_batch]) for i in range(0, len(sequences), per_batch)]
    return Inputs(batches, sum(len(s) for s in sequences), distinct, spec)


def vocabulary(config: Any) -> int:
    """How many ids the model knows; one that hashes them (CANINE) knows every code point."""
    size: int = config.vocab_size if hasattr(config, "vocab_size") else sys.maxunicode + 1
    return size


def special_ids(config: Any) -> Sequence[int]:
    """Ids that stand for padding, whose embedding is often zero, or for a picture or sound to be put in their place."""
    ids = []
    for each in (config, config.get_text_config()):
        for name, value in vars(each).items():
            other = any(word in name for word in ("image", "video", "audio", "vision", "boi", "eoi"))
            if name == "pad_token_id" or (other and name.endswith(("token_id", "token_index"))):
                ids += [value] if isinstance(value, int) and value >= 0 else []
    return sorted(set(ids))


def _load_ids(path: Path, vocab_size: int) -> NDArray[np.int64]:
    ids = open_ids(path)
    check_vocabulary(ids, str(path), vocab_size)
    return ids.astype(np.int64)


def _cut(ids_N: NDArray[np.int64], length: int) -> list[NDArray[np.int64]]:
    return [ids_N[i : i + length] for i in range(0, len(ids_N), length)]


def _tokenised(spec: str, num_tokens: int, length: int, folder: Path | None) -> list[NDArray[np.int64]]:
    pieces, first = itertools.tee(_pieces(spec))
    tokenizer = load_tokenizer(spec, folder, first)
    prefix, suffix = special_tokens(tokenizer)
    content = length - len(prefix) - len(suffix)
    if content < 1:
        raise InputError(
            f"sequences of {length} tokens leave no room beside {len(prefix) + len(suffix)} special tokens"
        )
    ids: list[int] = []
    wanted = -(-num_tokens // length) * content
    for piece in pieces:
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    windows = [np.array([*prefix, *ids[i : i + content], *suffix]) for i in range(0, min(len(ids), wanted), content)]
    total = sum(len(w) for w in windows)
    if total < num_tokens:
        raise InputError(
            f"input {spec!r} has only {total} of the {num_tokens} tokens asked for; give --tokens or a longer text"
        )
    if total > num_tokens:  # the last window loses its end, never its beginning
        windows[-1] = windows[-1][: len(windows[-1]) - (total - num_tokens)]
    return [w for w in windows if len(w)]


def load_tokenizer(spec: str, folder: Path | None, texts: Iterable[str]) -> Any:
    """The tokenizer in `folder`, tried elsewhere on the first of the `texts` that it is for.

    Raises:
        InputError: there is none, or it cannot be loaded, crashes, or takes too much.
    """
    from transformers import AutoTokenizer

    # transformers 5 builds an empty tokenizer where there are no files; that would be a silent fallback.
    if folder is None or not (any((folder / name).is_file() for name in TOKENIZER_FILES) or _has_no_files(folder)):
        raise InputError(
            f"input {spec!r} needs the model's tokenizer, and there is none"
            f"{f' in {folder}' if folder else ''}; give --input tokens:random or tokens:FILE.npy"
        )
    check_tokenizer(folder, next(iter(texts), ""))
    try:
        with nothing_fetched():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BaseException as error:
        if not is_of_work(error):
            raise
        raise InputError(f"the tokenizer in {folder} cannot be loaded ({reason_of(error)})") from error


def _has_no_files(folder: Path) -> bool:
    """Whether the tokenizer is one of bytes or code points, whose class is all there is of it."""
    import transformers

    try:
        told = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokenizer_class = getattr(transformers, str(told["tokenizer_class"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return getattr(tokenizer_class, "vocab_files_names", None) == {}


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _pieces(spec: str) -> Iterator[str]:
    kind, _, rest = spec.partition(":")
    if kind == "hf":
        yield from read_hub_text(rest)
        return
    path, piece = text_path(rest), ""
    with io.TextIOWrapper(io.BufferedReader(_Head(path)), encoding="utf-8") as file:
        try:
            while line := file.readline(_LONGEST_LINE):  # one without an end is not held
                piece += line
                if len(piece) > _CHARACTERS_PER_PIECE:
                    yield piece
                    piece = ""
            if piece:
                yield piece
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data" or path.stat().st_size <= MOST_TEXT_BYTES:
                raise InputError(f"{rest}: not UTF-8 text ({error.reason} at byte {error.start})") from error
            yield piece  # what is not read begins within a letter


class _Head(io.FileIO):
    """A file that ends where no more of a text is read."""

    def readinto(self, buffer: Any) -> int | None:
        return super().readinto(memoryview(buffer)[: max(0, MOST_TEXT_BYTES - self.tell())])


def _pad(sequences: list[NDArray[np.int64]]) -> Batch:
    lengths = [len(s) for s in sequences]
    if len(set(lengths)) == 1:
        # No mask: the attention kernels differ with one, and there is nothing to hide.
        return Batch({"input_ids": torch.from_numpy(np.stack(sequences))})
    ids_ST = torch.zeros(len(sequences), max(lengths), dtype=torch.long)
    mask_ST = torch.zeros(len(sequences), max(lengths), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids_ST[row, : len(sequence)] = torch.from_numpy(sequence)
        mask_ST[row, : len(sequence)] = True
    return Batch({"input_ids": ids_ST, "attention_mask": mask_ST.long()}, mask_ST)
