"""Servers for the tests of remote reads: nginx laid out as a Hub, and one that misbehaves as it is told to."""

import contextlib
import gzip
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"

NGINX = """
daemon off; master_process off; pid {root}/nginx.pid; error_log {root}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off; default_type application/octet-stream;
  client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
  uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
  server {{
    listen 127.0.0.1:{port};
    add_header X-Repo-Commit {commit} always;
    add_header Accept-Ranges bytes;
    error_page 404 = @missing;
    location @missing {{ add_header X-Error-Code $missing_code always; return 404; }}
    location /api/ {{ set $missing_code RepoNotFound; root {root}/www; try_files $uri.json =404; }}
    location /gated/model/resolve/ {{ add_header X-Error-Code GatedRepo always; return 401; }}
    location / {{ set $missing_code EntryNotFound; root {root}/www; }}
  }}
}}
"""


@contextlib.contextmanager
def nginx_hub(root: Path, folder: Path) -> Iterator[str]:
    """The URL of an nginx that serves `folder` as the Hub repositories org/model and gated/model at main."""
    for repository in ("org/model", "gated/model"):
        resolve = root / "www" / repository / "resolve"
        resolve.mkdir(parents=True)
        shutil.copytree(folder, resolve / "main")
        (resolve / COMMIT).symlink_to("main")
        api = root / "www" / "api" / "models" / repository
        (api / "revision").mkdir(parents=True)
        names = sorted(p.name for p in folder.iterdir())
        info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        for place in (api / "revision" / "main.json", api / "revision" / f"{COMMIT}.json"):
            place.write_text(json.dumps(info))
        api.with_suffix(".json").write_text(json.dumps(info))
        tree = [{"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": COMMIT} for name in names]
        for revision in ("main", COMMIT):
            (api / "tree").mkdir(exist_ok=True)
            (api / "tree" / f"{revision}.json").write_text(json.dumps(tree))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (root / "nginx.conf").write_text(NGINX.format(root=root, port=port, commit=COMMIT))
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    process = subprocess.Popen([nginx, "-c", str(root / "nginx.conf"), "-p", str(root), "-e", str(root / "error.log")])
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        else:
            raise AssertionError((root / "error.log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=10)


class Refusing:
    """Between an S3 server and its clients: refuses what `refuses(environ)` is true of, after half of the body."""

    def __init__(self, application: object):
        self.application, self.refuses, self.refused = application, lambda environ: False, 0

    def __call__(self, environ: dict, start_response: object) -> object:
        if not self.refuses(environ):
            return self.application(environ, start_response)
        self.refused += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
        start_response("503 Service Unavailable", [("Content-Length", "0"), ("Connection", "close")])
        return [b""]


@contextlib.contextmanager
def s3_server() -> Iterator[Refusing]:
    """moto's S3 server, and the environment by which s3fs and boto3 find it."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    server._server.app = refusing = Refusing(server._server.app)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            environment.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # one of another server would be asked for this one's files
        yield refusing
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


_ETAG = {"ETag": '"e"'}


class Misbehaving(http.server.ThreadingHTTPServer):
    """Serves `folder`; `faults` maps a file name to how it is served, `requests` lists (name, Range) as they come."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.requests, self.sent = folder, [], 0
        self.faults: dict[str, list[str]] = {}

    def handle_error(self, request: object, client_address: object) -> None:
        """Whom a client leaves in the middle says nothing of it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        name, asked = self.path.partition("?")[0].strip("/"), self.headers.get("Range")
        server.requests.append((name, asked))
        queue = server.faults.get(name, [])
        fault = (queue.pop(0) if len(queue) > 1 else queue[0]) if queue else ""  # the last one stays
        path = server.folder / name
        if fault.isdigit():
            return self._status(int(fault))
        if fault.startswith("429"):
            return self._status(429, {"Retry-After": fault.partition(" ")[2]})
        if fault == "reset":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if not path.is_file():
            return self._status(404)
        size = path.stat().st_size
        data = path.read_bytes() if size < 2**30 else b""  # of larger files, mostly holes, ranges alone are served
        if fault == "huge":  # a terabyte that nobody must ask for
            return self._body(200, data, _ETAG, length=10**12)
        if fault == "gzip":
            packed = gzip.compress(data)
            return self._body(200, packed, _ETAG | {"Content-Encoding": "gzip"}, length=len(packed))
        if asked is None or fault in ("no ranges", "no length"):
            return self._body(200, data, _ETAG, length=None if fault == "no length" else len(data))
        start, end = asked.removeprefix("bytes=").split("-")
        start, end = int(start), min(int(end) + 1, size) if end else size
        if start >= size:
            return self._status(416, {"Content-Range": f"bytes */{size}"})
        shift = 8 if fault == "other range" else 0
        told = {"Content-Range": f"bytes {start + shift}-{end + shift - 1}/{size}"} | _ETAG
        cut = (end - start) // 2 if fault == "cut off" else end - start
        with path.open("rb") as file:
            file.seek(start)
            return self._body(206, file.read(cut), told, length=end - start)

    def _status(self, status: int, headers: dict[str, str] | None = None) -> None:
        self._body(status, b"", headers, length=0)

    def _body(self, status: int, data: bytes, headers: dict[str, str] | None = None, *, length: int | None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)
            self.server.sent += len(data)
        if length != len(data):
            self.close_connection = True


@contextlib.contextmanager
def misbehaving(folder: Path) -> Iterator[Misbehaving]:
    """A running server of `folder`."""
    server = Misbehaving(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
