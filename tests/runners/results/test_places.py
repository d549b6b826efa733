"""Results to anywhere: the same promise on an object store, and on a remote file system that renames."""

import fsspec
import polars as pl
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from deadbench.analysis.results import ResultsError, collected, scan
from deadbench.runners.results.store import ResultStore, StoreError
from tests.conftest import save_tiny
from tests.runners.results.test_store import tables
from tests.suite.checkpoints.servers import s3_server


@pytest.fixture(scope="module")
def s3():
    boto3 = pytest.importorskip("boto3", reason="S3 tests need the dev extra")
    with s3_server() as server:
        server.client = boto3.client("s3")
        server.client.create_bucket(Bucket="results")
        server.keys = lambda prefix: [
            each["Key"] for each in server.client.list_objects_v2(Bucket="results", Prefix=prefix).get("Contents", [])
        ]
        yield server


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """What is refused is soon given up, and we are in no Ray job."""
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)


def identity(model):
    return (model, None, "trained", 0, "p", "torch", "f")


def test_an_s3_result_set_is_written_continued_and_read(s3):
    out = "s3://results/plain"
    ResultStore(out).write(tables())
    ResultStore(out).write(tables(model="n"))
    assert ResultStore(out).finished() == {identity("m"), identity("n")}
    assert sorted({key.rsplit("/", 1)[0] for key in s3.keys("plain/")}) == ["plain/reads", "plain/spectra"]
    assert sorted(collected(scan(out))["model"]) == ["m", "n"]


def test_two_runs_write_into_one_place_at_once(s3):
    """The second lists what the first wrote after both had opened the place."""
    first, second = ResultStore("s3://results/shared"), ResultStore("s3://results/shared")
    assert second.finished() == set()
    for number in range(3):
        first.write(tables(model=f"a{number}"))
        second.write(tables(model=f"b{number}"))
    # As another machine's: what s3fs remembers of the listing does not know it.
    copied = {"Bucket": "results", "Key": s3.keys("shared/reads/")[0]}
    s3.client.copy_object(Bucket="results", Key="shared/reads/other.parquet", CopySource=copied)
    assert len(first.finished()) == len(second.finished()) == 6
    assert collected(scan("s3://results/shared")).height == 7


@pytest.mark.parametrize("table", ["spectra", "reads"])
def test_an_upload_that_is_refused_half_way_leaves_nothing_visible(s3, table):
    out = f"s3://results/refused-{table}"
    store = ResultStore(out)
    store.write(tables())
    s3.refuses = lambda environ: environ["REQUEST_METHOD"] == "PUT" and f"/{table}/" in environ["PATH_INFO"]
    try:
        with pytest.raises(OSError, match=rf"refused-{table}/{table}/.*parquet: not stored .*nothing of it is there"):
            store.write(tables(model="n"))
    finally:
        s3.refuses = lambda environ: False
    assert s3.refused > 0
    assert ResultStore(out).finished() == {identity("m")}
    assert len(s3.keys(f"refused-{table}/{table}/")) == 1
    assert collected(scan(out))["model"].to_list() == ["m"]
    store.write(tables(model="n"))
    assert ResultStore(out).finished() == {identity("m"), identity("n")}


@pytest.mark.ray
def test_every_command_takes_an_s3_uri(s3, ray_session, deadbench, tmp_path):
    save_tiny(tmp_path / "step1")
    out, arguments = "s3://results/runs/a", ["--input", "tokens:random", "--tokens", "64"]
    code, printed, err = deadbench("run", tmp_path / "step1", *arguments, "--out", out)
    assert code == 0, err
    assert "3 ok, 0 failed, 0 already there; results in s3://results/runs/a" in printed
    assert "0 ok, 0 failed, 3 already there" in deadbench("run", tmp_path / "step1", *arguments, "--out", out)[1]
    assert "step1" in deadbench("leaderboard", out, "--format", "csv")[1]
    assert deadbench("families", out, "--json")[0] == 0
    assert deadbench("compare", out, out)[0] == 0
    code, _, err = deadbench("report", out, "-o", tmp_path / "report.html")
    assert code == 0, err
    assert "step1" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_bucket_that_is_not_there_is_not_made(s3):
    with pytest.raises(StoreError, match="--out s3://typo/x: cannot be written .*check bucket, path and credentials"):
        ResultStore("s3://typo/x")
    assert [bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]] == ["results"]
    with pytest.raises(ResultsError, match="s3://typo/x: "):
        scan("s3://typo/x")


class Renaming(MemoryFileSystem):
    """As sftp is: what is being written can be seen, and a file can be renamed."""

    protocol = "renaming"
    renamed: list = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("renaming://"))

    def mv(self, path1, path2, **kwargs):
        self.renamed.append((path1, path2))
        super().mv(path1, path2)


@pytest.fixture(params=["memory", "renaming"])
def remote(request):
    fsspec.register_implementation("renaming", Renaming, clobber=True)
    yield f"{request.param}://deadbench-store"
    fsspec.filesystem("memory").rm("/deadbench-store", recursive=True)


def test_only_whole_files_are_where_readers_look(remote):
    ResultStore(remote).write(tables())
    assert ResultStore(remote).finished() == {identity("m")}
    assert collected(scan(remote))["model"].to_list() == ["m"]
    found = fsspec.filesystem("memory").find("/deadbench-store")
    assert [path.split("/")[2] for path in found] == ["reads", "spectra"]
    moved = [after.split("/")[-2] for before, after in Renaming.renamed if "/_tmp/" in before]
    assert moved == (["spectra", "reads"] if remote.startswith("renaming") else [])
    Renaming.renamed.clear()


@pytest.mark.parametrize(("location", "extra"), [("gs://bucket/x", "gs"), ("abfs://box/x", "azure")])
def test_a_missing_library_is_named_with_its_extra(location, extra, deadbench):
    with pytest.raises(StoreError, match=rf"--out {location}: .*pip install 'deadbench\[{extra}\]'"):
        ResultStore(location)
    code, _, err = deadbench("leaderboard", location)
    assert code == 2
    assert f"pip install 'deadbench[{extra}]'" in err


def test_no_secret_of_a_uri_is_printed(tmp_path):
    with pytest.raises(StoreError) as caught:
        ResultStore("ftp://me:hunter2@127.0.0.1:1/x")
    assert "ftp://127.0.0.1:1/x" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ResultsError) as caught:
        scan("ftp://me:hunter2@127.0.0.1:1/x")
    assert "hunter2" not in str(caught.value)


def test_a_relative_place_is_refused_inside_a_ray_job(deadbench, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    (tmp_path / "s.txt").write_text("org/a\n")
    for command in (["run", "gpt2"], ["census", tmp_path / "s.txt"]):
        code, _, err = deadbench(*command, "--out", "results")
        assert (code, err.count("\n")) == (2, 1)
        assert "--out results: a Ray job runs in a folder that Ray deletes; give an absolute path or a URI" in err


def test_plain_polars_opens_what_was_written_locally(tmp_path):
    ResultStore(f"file://{tmp_path}/out").write(tables())
    assert pl.read_parquet(tmp_path / "out" / "reads" / "*.parquet")["model"].to_list() == ["m"]
