"""Remote checkpoints: the same answer as from a folder, few bytes, and one line when the other side misbehaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deadbench.suite.checkpoints import http_folder, http_requests
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.headers import read_headers
from deadbench.suite.checkpoints.opening import list_revisions
from deadbench.suite.errors import CheckpointError
from deadbench.suite.reads.classify import classify
from tests.conftest import ROOT, TINY_NEOX, save_tiny
from tests.suite.checkpoints.servers import COMMIT, misbehaving, nginx_hub, s3_server

HAS_NGINX = shutil.which("nginx") or Path("/usr/sbin/nginx").exists()
needs_nginx = pytest.mark.skipif(not HAS_NGINX, reason="nginx is not installed: apt install nginx-light")
WIDE = TINY_NEOX | {"hidden_size": 64, "vocab_size": 4000, "intermediate_size": 256}  # weights that outweigh a header


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("remote") / "whole", WIDE)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, whole):
    import transformers

    folder = tmp_path_factory.mktemp("remote") / "sharded"
    transformers.AutoModel.from_pretrained(whole).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module", params=["whole", "sharded"])
def hub(request, tmp_path_factory):
    if not HAS_NGINX:
        pytest.skip("nginx is not installed: apt install nginx-light")
    folder = request.getfixturevalue(request.param)
    with nginx_hub(tmp_path_factory.mktemp("hub"), folder) as url:
        yield url, folder


@pytest.fixture
def online(monkeypatch):
    """The Hub's library as in a fresh process that may reach HF_ENDPOINT."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(http_requests, "FIRST_WAIT_SECONDS", 0.01)
    return lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.mark.subprocess
def test_nginx_reads_the_same_as_a_folder(hub, online):
    url, folder = hub
    online(url)
    local, v_local = classify(str(folder))
    for source in ("org/model", "hf://org/model@main", f"{url}/org/model/resolve/main"):
        remote, v_remote = classify(source)
        assert remote["error"] is None
        assert np.array_equal(v_local, v_remote)
        assert remote["final_norm_tensor"] == local["final_norm_tensor"]
        assert (
            remote["bytes_total"] == local["bytes_total"] == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        )
        assert remote["bytes_read"] < remote["bytes_total"] / 4
    assert classify("org/model")[0]["revision"] == "main"
    assert Checkpoint("org/model").fingerprint() == COMMIT


@pytest.mark.subprocess
def test_the_command_line_reads_a_hub_on_loopback(hub, tmp_path):
    """In a process of its own, so that HF_ENDPOINT is read as users set it."""
    url, folder = hub
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    code = (
        "from deadbench.suite.checkpoints.checkpoint import Checkpoint\n"
        "with Checkpoint('org/model').local_copy() as folder: print(*sorted(p.name for p in folder.iterdir()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {p.name for p in folder.iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", "deadbench", "classify", "org/model", "gated/model", "org/none", "--json"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert '"family": "layernorm"' in done.stdout
    assert "gated or private (401): accept its licence on" in done.stdout
    assert "org/none: no such repository on the Hub" in done.stdout


@pytest.mark.subprocess
@needs_nginx
def test_gated_missing_and_offline_say_what_to_do(whole, online, tmp_path, monkeypatch):
    with nginx_hub(tmp_path, whole) as url:
        online(url)
        for source, message in (
            (
                "gated/model",
                rf"gated/model: .*gated or private \(401\): accept its licence on {url}/gated/model and set",
            ),
            ("org/none", "org/none: no such repository on the Hub"),
            (f"{url}/org/none", "no config.json"),
        ):
            with pytest.raises(CheckpointError, match=message) as caught:
                Checkpoint(source).config()
            assert "\n" not in str(caught.value)
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        with pytest.raises(CheckpointError, match="check that HF_TOKEN may read it"):
            Checkpoint("gated/model").config()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set and the file is not in the cache"):
            Checkpoint("org/model").config()


def test_offline_reads_the_cache(whole, tmp_path, monkeypatch):
    """As on a node whose cache was filled before: links into blobs, no listing from the Hub."""
    repository = tmp_path / "models--org--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(whole.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result, v = classify("org/cached")
    assert result["error"] is None
    assert np.array_equal(v, classify(str(whole))[1])


@pytest.fixture
def server(sharded, tmp_path, online):
    folder = tmp_path / "served"
    shutil.copytree(sharded, folder)
    with misbehaving(folder) as running:
        yield running


def shards(server):
    return sorted(p.name for p in server.folder.glob("*.safetensors"))


@pytest.mark.parametrize("faults", [["503", ""], ["reset", "reset", ""], ["429 0", "429 0", ""], ["cut off", ""]])
def test_what_passes_is_tried_again(server, faults):
    expected = classify(server.url)[0]
    server.faults[shards(server)[0]] = faults
    got = classify(server.url)[0]
    assert got["error"] is None
    assert got["final_norm_tensor"] == expected["final_norm_tensor"]


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        ("401", r"access denied \(401\)", 1),
        ("403", r"access denied \(403\)", 1),
        ("400", "HTTP 400 Bad Request", 1),
        ("500", r"the server fails \(HTTP 500\); try again later", 4),
        ("429 0", r"the server limits requests \(429\); try again later", 4),
        ("429 900", r"the server limits requests \(429\); try again in 900 s", 1),
        ("cut off", "the answer is cut off .* in 4 attempts", 4),
        ("reset", "the answer is cut off .* in 4 attempts", 4),
        ("other range", "answers with another range", 1),
        ("huge", "ignores Range requests, so 1,000,000,000,000 bytes would be downloaded", 1),
        ("gzip", r"the server compresses its answers \(gzip\), though it is asked for bytes as they are", 1),
        ("no length", "ignores Range requests and tells no length", 1),
    ],
)
def test_what_does_not_pass_is_one_line(server, fault, message, requests, monkeypatch):
    monkeypatch.setattr(http_folder, "_SMALL_BYTES", 10_000)
    server.faults["config.json"] = [fault]
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(server.url).config()
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)
    assert [name for name, _ in server.requests].count("config.json") == requests


def test_a_missing_shard_is_named(server):
    (server.folder / shards(server)[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"names {shards(server)[1][:8]}.*, which is missing"):
        read_headers(Checkpoint(server.url))


def test_a_server_without_ranges_is_read_while_files_are_small_and_never_far(server, monkeypatch):
    for path in server.folder.iterdir():
        server.faults[path.name] = ["no ranges"]
    assert classify(server.url)[0]["error"] is None
    monkeypatch.setattr(http_folder, "_SMALL_BYTES", 10_000)
    server.sent = 0
    error = classify(server.url)[0]["error"]
    assert "the server ignores Range requests" in error
    assert "download it and name the folder" in error


def test_nobody_there_is_one_line_at_once(online):
    with pytest.raises(CheckpointError, match="cannot be reached .*check the address") as caught:
        Checkpoint("http://127.0.0.1:9/model").config()
    assert "attempts" not in str(caught.value)


def test_without_a_network_the_hubs_cache_is_read_and_said(online, tmp_path, monkeypatch):
    from huggingface_hub import constants

    online("http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    missing = classify("team/model")[0]
    assert "cannot be reached" in missing["error"]
    cached = tmp_path / "models--team--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    snapshot = save_tiny(cached / "snapshots" / ("a" * 40))
    found, direction_D = classify("team/model")
    known, known_D = classify(str(snapshot))
    assert (found["error"], found["revision"]) == (None, "main")
    assert {name: found[name] for name in ("family", "scale_harmonic")} == {
        name: known[name] for name in ("family", "scale_harmonic")
    }
    assert direction_D.tolist() == known_D.tolist()
    assert found["evidence"] == [*known["evidence"], f"the Hub cannot be reached: read from its cache, {snapshot}"]
    with Checkpoint("team/model").local_copy() as copy:
        assert copy == snapshot
    assert "cannot be reached" in classify("team/model@other")[0]["error"]


@pytest.mark.slow
def test_whole_files_come_complete_or_not_at_all(server, tmp_path):
    checkpoint = Checkpoint(server.url)
    with checkpoint.local_copy() as copy:
        for path in copy.iterdir():
            assert path.read_bytes() == (server.folder / path.name).read_bytes()
        assert {p.name for p in copy.iterdir()} == {"config.json", "model.safetensors.index.json", *shards(server)}
    with checkpoint.local_copy(weights=False) as copy:
        assert {p.name for p in copy.iterdir()} == {"config.json", "model.safetensors.index.json"}
    server.faults["config.json"] = ["503"]
    with pytest.raises(CheckpointError, match="the server fails"), Checkpoint(server.url).local_copy():
        pass


@pytest.fixture(scope="module")
def bucket(whole, sharded):
    """moto's S3 server with a checkpoint in it, and the environment that s3fs reads."""
    boto3 = pytest.importorskip("boto3", reason="S3 tests need the dev extra")
    with s3_server():
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="models")
        for folder in (whole, sharded):
            for path in folder.iterdir():
                s3.upload_file(str(path), "models", f"{folder.name}/{path.name}")
        yield "s3://models"


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_s3_reads_the_same_as_a_folder(bucket, layout, request):
    folder = request.getfixturevalue(layout)
    local, v_local = classify(str(folder))
    remote, v_remote = classify(f"{bucket}/{layout}")
    assert remote["error"] is None
    assert np.array_equal(v_local, v_remote)
    assert remote["bytes_read"] == local["bytes_read"] < remote["bytes_total"]
    with Checkpoint(f"{bucket}/{layout}").local_copy() as copy:
        assert (copy / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_s3_lists_a_series_and_says_what_is_missing(bucket):
    assert list_revisions(bucket) == ["sharded", "whole"]
    assert Checkpoint(bucket, "whole").config()["model_type"] == "gpt_neox"
    for source in (f"{bucket}/none", "s3://no-such-bucket/model"):
        with pytest.raises(CheckpointError, match="no such file or directory"):
            Checkpoint(source).config()


def test_an_index_that_names_a_million_shards_that_are_not_there(tmp_path):
    shards = {f"t{n}": f"s{n}.safetensors" for n in range(10_000)}
    (tmp_path / "config.json").write_text(json.dumps(TINY_NEOX))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with misbehaving(tmp_path) as server:
        told = classify(server.url)[0]
        assert "names s0.safetensors, which is missing" in told["error"]
        assert sum(name.startswith("s") for name, _ in server.requests) <= 40  # of ten thousand
