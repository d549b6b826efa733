"""What may stand in `--input SPEC`, checked and hashed without torch: before anything is loaded, or a device is taken.

`suite/inputs/tokens.py` says what each of them becomes.
"""

import hashlib
import re
from importlib import resources
from pathlib import Path
from typing import Any

from deadbench.suite.errors import InputError
from deadbench.suite.storage import file_pieces, is_hidden, refusal

# What a kind of input may be read as; a Hub dataset as what the model reads.
MODALITIES = {"text": ("text",), "tokens": ("text",), "hf": ("text", "image"), "image": ("image",), "audio": ("audio",)}
# Photographs with captions, for a model that takes both; the last two count the tokens of one kind alone.
MIXED = ("image-text", "image-text/text", "image-text/picture")
MODALITIES |= dict.fromkeys(MIXED, ("text",))
# Of how their sequences are made, raised where that changes: before 2, one of the places of a BLIP-2 was filled.
_MIXED_VERSION = b"2"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_DATASET = re.compile(r"[\w.-]+/[\w.-]+")
_CAPTION_CHARACTERS = 10_000  # the beginning of a longer one is read
MOST_PHOTO_BYTES = 256_000_000
MOST_TEXT_BYTES = 2**28  # of a longer text the beginning is read: some sixty million tokens
_MOST_ID_BYTES = 2**30  # which are all read, more than once, and mapped into memory
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def check_spec(spec: str, modality: str) -> None:
    """Raise InputError where `spec` is no input specification, names a missing file, or is not for `modality`."""
    kind, _, rest = spec.partition(":")
    if (
        kind not in MODALITIES
        or (kind in ("tokens", "hf", "audio") and not rest)
        or (kind == "audio" and rest != "noise")
    ):
        raise InputError(
            f"input {spec!r} is unknown; choose text, text:FILE, image, image:DIR, tokens:random, tokens:FILE.npy, "
            "image-text[/text, /picture][:DIR], hf:DATASET[:CONFIG][:SPLIT] or audio:noise"
        )
    if modality not in MODALITIES[kind]:
        raise InputError(f"input {spec!r} does not fit a model that reads {modality}")
    if kind == "hf" and not _DATASET.fullmatch(rest.partition(":")[0]):
        raise InputError(
            f"input {spec!r}: a dataset of the Hub is OWNER/NAME; give hf:OWNER/NAME[:CONFIG][:SPLIT], as in "
            "hf:Salesforce/wikitext:wikitext-103-raw-v1"
        )
    if kind == "text" and rest and not Path(rest).is_file():
        raise InputError(f"input {spec!r}: no such file")
    if kind in ("image", *MIXED) and rest and not Path(rest).is_dir():
        raise InputError(f"input {spec!r}: no such directory")
    if kind == "tokens" and rest != "random" and not Path(rest).is_file():
        raise InputError(f"input {spec!r}: no such file; give tokens:random or a .npy file")


def content_hash(spec: str) -> str:
    """What `spec` stands for, by content: two files of one name are two inputs.

    Raises:
        InputError: a file that cannot be read, is none, or is larger than what a read takes.
    """
    kind, _, rest = spec.partition(":")
    digest = hashlib.sha256(kind.encode())
    if (kind == "tokens" and rest == "random") or kind in ("hf", "audio"):
        digest.update(rest.encode())
    elif kind == "image":
        for photo in photo_files(rest):
            _add(digest, spec, photo, MOST_PHOTO_BYTES)
    elif kind in MIXED:
        digest.update(_MIXED_VERSION)
        for photo, caption in zip(photo_files(rest), captions(rest), strict=True):
            _add(digest, spec, photo, MOST_PHOTO_BYTES)
            digest.update(caption.encode())
    else:
        is_text = kind == "text"
        path, most_bytes = (text_path(rest), MOST_TEXT_BYTES) if is_text else (Path(rest), _MOST_ID_BYTES)
        _add(digest, spec, path, most_bytes, cut=is_text)
    return digest.hexdigest()[:16]


def _add(digest: Any, spec: str, path: Path, most_bytes: int, *, cut: bool = False) -> None:
    try:
        for piece in file_pieces(path, most_bytes, cut=cut):
            digest.update(piece)
    except OSError as error:
        raise InputError(f"input {spec!r}: {path} cannot be read ({refusal(error)})") from error


def photo_files(folder: str) -> list[Path]:
    """The photographs in `folder`, the bundled ones for "".

    Raises:
        InputError: there are none.
    """
    root = Path(folder) if folder else Path(str(resources.files("deadbench.suite").joinpath("data/photos")))
    there = (p for p in root.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES and not is_hidden(p.name))
    photos = sorted(p for p in there if p.is_file())
    if not photos:
        raise InputError(f"{root}: no photographs ({', '.join(PHOTO_SUFFIXES)})")
    return photos


def captions(folder: str) -> list[str]:
    """The caption of each of `photo_files`: the text beside it of the same name, `a.txt` of `a.jpg`.

    Raises:
        InputError: one has none, or it is no text.
    """
    found = []
    for photo in photo_files(folder):
        path = photo.with_suffix(".txt")
        if not path.is_file():
            raise InputError(f"{photo}: has no caption; put it beside it, as {path.name}")
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(_CAPTION_CHARACTERS).strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        if not text:
            raise InputError(f"{path}: an empty caption")
        found.append(text)
    return found


def text_path(rest: str) -> Path:
    """The text file that `text:REST` names, the bundled corpus for ""."""
    return Path(rest) if rest else Path(str(resources.files("deadbench.suite").joinpath("data/corpus.txt")))
