"""A server of any number of checkpoints, in a process of its own: `python many_checkpoints.py FOLDER`.

Each folder below FOLDER is a checkpoint; `/KIND-NUMBER/FILE` serves FOLDER/KIND/FILE, and the same is laid out as a Hub
(`/api/models/org/KIND-NUMBER/revision/main`, `/org/KIND-NUMBER/resolve/main/FILE`). With R in the
environment variable LIMIT, more than R requests in a second are answered by 429 and `Retry-After: 1`.
"""

import collections
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

REPOSITORY = r"{kind:[a-z0-9]+}-{number:\d+}"


def sparse_checkpoint(folder: Path, config: dict, scale_name: str, shift_name: str | None, blocks: int, seed: int = 0):
    """A checkpoint whose weights are a hole in a file: a real header, and a real final norm at the end."""
    D = config.get("hidden_size") or config["n_embd"]
    rng = np.random.default_rng(seed)
    header, offset = {}, 0
    shapes = {"attn.qkv.weight": [3 * D, D], "attn.qkv.bias": [3 * D], "attn.out.weight": [D, D], "attn.out.bias": [D],
              "mlp.up.weight": [4 * D, D], "mlp.up.bias": [4 * D], "mlp.down.weight": [D, 4 * D], "mlp.down.bias": [D],
              "norm_1.weight": [D], "norm_1.bias": [D], "norm_2.weight": [D], "norm_2.bias": [D]}  # fmt: skip
    tensors = {f"blocks.{block}.{name}": shape for block in range(blocks) for name, shape in shapes.items()}
    for name, shape in (tensors | {scale_name: [D]} | ({shift_name: [D]} if shift_name else {})).items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
        for name in filter(None, (scale_name, shift_name)):
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(rng.uniform(0.5, 1.5, D).astype("<f4").tobytes())
    return folder


@contextlib.contextmanager
def serving(folder: Path, limit: int = 0) -> Iterator[str]:
    """The URL of a running server."""
    command = [sys.executable, __file__, str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"LIMIT": str(limit)}
    ) as process:
        try:
            port = int(process.stdout.readline())
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _serve(root: Path, limit: int) -> None:
    from aiohttp import web

    recent: collections.deque[float] = collections.deque()

    @web.middleware
    async def limited(request, handler):
        now = time.monotonic()
        while recent and recent[0] < now - 1:
            recent.popleft()
        if limit and len(recent) >= limit:
            return web.Response(status=429, headers={"Retry-After": "1"})
        recent.append(now)
        return await handler(request)

    async def listing(request):
        folder = root / request.match_info["kind"]
        if not folder.is_dir():
            return web.Response(status=404, headers={"X-Error-Code": "RepoNotFound"})
        names = [{"rfilename": path.name} for path in folder.iterdir()]
        return web.json_response({"sha": "0" * 40, "siblings": names})

    async def file(request):
        if request.match_info["kind"] == "gated":  # as on the Hub: all is listed, nothing is given
            return web.Response(status=401, headers={"X-Error-Code": "GatedRepo"})
        path = root / request.match_info["kind"] / request.match_info["name"]
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    application = web.Application(middlewares=[limited])
    application.router.add_get(f"/api/models/org/{REPOSITORY}/revision/main", listing)
    application.router.add_get(f"/org/{REPOSITORY}/resolve/main/{{name}}", file)
    application.router.add_get(f"/{REPOSITORY}/{{name}}", file)

    def announce(*_):
        pass

    web.run_app(application, host="127.0.0.1", port=_free_port(), print=announce, access_log=None)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print(port, flush=True)
    return port


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(os.environ.get("LIMIT", "0")))
