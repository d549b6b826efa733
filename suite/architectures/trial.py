"""A configuration of extraordinary size is built in another process first, which may take so much time and memory.

What passes there is built here. One such process is kept warm for all that this one builds.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from deadbench.suite.architectures.ordinary import excess
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.errors import ArchitectureError

is_the_trial = False  # in the process of trials, which tries nothing elsewhere
_CPU_SECONDS = 10
_MEMORY_BYTES = 5 * 2**28  # that a trial takes beside the libraries, which are 0.6 GB: not 2 GB together
_SECONDS, _START_SECONDS = 18.0, 180.0  # on the clock: of a trial, and until the process has its libraries
_STARVED = 10  # times as long on the clock, while it computes: other work has the cores, and its CPU time is limited
_LOOK_SECONDS = 0.05  # at its memory
_IDLE_LOOKS = 20  # in a row at a process that waits: one may fall on a pause in its work
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


class _LimitError(Exception):
    """What a trial took too much of."""


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
        assert running.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            running.stdin.write(text.encode() + b"\n")
            running.stdin.flush()
        try:
            said = self._line(running, _SECONDS, self._idle_bytes + _MEMORY_BYTES)
        except _LimitError as error:
            self.end()
            limit = str(error)
        else:
            if said is not None:
                answer: str | None = json.loads(said)
                return answer
            code = self.end()
            limit = f"{_CPU_SECONDS} s of CPU" if code == -signal.SIGXCPU else f"a process can (its exit code: {code})"
        return f"building the model of this configuration takes more than {limit} ({_LARGEST}); no published model does"

    def end(self) -> int | None:
        """End the process; its exit status where it had ended by itself."""
        running, self._running = self._running, None
        if running is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(1 if running.poll() is None else 0)
        code = running.poll()
        running.kill()
        running.wait()
        for pipe in (running.stdin, running.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return code

    def _started(self) -> "subprocess.Popen[bytes] | None":
        if self._running is None or self._running.poll() is not None:
            self.end()
            root = str(Path(str(sys.modules["deadbench"].__file__)).parents[1])
            path = os.pathsep.join(each for each in (root, os.environ.get("PYTHONPATH")) if each)
            offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
            self._running = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-m", _PROCESS, str(_CPU_SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **offline},
            )
            with contextlib.suppress(_LimitError):
                if self._line(self._running, _START_SECONDS) is not None:
                    self._idle_bytes = _resident(self._running)
                    return self._running
            self.end()
        return self._running

    def _line(self, running: "subprocess.Popen[bytes]", seconds: float, most_bytes: float = math.inf) -> bytes | None:
        """The next line that the process writes; None where it ends before.

        Raises:
            _LimitError: the time is over, or it has taken more memory.
        """
        assert running.stdout is not None
        until, found, idle = time.monotonic() + seconds, b"", 0
        while not found.endswith(b"\n"):
            ready, _, _ = select.select([running.stdout], [], [], _LOOK_SECONDS)
            piece = os.read(running.stdout.fileno(), 2**16) if ready else b""
            if ready and not piece:
                return None
            found += piece
            if _resident(running) > most_bytes:
                raise _LimitError(f"{_MEMORY_BYTES / 2**30:.3g} GB of memory")
            late = time.monotonic() - until
            if late > 0 and not ready:
                idle = 0 if _computes(running) else idle + 1
                if idle >= _IDLE_LOOKS or late > (_STARVED - 1) * seconds:
                    raise _LimitError(f"{seconds:.0f} s")
        return found


def _resident(running: "subprocess.Popen[bytes]") -> int:
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(running.pid).memory_info().rss)
    return 0


def _computes(running: "subprocess.Popen[bytes]") -> bool:
    """Whether the process has work, be there a core for it or not; one that waits for something has none."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(running.pid).status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
    return False


@functools.cache
def _process() -> _Trials:
    return _Trials()


def _value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config
