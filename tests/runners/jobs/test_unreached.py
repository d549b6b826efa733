"""A source that cannot be reached from here is told from one that cannot be read, by its class and not by its words."""

from dataclasses import replace

import pytest

from deadbench.runners.jobs import opening
from deadbench.runners.jobs.job import Overrides, Unreached
from deadbench.runners.planning.hardware import parse_cluster
from deadbench.runners.planning.plan import place
from deadbench.suite.checkpoints.fsspec_folder import one_line_errors
from deadbench.suite.errors import CheckpointError, UnreachableError
from tests.runners.sleepers import sleeping_jobs

TEXT = "far: cannot be reached (HF_HUB_OFFLINE is set)"


@pytest.mark.parametrize(("error", "kind"), [(UnreachableError(TEXT), Unreached), (CheckpointError(TEXT), str)])
def test_the_class_of_the_error_is_carried_into_the_read(error, kind, tmp_path, monkeypatch):
    def refused(*_):
        raise error

    monkeypatch.setattr(Overrides, "opened", refused)
    assert opening.open_all("far", ["main"], tmp_path, Overrides()) == ({"main": (None, TEXT)}, [])
    assert type(opening.open_all("far", ["main"], tmp_path, Overrides())[0]["main"][1]) is kind


def test_only_what_was_not_reached_may_be_there_on_the_cluster_that_is_assumed(tmp_path):
    (job,) = sleeping_jobs(tmp_path, 1)
    read = replace(job.reads[0], read="parameters")
    assumed = parse_cluster("1x24GB")
    assert place(replace(read, error=TEXT), assumed).problem == TEXT
    placed = place(replace(read, error=Unreached(TEXT)), assumed)
    assert placed.problem is None
    assert "cannot be reached from here" in placed.note
    assert place(replace(read, error=Unreached(TEXT)), replace(assumed, assumed=False)).problem == TEXT


@pytest.mark.parametrize(
    ("name", "kind"), [("OfflineModeIsEnabled", UnreachableError), ("GatedRepoError", CheckpointError)]
)
def test_the_hubs_own_errors_keep_their_cause(name, kind):
    with pytest.raises(CheckpointError) as caught, one_line_errors("org/m"):
        raise type(name, (OSError,), {})("x")
    assert type(caught.value) is kind
