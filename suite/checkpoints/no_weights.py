"""Why a folder has no weights or no configuration, by what is there instead, and what to do: one line each."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deadbench.suite.checkpoints.shard_names import shard_of
from deadbench.suite.checkpoints.strict_json import MAX_JSON_BYTES, parse_object
from deadbench.suite.errors import CheckpointError
from deadbench.suite.storage import is_hidden

ADAPTER_FILE = "adapter_config.json"
OTHER_LIBRARIES = (".msgpack", ".h5")
_POINTER = b"version https://git-lfs"
_CACHED = re.compile(r"models--(.+)")
_LEAST = 8  # bytes of a safetensors file, which tell the length of its header
# What lies where weights are looked for, by the endings of names, and what to do.
_INSTEAD = (
    (
        (".incomplete", ".part", ".partial", ".crdownload", ".aria2"),
        "a download that did not end ({}); download it again",
    ),
    ((".zip", ".tar", ".tar.gz", ".tgz", ".7z"), "an archive ({}); unpack it, and give what was in it"),
    (("params.json",), "weights in the form of Meta's releases ({}); give those converted for transformers"),
    (
        (".onnx", ".npz", ".nemo", ".tflite", ".mlmodel", ".ot", "manifest.ocdbt"),
        "only weights of another library ({}); load and save them with transformers",
    ),
    (("optimizer.pt", "optimizer.bin"), "a state of training ({}) without the model's weights; save those too"),
)
_AGAIN = "the Hub id, which downloads it again"
_BELOW = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".distcp")  # weights, where a folder below has them


def no_config(files: Any) -> CheckpointError:
    """That the checkpoint `files` has no config.json, and why."""
    return CheckpointError(
        _called(files) + (_instead(files) or "no config.json; not a transformers checkpoint (or give --config CONFIG)")
    )


def weights_alone(files: Any, remark: str | None) -> CheckpointError:
    """That the checkpoint `files` has weights and no config.json; `remark` is what is to be said of the weights."""
    told = _instead(files, weights=True) or "no config.json beside the weights; give --config CONFIG"
    return CheckpointError(_called(files) + told + (f"; {remark}" if remark else ""))


def no_weights(files: Any, found: Sequence[str]) -> CheckpointError:
    """That it has no weights that can be read, or the files `found` of which nothing says that they belong together."""
    if part := shard_of(found[0]) if len(found) == 1 else None:
        text = f"{found[0]} is one of {part.of} files; copy the others and their index beside it"
    elif found:
        ending = "safetensors" if found[0].endswith(".safetensors") else found[0].rpartition(".")[2]
        index = "model.safetensors" if ending == "safetensors" else "pytorch_model.bin"
        text = (
            f"{len(found)} {ending} files and no {index}.index.json: cannot tell which belong together; give one file"
        )
    else:
        others = sorted(name for name in files.names() if name.endswith(OTHER_LIBRARIES))
        text = _instead(files) or "no model.safetensors and no model.safetensors.index.json"
        if others:
            text = f"only weights of another library ({others[0]}); load and save them with transformers"
    return CheckpointError(_called(files) + text)


def not_torch(files: Any, name: str) -> CheckpointError:
    """That the file `name` is none of torch.save."""
    first = files.read(name, 0, len(_POINTER))
    if is_pointer(first):
        return pointer(files, name)
    what = "an empty file" if not first else f"not written by torch.save (it begins with {first[:8]!r})"
    return CheckpointError(f"{called(files, name)}: {what}; give a state_dict saved by torch.save, or safetensors")


def no_safetensors(files: Any, name: str, length: int, size: int) -> CheckpointError:
    """That the file `name` of `size` bytes is none: its header would be of `length` bytes."""
    if size < _LEAST:
        return CheckpointError(
            f"{called(files, name)}: {size} bytes, too short for a safetensors file; download it again"
        )
    if is_pointer(files.read(name, 0, len(_POINTER))):
        return pointer(files, name)
    first = files.read(name, 0, 40).decode("ascii", "replace")
    if first.startswith(("<", "{")) and " ".join(first.split()).isprintable():
        return CheckpointError(
            f"{called(files, name)} is a text, not weights (it begins with {first!r}), as a server's answer that was "
            "saved under that name; download it again"
        )
    return CheckpointError(
        f"{called(files, name)}: the header claims {length} bytes, the file has {size}; truncated or not a "
        "safetensors file"
    )


def is_pointer(raw: bytes) -> bool:
    """Whether a file's bytes are those of a Git LFS pointer."""
    return raw.startswith(_POINTER)


def pointer(files: Any, name: str) -> CheckpointError:
    """That the file `name` is a Git LFS pointer."""
    what = "file itself" if name.endswith(".json") else "weights"
    return CheckpointError(
        f"{called(files, name)} is a Git LFS pointer, not the {what}: run `git lfs pull` in that folder, "
        "or download the checkpoint from the Hub"
    )


def called(files: Any, name: str) -> str:
    """What messages call the file `name` of the checkpoint `files`, which may be that file itself."""
    source = getattr(files, "source", None) or name
    return source if source == name or source.endswith(f"/{name}") else f"{source}: {name}"


def _called(files: Any) -> str:
    source = getattr(files, "source", None)
    return f"{source}: " if source else ""


def _instead(files: Any, *, weights: bool = False) -> str | None:
    """What is there instead, beside `weights` or of them, and what to do; None where nothing tells."""
    names = files.names()
    if ADAPTER_FILE in names:
        return (
            f"an adapter alone ({ADAPTER_FILE}), without its base {_base(files)}; merge it into the base "
            "(merge_and_unload of peft, then save_pretrained) and give that folder"
        )
    shards = sorted(name for name in names if name.endswith(".distcp"))
    if shards and not files.has(".metadata"):
        return (
            f"shards of torch.distributed.checkpoint ({shards[0]}) without the .metadata that says what they hold; "
            "copy it beside them"
        )
    folder = getattr(files, "folder", None)
    told = None if folder is None else _of_folder(folder, weights)
    for endings, text in () if told else _INSTEAD:
        if found := sorted(name for name in names if name.endswith(endings)):
            return text.format(found[0])
    return told


def _base(files: Any) -> str:
    """What an adapter's configuration calls its base."""
    try:
        if files.size(ADAPTER_FILE) <= MAX_JSON_BYTES:
            named = parse_object(files.read(ADAPTER_FILE), ADAPTER_FILE).get("base_model_name_or_path")
            if isinstance(named, str) and named.isprintable():
                return named[:200]
    except CheckpointError:
        pass
    return "model"


def _of_folder(folder: Path, weights: bool) -> str | None:
    """What a local folder's links and subfolders tell; where it has `weights`, others below do not matter."""
    there = sorted(path for path in folder.iterdir() if not is_hidden(path.name))
    gone = [path.name for path in there if path.is_symlink() and not path.exists()]
    if gone:
        known = next((match[1] for part in folder.parts if (match := _CACHED.fullmatch(part))), None)
        what = f": hf download {known.replace('--', '/', 1)}" if known else ""
        return (
            f"links to files that are gone ({', '.join(gone[:3])}), as in a Hub cache that was moved or cleaned; "
            f"download it again{what}"
        )
    if (folder / "snapshots").is_dir():
        inside = [path for path in (folder / "snapshots").iterdir() if path.is_dir() and not is_hidden(path.name)]
        give = max(inside, key=lambda path: (path.name == _main(folder), path.name)) if inside else _AGAIN
        return f"the root of a model in the Hub's cache, not the model; give {give}"
    if _CACHED.fullmatch(folder.name):
        return f"the root of a model in the Hub's cache, of which nothing is here; give {_AGAIN}"
    hub = [*there, *((folder / "hub").iterdir() if (folder / "hub").is_dir() else ())]
    cached = sorted(match[1].replace("--", "/", 1) for path in hub if (match := _CACHED.fullmatch(path.name)))
    if cached:
        return f"a cache of the Hub, not a model; give one of its Hub ids: {', '.join(cached[:4])}"
    below = [path.name for path in there if (path / "config.json").is_file()]
    if below:
        each = ", ".join(f"{folder.name}/{name}" for name in below[:4])
        return f"no checkpoint itself, but a folder of them; give one: {each}"
    held = [path.name for path in there if not weights and path.is_dir() and _holds_weights(path)]
    if held:
        each = " or ".join(f"{folder.name}/{name}" for name in held[:4])
        return f"no weights in it, but in a folder below; give {each}"
    return None if there else "an empty folder"


def _main(root: Path) -> str:
    """The commit of a cached repository's branch `main`, "" where none is told."""
    try:
        return (root / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _holds_weights(folder: Path) -> bool:
    try:
        return any(
            path.name.endswith(_BELOW) and not path.name.startswith(("optimizer", "adapter_", "training_args"))
            for path in (*folder.iterdir(), *folder.glob("mp_rank_00*/*"))  # the latter of Megatron's ranks
            if path.is_file() and not is_hidden(path.name) and not folder.name.startswith("optimizer")
        )
    except OSError:
        return False
