"""Whether the head of Ray still answers."""

import socket
import threading
import time

_HEAD_SECONDS = 20.0  # without an answer of the head; after 60 Ray ends the process of the driver


class LostClusterError(RuntimeError):
    """The head of the cluster, or this driver's own node, has gone; one line, exit code 1."""


class HeadWatch:
    """Notices that the head of the cluster answers no more, before Ray ends this process over it."""

    def __init__(self) -> None:
        import ray

        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._address = (host.strip("[]"), int(port))
        self._silent_since: float | None = None
        self._stop = threading.Event()
        threading.Thread(target=self._watch, name="head watch", daemon=True).start()

    def __enter__(self) -> "HeadWatch":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def answers(self) -> bool:
        """Whether the head can be asked for something now; where it cannot, Ray's calls do not come back."""
        return self._silent_since is None

    def check(self) -> None:
        """Raise LostClusterError when the head has been silent for too long."""
        silent_since = self._silent_since
        if silent_since is not None and time.monotonic() - silent_since > _HEAD_SECONDS:
            raise LostClusterError(f"the head of the cluster ({':'.join(map(str, self._address))}) answers no more")

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            try:
                with socket.create_connection(self._address, timeout=5.0):
                    self._silent_since = None
            except OSError:
                self._silent_since = self._silent_since or time.monotonic()
