"""The command line as a user meets it: exit codes, one line for an error, one document for --json."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from deadbench.runners.cli import main as cli
from deadbench.runners.driver import driver
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.jobs.opening import all_unfit
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, TWINS, save_tiny, write_checkpoint

# Every option of every command, as --help lists them: what scripts out there rely on.
FLAGS = {
    "classify": "--save-direction --verify --module --config --model-type --width --allow-undetermined --json --debug",
    "export": "-o --out --config --model-type --debug",
    "plan": "--model --assume --suite --registry --reads --address --autoscale --out --resume --fresh "
    "--engine --tensor-parallel --replicas --tokens --input --taps --seed --dtype --config --model-type "
    "--accumulator-gb --json --debug",
    "doctor": "--address --json --debug",
    "attach": "--run --json --debug",
    "run": "--model --suite --registry --reads --address --out --resume --fresh --engine --tensor-parallel --replicas "
    "--tokens --input --taps --seed --dtype --config --model-type --accumulator-gb --timeout --max-retries "
    "--checkpoint-interval --autoscale --log-format --json --debug",
    "census": "--out --address --resume --fresh --threads --config --model-type --json --debug",
    "leaderboard": "--format --sort --family --with --json --debug",
    "families": "--format --json --debug",
    "dead": "--model --verdict --all --format --json --debug",
    "compare": "--gate --all --junit --plot --format --json --debug",
    "trend": "--model --metric --plot --bisect --gate --registry --suite --address --format --json --debug",
    "watch": "--out --reads --gate --baseline --on-break --follow --once --interval --until-idle --report --address "
    "--engine --tokens --input --taps --seed --dtype --config --model-type --json --debug",
    "report": "-o --out --plots --plot-format --debug",
    "init": "--registry --debug",
    "log": "--to --model --json --debug",
    "reproduce": "--read --revision --address --out --format --json --debug",
    "glossary": "--json --debug",
    "publish": "--to --title --license --private --debug",
}
COMMANDS = tuple(FLAGS)
TWIN = str(TWINS / "layernorm" / "step4096")


@pytest.fixture(scope="module")
def results(ray_session, tmp_path_factory):
    """A small result set: one twin checkpoint, one model without a final norm, one that failed."""
    base = tmp_path_factory.mktemp("cli")
    save_tiny(base / "tiny")
    save_tiny(base / "broken")
    (base / "broken" / "model.safetensors").write_bytes(b"broken")
    code = run_in_process(TWIN, base / "tiny", base / "broken", "--input", "tokens:random", "--out", base / "out")
    assert code == 1
    return base / "out"


def run_in_process(*arguments):
    argv = sys.argv
    sys.argv = ["deadbench", "run", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as done:
            cli.main()
    finally:
        sys.argv = argv
    return done.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(deadbench, command):
    code, out, _ = deadbench(command, "--help")
    assert code == 0
    assert f"Example: deadbench {command}" in " ".join(out.split())


def test_the_root_lists_the_commands(deadbench):
    for arguments in ([], ["--help"]):
        code, out, _ = deadbench(*arguments)
        assert code == 0
        assert all(command in out for command in COMMANDS)
    assert deadbench("--version")[1].strip() == "0.1.0"


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_the_pages_name_every_command(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for command in COMMANDS:
        assert re.search(rf"(deadbench |`){command}\b", text), f"{page} does not name {command}"


def test_the_flags_are_frozen():
    from typer.main import get_command

    found = {
        name: " ".join(
            flag for option in command.params for flag in (*option.opts, *option.secondary_opts) if "-" in flag[0]
        )
        for name, command in get_command(cli.app).commands.items()
    }
    assert found == FLAGS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["run", "--nonsense"], "No such option: --nonsense"),
        (["run", "--tokens", "many"], "Invalid value for '--tokens'"),
        (["run", "--tokens", "0"], "greater than or equal to 1"),
        (["run", "--engine", "vlm"], "'vlm' cannot be run by this version; choose auto, torch, vllm, streaming"),
        (["run", "--tensor-parallel", "2"], "2 devices do not divide its 9 attention heads; choose one of 1, 3, 9"),
        (["run", "--dtype", "int8"], "--dtype 'int8' is unknown; choose auto, float32"),
        (["run", "--taps", "some"], "--taps 'some' is unknown; choose all, none or every:K, such as every:4"),
        (["run", "--suite", "none"], "suite 'none' is unknown; choose quick"),
        (["run", "--reads", "guess"], "read 'guess' is unknown"),
        (["run", "--registry", "none.yaml"], "none.yaml: no such registry file"),
        (["run", "/no/such/model"], "no such directory"),
        (["run", "gpt2", "--input", "tokens:none.npy"], "no such file"),
        (["run", "gpt2", "--input", "tokens:x.npy", "--tokens", "5"], "leave one out"),
        (["run", "gpt2", "--out", "/proc/nope"], "cannot be written"),
        (["leaderboard", "/no/such/results"], "/no/such/results"),
        (["leaderboard", "RESULTS", "--format", "xml"], "choose table, json, csv, md, html, latex"),
        (["leaderboard", "RESULTS", "--sort", "colour"], "colour"),
        (["leaderboard", "RESULTS", "--family", "batchnorm"], "batchnorm"),
        (["families", "/no/such/results"], "/no/such/results"),
        (["report", "RESULTS", "-o", "/no/such/folder/r.html"], "no such directory"),
        (["compare", "RESULTS", "/no/such/results"], "/no/such/results"),
        (["compare", "RESULTS", "RESULTS@step9"], "no checkpoint 'step9'"),
        (["compare", "RESULTS", "RESULTS", "--gate", "none.yaml"], "none.yaml: no such gate file"),
        (["compare", "RESULTS", "RESULTS", "--junit", "x.xml"], "give one with --gate"),
        (["trend", "RESULTS", "--model", "none"], "--model 'none' has no finished read here"),
        (["trend", "RESULTS", "--model", TWIN, "--metric", "colour"], "'colour' is no numeric column"),
        (["trend", "RESULTS", "--model", TWIN, "--plot", "x.gif"], "x.gif: a plot is written as svg, png or pdf"),
        (["trend", "RESULTS", "--model", "none", "--bisect", "depth"], "is not in"),
        (["trend", "RESULTS", "--model", "gpt2", "--bisect", "depth"], "has no series of checkpoints"),
        (["trend", "RESULTS", "--model", "gpt2", "--bisect", "colour"], "the default gate has no rule for it"),
        (["report", "RESULTS", "--plot-format", "gif"], "choose svg, png"),
        (["publish", "RESULTS", "--to", "."], "is there already"),
        (["publish", "RESULTS", "--to", "hf://datasets/x"], "expected hf://datasets/OWNER/NAME"),
        (["attach", "/no/such/results"], "/no/such/results: no such folder; give a run's --out, or a Ray as http://"),
        (["attach", "127.0.0.1:1"], "no Ray answers there"),
        (["classify"], "Missing argument"),
        (["classify", TWIN, "--save-direction", "/no/such/v.safetensors"], "no such directory"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(deadbench, results, arguments, message):
    code, out, err = deadbench(*(argument.replace("RESULTS", str(results)) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("deadbench: ")
    assert err.count("\n") == 1


def test_a_broken_registry_names_the_entry(deadbench, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "protocols: {standard: {}}\nsuites: {}\nmodels: [{id: x, source: a/b, engine: vlm}]\n"
    )
    code, _, err = deadbench("run", "x", "--registry", tmp_path / "r.yaml")
    assert (code, err) == (
        2,
        f"deadbench: {tmp_path}/r.yaml: x: engine 'vlm' is unknown; choose 'auto', 'torch', 'streaming' or 'vllm'\n",
    )


def test_classify_prints_one_document(deadbench, minilm, tmp_path):
    code, out, _ = deadbench("classify", minilm, "/no/such", TWIN, "--json")
    sources = json.loads(out)["sources"]
    assert code == 1, "one source could not be read"
    assert [s["family"] for s in sources] == ["layernorm", None, "layernorm"]
    assert "no such directory" in sources[1]["error"]
    contract = (
        "source revision family final_norm final_norm_tensor placement scale has_bias eps hidden_size num_zero_scales "
        "scale_harmonic predicted_dim depth_predicted evidence bytes_read bytes_total seconds error"
    )
    assert all(set(contract.split()) <= set(s) for s in sources)


def test_classify_for_people(deadbench, minilm):
    code, out, _ = deadbench("classify", minilm)
    assert code == 0
    assert "layernorm" in out
    assert "encoder.layer.5.output" in out
    assert "3 zero scales: the depth is of learned directions, not of a kernel" in " ".join(out.split())


def test_what_stays_undetermined_is_exit_1_unless_it_is_allowed(deadbench, tmp_path):
    unknown = write_checkpoint(tmp_path / "unknown", {"model_type": "unheard-of", "hidden_size": 8}, {"w": np.ones(8)})
    code, out, err = deadbench("classify", unknown, TWIN, "--json")
    assert [source["family"] for source in json.loads(out)["sources"]] == ["undetermined", "layernorm"]
    assert code == 1
    assert err == f"deadbench: undetermined: {unknown}; --allow-undetermined exits with 0\n"
    assert deadbench("classify", unknown, TWIN, "--allow-undetermined")[::2] == (0, "")
    assert deadbench("classify", unknown, "/no/such", "--allow-undetermined")[0] == 1


def test_directions_are_saved_with_their_facts(deadbench, tmp_path):
    file = tmp_path / "v.safetensors"
    code, _, _ = deadbench("classify", TWIN, "--save-direction", file)
    assert code == 0
    saved = load_file(file)[TWIN]
    gamma = load_file(f"{TWIN}/model.safetensors")["gpt_neox.final_layer_norm.weight"].astype(float)
    assert saved.dtype == np.float64
    assert saved == pytest.approx((1 / gamma) / np.linalg.norm(1 / gamma), rel=1e-12)
    with safe_open(file, "np") as opened:
        assert opened.metadata()[f"{TWIN}.family"] == "layernorm"
    code, _, err = deadbench("classify", "/no/such", "--save-direction", tmp_path / "w.safetensors")
    assert code == 2
    assert "nothing written" in err
    assert os.listdir(tmp_path) == ["v.safetensors"]


def test_run_reports_failures_and_keeps_the_rest(results):
    frame = pl.scan_parquet(results / "reads" / "*.parquet").collect()
    assert frame.height == 9
    failed = frame.filter(pl.col("status") == "failed")
    assert set(failed["read"]) == {"parameters", "trained"}
    assert all("broken" in model for model in failed["model"])


def test_an_input_that_does_not_fit_is_told_before_anything_starts(deadbench, tmp_path, monkeypatch, capsys):
    """Where some reads need no input they run, and the others are failed rows."""
    source, out = save_tiny(tmp_path / "m"), tmp_path / "out"
    np.save(tmp_path / "ids.npy", np.full((4, 8), 10**6))
    capsys.readouterr()  # of the saving
    monkeypatch.setattr("deadbench.runners.driver.driver.execute", lambda *_: pytest.fail("it started"))
    for spec, message in (
        ("text", "needs the model's tokenizer"),
        (f"tokens:{tmp_path / 'ids.npy'}", "token ids 1000000 to 1000000, the model knows 0 to"),
        ("image", "takes text"),
    ):
        code, _, err = deadbench("run", source, "--reads", "random,trained", "--input", spec, "--out", out)
        assert (code, err.count("\n"), err.startswith(f"deadbench: {source}: ")) == (2, 1, True), err
        assert message in err
    jobs = build_jobs(
        load_registry(ROOT / "models.yaml"), ROOT / "models.yaml", [str(source)], None, None, Overrides(input="text")
    )
    errors = {read.read: read.error for job in jobs for read in job.reads}
    assert errors["parameters"] is None
    assert "needs the model's tokenizer" in errors["trained"]
    assert all_unfit(jobs) is None


def test_a_second_run_starts_nothing(deadbench, results, monkeypatch):
    def forbidden(*args):
        raise AssertionError("Ray was started though every read is finished")

    monkeypatch.setattr(driver, "connect", forbidden)
    arguments = ["run", TWIN, results.parent / "tiny", "--input", "tokens:random", "--out", results]
    code, out, _ = deadbench(*arguments, "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["ok"], document["failed"], document["skipped"]) == (0, 0, 6)
    code, out, err = deadbench(*arguments, "--fresh")
    assert "Ray was started" in err, "--fresh reads again"


@pytest.mark.parametrize("command", ["leaderboard", "families"])
def test_every_format(deadbench, results, command):
    rendered = {}
    for format in ("table", "json", "csv", "md", "html"):
        code, rendered[format], _ = deadbench(command, results, "--format", format)
        assert code == 0
    rows = json.loads(rendered["json"])[command]
    assert json.loads(deadbench(command, results, "--json")[1])[command] == rows
    assert len(list(csv.DictReader(io.StringIO(rendered["csv"])))) == len(rows)
    assert rendered["md"].splitlines()[1].startswith("|")
    assert rendered["html"].lstrip().lower().startswith("<!doctype html>")
    first = rows[0]["model" if command == "leaderboard" else "claim"]
    assert all(first in text.replace("\\", "") for name, text in rendered.items() if name != "table")


def test_the_report_is_written_whole(deadbench, results, tmp_path):
    code, _, _ = deadbench("report", results, "-o", tmp_path / "r.html")
    assert code == 0
    assert "</html>" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["r.html"]


def test_a_newer_result_set_is_refused_everywhere(deadbench, results, tmp_path):
    import shutil

    import pyarrow.parquet as pq

    newer = tmp_path / "newer"
    shutil.copytree(results, newer)
    path = next((newer / "reads").iterdir())
    pq.write_table(pq.read_table(path).replace_schema_metadata({"schema_version": "99"}), path)
    for arguments in (["run", TWIN, "--out", newer], ["leaderboard", newer], ["families", newer]):
        code, _, err = deadbench(*arguments)
        assert code == 2
        assert "newer deadbench" in err


def test_a_line_of_error_is_no_longer_than_its_limit_with_all_that_stands_before_it(deadbench):
    code, _, err = deadbench("leaderboard", "/".join(["x" * 100] * 9))
    assert code == 2
    assert err.startswith("deadbench: ")
    assert len(err.rstrip("\n")) == 300


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deadbench", "leaderboard", "/no/such", "--debug"])
    with pytest.raises(ValueError, match="/no/such"):
        cli.main()


@pytest.mark.ray
def test_ctrl_c_in_the_middle_is_exit_130_and_loses_nothing(tmp_path):
    """A whole process with its own Ray, interrupted after its first finished read."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "deadbench", "run", "twin-layernorm", "twin-rmsnorm", "--tokens", "4096",
         "--out", str(out)],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600  # a busy machine
    while not list(out.glob("reads/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1] == "deadbench: interrupted; what finished is kept"
    assert "Traceback" not in stderr
    frame = pl.scan_parquet(out / "reads" / "*.parquet").collect()
    assert 1 <= frame.height < 2 * 13
    assert frame["status"].unique().to_list() == ["ok"]
    assert list((out / "_tmp").iterdir()) == []


def test_what_cannot_be_watched_or_added_is_refused_before_anything_starts(deadbench, monkeypatch):
    monkeypatch.setattr(driver, "connect", lambda *_: pytest.fail("Ray was started"))
    code, _, err = deadbench("run", TWINS, "--log-format", "xml")
    assert (code, err) == (2, "deadbench: --log-format 'xml' is unknown; choose text, json\n")
    code, _, err = deadbench("run", "gpt2", "--reads", "random", "--autoscale", "8")
    assert code == 2
    assert err.startswith("deadbench: --autoscale '8': give GPUs x memory")
    code, _, err = deadbench("run", "gpt2", "--reads", "random", "--autoscale", "0x16GB")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("deadbench: --autoscale '0x16GB': nodes without GPUs are not asked for")
    code, _, err = deadbench("run", "gpt2", "--reads", "random", "--autoscale", "8x80GB", "--address", "local")
    told = "deadbench: --autoscale 8x80GB: --address local gets no more nodes; name a Ray that does\n"
    assert (code, err) == (2, told)
