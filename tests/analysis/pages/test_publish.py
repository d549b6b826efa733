import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from deadbench.analysis.leaderboard import leaderboard
from deadbench.analysis.pages.publish import publish
from deadbench.analysis.results import ResultsError, scan

EVIL = "<script>alert(1)</script>|x"


@pytest.fixture
def location(result_set, read):
    rows = [read(EVIL, depth=13.0), read("b", depth=2.0), read("c", status="failed", error="no memory")]
    return result_set(rows, {0: [2.0, 1e-13]})


@pytest.mark.slow
def test_what_is_published_is_a_result_set_with_a_card(location, tmp_path):
    out = tmp_path / "published"
    assert publish([location], str(out), title="Ours: all") == str(out)
    assert leaderboard(scan(str(out))).equals(leaderboard(scan(location)))
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "claims.csv", "leaderboard.csv", "reads", "report.html", "spectra",
    ]  # fmt: skip
    metadata = pq.read_schema(out / "reads" / "published.parquet")
    assert metadata.field("depth").metadata[b"unit"] == b"decades"
    _, front, card = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(front)
    assert (settings["pretty_name"], settings["license"]) == ("Ours: all", "cc-by-4.0")
    assert [config["config_name"] for config in settings["configs"]] == ["reads", "spectra"]
    assert "&lt;script&gt;" in card
    assert "<script>" not in card
    assert "2 ok, 1 failed" in card


def test_a_folder_that_is_there_is_left_alone(location, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ResultsError, match="is there already"):
        publish([location], str(tmp_path / "mine"), title="t")
    with pytest.raises(ResultsError, match="no such directory"):
        publish([location], str(tmp_path / "no" / "folder"), title="t")
    with pytest.raises(ResultsError, match="a folder or hf://datasets/OWNER/NAME"):
        publish([location], "s3://bucket/x", title="t")


def test_a_failure_leaves_nothing(location, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deadbench.analysis.pages.publish.write_report", full)
    with pytest.raises(OSError, match="No space left"):
        publish([location], str(tmp_path / "out"), title="t")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_the_hub_gets_one_commit_of_the_whole_folder(location, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repository, **options):
            calls.append((repository, options))

        def upload_folder(self, *, repo_id, repo_type, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            return type("Commit", (), {"commit_url": "https://hub/commit"})()

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert publish([location], "hf://datasets/me/dead", title="t", private=True) == "https://hub/commit"
    assert calls[0] == ("me/dead", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert "README.md" in calls[1][1]
    with pytest.raises(ResultsError, match="expected hf://datasets/OWNER/NAME"):
        publish([location], "hf://datasets/me/../x", title="t")


def test_the_hub_refusing_is_one_line(location):
    with pytest.raises(ResultsError, match="the Hub refused .*hf auth login"):  # the tests run offline
        publish([location], "hf://datasets/me/dead", title="t")


def test_no_word_of_a_row_is_live_on_the_card(result_set, read, tmp_path):
    evil = "![x](https://evil/p.png) [y](https://evil) <img src=x> www.evil.example"
    location = result_set([read(evil, input=evil, protocol=evil, device=evil, depth=1.0)])
    card = Path(publish([location], str(tmp_path / "published"), title=evil)) / "README.md"
    text = card.read_text(encoding="utf-8").split("---", 2)[2]  # behind the front matter, which is quoted
    assert "evil" in text
    for live in ("[x]", "![x](h", "[y](h", "<img", "https://evil", "www.evil"):
        assert not re.search(rf"(?<!\\){re.escape(live)}", text), live


def test_what_a_killed_publisher_left_is_swept_a_day_later(tmp_path):
    old, young, other = (tmp_path / f".out-{ending}" for ending in ("a" * 32, "b" * 32, "archives"))
    for folder in (old, young, other):
        (folder / "reads").mkdir(parents=True)
        (folder / "reads" / "1").touch()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    publish(["reference"], str(tmp_path / "out"), title="t")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([young.name, other.name, "out"])
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
