"""A configuration of extraordinary size is built in another process first, which may take so much time and memory.

What passes there is built here. One such process is kept warm for all that this one builds.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import subprocess
import threading
from collections.abc import Mapping
from typing import Any

from deadbench.suite.architectures import watched
from deadbench.suite.architectures.ordinary import excess
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.errors import ArchitectureError

is_the_trial = False  # in the process of trials, which tries nothing elsewhere
_CPU_SECONDS = 10
# That a trial takes beside the libraries, which are 0.6 GB in either process: not 2 GB together. What stays with a
# process behind its answer is not the next configuration's.
_MEMORY_BYTES, _KEPT_BYTES = 3 * 2**28, 2**27
_SECONDS = 18.0  # on the clock
_ASKING = threading.Lock()
_ANSWERS: dict[str, str | None] = {}  # by the configuration's hash: why not


def check(config: Mapping[str, Any]) -> None:
    """Raise ArchitectureError where building a configuration takes more than a model can: time, CPU or memory.

    It names the limit, and the number that is largest beside the default of its kind.
    """
    largest = None if is_the_trial else excess(config)
    if largest is None:
        return
    text = json.dumps(config, sort_keys=True)
    key = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    with _ASKING:
        if key not in _ANSWERS:
            _ANSWERS[key] = _process().ask(text)
    answer = _ANSWERS[key]
    if answer is not None:
        raise ArchitectureError(answer.replace(_LARGEST, f"{largest} is {shown(_value(config, largest))}"))


_LARGEST = "{largest}"
_PROCESS = "deadbench.suite.architectures.trial_process"


class _Trials:
    """The process of trials, started when the first is wanted, and anew when one has ended it."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None
        self._idle_bytes = 0
        atexit.register(self.end)

    def ask(self, text: str) -> str | None:
        """Why a configuration cannot be built, with `_LARGEST` where its largest number is to stand; None: it can."""
        running = self._started()
        if running is None:
            return "the process in which configurations are tried does not start; run again"
        watched.say(running, text.encode())
        try:
            said = watched.answer(running, _SECONDS, _MEMORY_BYTES, self._idle_bytes)
        except watched.LimitError as error:
            self.end()
            limit = str(error)
        else:
            if said is not None:
                if watched.resident(running) > self._idle_bytes + _KEPT_BYTES:
                    self.end()
                answer: str | None = json.loads(said)
                return answer
            code = self.end()
            limit = f"{_CPU_SECONDS} s of CPU" if watched.exhausted(code) else f"a process can (its exit code: {code})"
        return f"building the model of this configuration takes more than {limit} ({_LARGEST}); no published model does"

    def end(self) -> int | None:
        """End the process; its exit status where it had ended by itself."""
        running, self._running = self._running, None
        return None if running is None else watched.end(running)

    def _started(self) -> "subprocess.Popen[bytes] | None":
        if self._running is None or self._running.poll() is not None:
            self.end()
            self._running = watched.start(_PROCESS, str(_CPU_SECONDS))
            with contextlib.suppress(watched.LimitError):
                if watched.answer(self._running, watched.START_SECONDS) is not None:
                    self._idle_bytes = watched.resident(self._running)
                    return self._running
            self.end()
        return self._running


@functools.cache
def _process() -> _Trials:
    return _Trials()


def _value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config
