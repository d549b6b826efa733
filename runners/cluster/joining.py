"""Joining a Ray, or starting one: the address is tried before, since Ray itself asks a dead one for many minutes.

Workers do not look for modules in the folder that the command was given in: a user's own `torch.py` is nobody's torch.
A Ray that is started here is its user's alone: its folder and its token are closed to others of the machine.
"""

import contextlib
import os
import re
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from deadbench.runners.cluster.stillborn import watched
from deadbench.suite.errors import message, one_line
from deadbench.suite.scratch import Scratch, sweep
from deadbench.suite.secrets import shown_place

_REFUSED_SECONDS, _SILENT_SECONDS = 3.0, 12.0  # a head that is just starting refuses; one that is slow accepts late
_GREETING_SECONDS = 8.0  # a head that is alive greets at once
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # of HTTP/2, which gRPC speaks
_LOOKS_LIKE_ONE = re.compile(r"(?:ray://)?[^/]*:[-+]?\d+", re.DOTALL)
_FRAME, _SETTINGS = 9, 4  # bytes of a frame's header, and the kind of frame that a server of gRPC sends first
_LONGEST_SOCKET, _SOCKET_LETTERS = 103, 89  # the least of all systems; of a folder in it, a session and a socket there
_METRIC_PORTS = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")
_LOCAL_OBJECT_STORE_BYTES = 200 * 2**20  # tables are small; weights never pass through


class JoinError(ValueError):
    """Ray cannot be started or joined; one line, exit code 2."""


class Connection:
    """A Ray that was joined or started.

    Attributes:
        started_here: it is this process's own, and ends with `leave`.
    """

    def __init__(self, scratch: Scratch | None):
        """With the folder of a Ray that was started here."""
        self._scratch = scratch
        self.started_here = scratch is not None

    def leave(self) -> None:
        """End a Ray that was started here, and remove its folder."""
        import ray

        if self._scratch is not None:
            ray.shutdown()
            self._scratch.close()


def connect(address: str | None, say: Callable[[str], None] = lambda line: None) -> Connection:
    """Join the Ray at `address`, else at RAY_ADDRESS, or start one.

    What takes seconds is said to who waits.

    Raises:
        JoinError: nobody answers there, or Ray refuses.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    if ray.is_initialized():
        return Connection(None)
    check_answers(address)
    say("starting Ray …" if target == "local" else "joining Ray …")
    options: dict[str, Any] = {}
    scratch = None
    if target == "local":
        sweep()
        _close_token()
        scratch = Scratch(_short_folder())
        options = {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE_BYTES}
        # Ray's metrics answer anyone, on all interfaces; nobody could find those of a Ray with ports of its own choice.
        options["_system_config"] = {"enable_metrics_collection": False}
        options["_temp_dir"] = str(scratch.path / "ray")  # which Ray opens to all, within what is closed
    if not target.startswith("ray://"):  # there the server makes the job
        options["job_config"] = _job_config()
    alone = scratch is not None or _is_on_loopback(target)
    place = on_loopback() if alone else contextlib.nullcontext()
    quiet = without_metrics() if scratch is not None else contextlib.nullcontext()
    watch = watched(scratch.path / "ray") if scratch is not None else contextlib.nullcontext()
    try:
        with place, quiet, watch:
            ray.init(address=target, logging_level="ERROR", log_to_driver=False, **options)
    except Exception as error:
        if scratch is not None:
            scratch.close()
        raise JoinError(
            f"Ray at {target!r} cannot be joined ({one_line(error, 300)}); it is local, auto or HOST:PORT"
        ) from error
    return Connection(scratch)


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """All of a Ray that is started within listens on the loopback address alone, which no other machine reaches.

    On Linux Ray takes the machine's own address, even where it is given a loopback one, and listens on all interfaces
    then; but not where it is told, by a variable that is named for macOS and Windows, that no cluster is to be made.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = before and ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR in os.environ
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def without_metrics() -> Iterator[None]:
    """The dashboard's and the autoscaler's own metrics, which answer anyone, have no port in a Ray started within.

    Ray has no setting for it: where a port cannot be, it logs that and goes on.
    """
    unset = [name for name in _METRIC_PORTS if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, "-1"))
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


def _is_on_loopback(target: str) -> bool:
    """Whether the Ray to be joined answers at a loopback address alone: Ray would look for it at the machine's own."""
    from ray._private import services

    host, _, port = (_latest() if target == "auto" else target).rpartition(":")
    if host not in ("127.0.0.1", "localhost", "[::1]") or not port.isdecimal():
        return False
    with contextlib.suppress(OSError), socket.create_connection((services.get_node_ip_address(), int(port)), timeout=2):
        return False
    return True


def _close_token() -> None:
    """The token of this user's Rays, readable to nobody else: Ray would write it for all to read."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # Ray says what it needs and cannot have
        token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = token.with_name(f".auth_token-{secrets.token_hex(8)}")
        with os.fdopen(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(aside, token)  # unless there is one
        except FileExistsError:
            token.chmod(0o600)
        finally:
            aside.unlink()


def _short_folder() -> str:
    """The temporary folder, or /tmp where Ray's sockets below it would have names longer than the system allows."""
    folder = tempfile.gettempdir()
    return folder if len(folder) + _SOCKET_LETTERS <= _LONGEST_SOCKET else "/tmp"


def check_answers(address: str | None) -> None:
    """Raise JoinError where nobody listens at the address that Ray would join; a slow one has its time."""
    variable = os.environ.get("RAY_ADDRESS")
    named = f"--address {address}" if address else f"RAY_ADDRESS={variable}"
    target = address or variable or "local"
    if target == "auto":
        if variable and variable != "auto":  # which Ray then takes
            named, target = f"RAY_ADDRESS={variable}", variable
        else:
            target = _latest()
            named += f" (the Ray at {target}, which was the last one started here)"
    place = re.fullmatch(r"(?:ray://)?(\[[^\]]+\]|[^:/\[\]]+):(\d{1,5})", target)
    if place is None or not 0 < int(place[2]) <= 65535:
        if _LOOKS_LIKE_ONE.fullmatch(target):  # which Ray would ask for ever; of what is none it says so
            raise JoinError(f"{shown_place(named)}: no address of a Ray; it is HOST:PORT, a port 1 to 65535")
        return
    failure = _failure(place[1].strip("[]"), int(place[2]))
    if failure is not None:
        raise JoinError(
            f"{shown_place(named)}: no Ray answers there ({failure}); start it, name another, "
            f"{'or' if address or not variable else 'unset RAY_ADDRESS, or'} use --address local"
        )


def _failure(host: str, port: int) -> str | None:
    """Why nobody answers; None where somebody does."""
    began = time.monotonic()
    while True:
        left = _SILENT_SECONDS - (time.monotonic() - began)
        try:
            with socket.create_connection((host, port), timeout=max(left, 0.1)) as peer:
                return None if os.environ.get("RAY_USE_TLS", "0") == "1" else _says_no_grpc(peer)
        except TimeoutError:
            return f"no answer within {_SILENT_SECONDS:.0f} s"
        except OSError as error:
            if time.monotonic() - began > _REFUSED_SECONDS:
                return error.strerror or message(error)
        time.sleep(0.2)


def _says_no_grpc(peer: socket.socket) -> str | None:
    """What speaks against a Ray at the other end, which greets in gRPC: a head that hangs accepts, and says nothing."""
    peer.settimeout(_GREETING_SECONDS)
    heard = b""
    try:
        peer.sendall(_HELLO)
        while len(heard) < _FRAME and (more := peer.recv(_FRAME - len(heard))):
            heard += more
    except TimeoutError:
        return f"what listens there says nothing for {_GREETING_SECONDS:.0f} s"
    return None if heard[3:4] == bytes((_SETTINGS,)) else "what listens there is another program"


def _latest() -> str:
    """The address of the Ray that `auto` means; "" where Ray will say itself that there is none."""
    from ray._private import services

    try:
        return str(services.get_ray_address_from_environment("auto", None) or "")
    except ConnectionError:
        return ""


def _job_config() -> Any:
    """A job whose workers import deadbench from where this process has it, and else what is installed with them.

    Ray puts the driver's working folder and its script's first in the path of all workers, and has no option for it.
    """
    from ray.job_config import JobConfig

    class OwnPath(JobConfig):  # type: ignore[misc]
        _py_driver_sys_path: list[str]

        def _get_proto_job_config(self) -> Any:
            if self._py_driver_sys_path:  # else it has a working_dir, in which deadbench is
                self._py_driver_sys_path = _own_path()
            return super()._get_proto_job_config()

    return OwnPath()


def _own_path() -> list[str]:
    """The folder that holds deadbench, where a new interpreter would not find it: a clone that is not installed."""
    root = Path(str(sys.modules["deadbench"].__file__)).resolve().parents[1]
    script = os.path.dirname(os.path.realpath(sys.argv[0]))
    passing = {os.path.realpath(path) for path in ("", script, sys.path[0] if sys.path else "")}
    others = [path for path in sys.path if path and os.path.realpath(path) not in passing]
    found = PathFinder.find_spec("deadbench", others)
    there = found is not None and found.origin is not None and Path(found.origin).resolve().parents[1] == root
    return [] if there else [str(root)]
