"""What trackers hold afterwards, by their own readers: every value once, at its step and at its tokens."""

import glob
import json
import struct
from pathlib import Path

import pytest

from deadbench.analysis.results import scan
from deadbench.analysis.trackers.curves import series
from deadbench.runners.cli.console import UserError
from deadbench.runners.cli.log import log

pytestmark = pytest.mark.slow


@pytest.fixture
def results(result_set, read):
    rows = [
        read("run/0", revision=f"step{s}", checkpoint_step=s, depth=14 - s / 10, tokens_seen=512 * s) for s in (10, 20)
    ]
    return result_set(rows)


@pytest.fixture
def later(result_set, read, results):
    """The same result set, with a checkpoint that came afterwards."""
    return lambda: result_set(
        [
            read("run/0", revision=f"step{s}", checkpoint_step=s, depth=14 - s / 10, tokens_seen=512 * s)
            for s in (10, 20, 30)
        ]
    )


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = glob.glob(f"{folder}/*")
    read = EventAccumulator(run, size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(e.step, round(e.value, 5)) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard(tmp_path, results, later, capsys):
    place = f"tensorboard:{tmp_path / 'runs'}"
    log([results], [place])
    log([results], [place])
    assert "0 new values (all others were there)" in capsys.readouterr().out.splitlines()[-1]
    log([later()], [place])
    assert scalars(tmp_path / "runs") == {
        "depth": [(10, 13.0), (20, 12.0), (30, 11.0)],
        "depth_by_tokens": [(5120, 13.0), (10240, 12.0), (15360, 11.0)],
    }


def test_the_folder_of_a_series_stays_below_the_place_named(tmp_path, result_set, read):
    from deadbench.analysis.trackers.tensorboard import run_name

    names = [run_name(name) for name in ("../../etc/x trained", "..", "a/b", "a_b", "plain trained", "x" * 300)]
    assert names[4] == "plain trained"
    assert len(set(names)) == 6
    assert not [name for name in names if "/" in name or name in ("", ".", "..") or len(name) > 120]


@pytest.mark.subprocess  # `uname`
@pytest.mark.parametrize("store", ["sqlite:///{}/m.db", "file://{}/mlruns"])
@pytest.mark.filterwarnings("ignore")  # of the databases' libraries
def test_mlflow(tmp_path, results, later, store, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = store.format(tmp_path)
    log([results], [f"mlflow:{uri}"])
    log([later()], [f"mlflow:{uri}"])
    log([results], [f"mlflow:{uri}"])
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("deadbench").experiment_id])
    assert run.data.tags["deadbench.model"] == "run/0"
    assert run.info.status == "FINISHED"
    found = {
        n: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, n)) for n in run.data.metrics
    }
    assert found == {
        "depth": [(10, 13.0), (20, 12.0), (30, 11.0)],
        "depth_by_tokens": [(5120, 13.0), (10240, 12.0), (15360, 11.0)],
    }


def history(folder):
    """The rows that an offline run of W&B recorded: its log has the framing of LevelDB's, of W&B's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(glob.glob(f"{folder}/wandb/offline-run-*/run-*.wandb")):
        data, offset = Path(path).read_bytes()[7:], 0
        while offset + 7 <= len(data):
            (size,) = struct.unpack("<H", data[offset + 4 : offset + 6])
            record = Record.FromString(data[offset + 7 : offset + 7 + size])
            offset += 7 + size
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return rows


@pytest.mark.subprocess
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path, results, later, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for each in (results, results, later()):
        log([each], ["wandb:team/project"])
    assert history(tmp_path) == [
        {"checkpoint_step": 10, "tokens_seen": 5120, "depth": 13.0},
        {"checkpoint_step": 20, "tokens_seen": 10240, "depth": 12.0},
        {"checkpoint_step": 30, "tokens_seen": 15360, "depth": 11.0},
    ]


def test_a_tracker_that_is_not_installed_names_the_line_that_installs_it(results, monkeypatch):
    import builtins
    import sys

    monkeypatch.delitem(sys.modules, "deadbench.analysis.trackers.mlflow", raising=False)
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "mlflow":
            raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"--to mlflow: needs mlflow; pip install 'deadbench\[mlflow\]'"):
        log([results], ["mlflow:sqlite:///x.db"])


@pytest.mark.parametrize("target", ["tensorboard", "tensorboard:", "excel:x", "wandb:"])
def test_another_target_is_refused_with_those_that_there_are(results, target):
    with pytest.raises(UserError, match="give tensorboard:DIR, wandb:PROJECT, mlflow:URI"):
        log([results], [target])


def test_one_series_a_model_and_read(results):
    assert len(series(scan(results))) == 1
