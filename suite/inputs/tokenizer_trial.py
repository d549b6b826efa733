"""A tokenizer.json is loaded in another process first, where it may take so much time and memory, and crash.

Its library is Rust: of a stranger's file it can panic, abort the process, or match a pattern for ever.
"""

import functools
import json
from pathlib import Path

from deadbench.suite.architectures import watched
from deadbench.suite.errors import InputError
from deadbench.suite.plain_text import plain

_CPU_SECONDS, _SECONDS = 10, 18.0  # as those of a configuration's trial
_MEMORY_BYTES = 5 * 2**28  # a large vocabulary takes more than a configuration
_PROCESS = "deadbench.suite.inputs.tokenizer_process"
_CHARACTERS = 100_000  # of the text that is to be read
_ODD = ("", "a", " ", "\n\n", "\0", "e\u0301\u202e", "\U0001f469\u200d\U0001f4bb", "\ufffd", "a" * 1000)


def check(folder: Path, text: str) -> None:
    """Raise InputError where a tokenizer.json of `folder` crashes, or takes more than a tokenizer can, on `text`.

    One that its version names (tokenizer.4.0.0.json) is loaded by transformers in place of the other. Each file and
    text is tried once a process.
    """
    for path in sorted(folder.glob("tokenizer.*json")):
        if path.is_file():
            there = path.stat()
            identity = (there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns)
            why = _tried(str(path), identity, text[:_CHARACTERS])
            if why is not None:
                raise InputError(
                    f"{plain(str(path))}: loading this tokenizer and encoding text with it {why}; give another, or "
                    "--input tokens:random or tokens:FILE.npy"
                )


@functools.lru_cache(maxsize=64)
def _tried(path: str, identity: tuple[int, ...], text: str) -> str | None:
    """What comes of the file: which limit it passes, or how it crashes; None: it can be loaded."""
    running = watched.start(_PROCESS, path, str(_CPU_SECONDS))
    try:
        if watched.answer(running, watched.START_SECONDS) is None:
            return "needs a process of its own, which does not start; run again"
        watched.say(running, json.dumps([text, *_ODD]).encode())
        said = watched.answer(running, _SECONDS, _MEMORY_BYTES)
    except watched.LimitError as error:
        return f"takes more than {error}"
    finally:
        code = watched.end(running)
    panic = json.loads(said) if said is not None else f"its process ended, exit code {code}"
    if said is None and watched.exhausted(code):
        return f"takes more than {_CPU_SECONDS} s of CPU"
    return None if panic is None else f"crashes its library ({plain(panic)})"
