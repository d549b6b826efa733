"""A protocol that leaves the first positions of each sequence out: they run, and no statistic sees them."""

import json

import numpy as np
import pytest
import torch

from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.worker.run import run_model
from deadbench.suite.registry.loading import RegistryError, load_registry
from tests.conftest import TWINS

T, K, N = 32, 3, 590


def job(tmp_path, **protocol):
    path = tmp_path / "models.yaml"
    model = {"id": "twin", "source": str(TWINS / "layernorm/step4096"), "dtype": "float32"}
    protocols = {"standard": {"tokens": N, "sequence_length": T} | protocol}
    path.write_text(json.dumps({"protocols": protocols, "suites": {}, "models": [model]}))
    overrides = Overrides(input="tokens:random")
    return build_jobs(load_registry(path), path, ["twin"], None, ["trained"], overrides)[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The read with positions left out: its tables, and the ids that the model was fed."""
    fed, embedding = [], torch.nn.Embedding.forward

    def seen(module, ids):
        fed.append(ids)
        return embedding(module, ids)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.Embedding, "forward", seen)
        (event,) = (
            event
            for event in run_model(job(tmp_path_factory.mktemp("skip"), skip_positions=K), "run", 1)
            if isinstance(event, Finished)
        )
    assert event.row["status"] == "ok", event.row["error"]
    return {name: table.to_pylist() for name, table in event.tables.items()}, fed[-1]


def test_as_many_rows_as_the_protocol_asks_for_are_left(found):
    tables, ids_ST = found
    (row,) = tables["reads"]
    assert (row["num_tokens"], row["skip_positions"]) == (N, K)
    assert "positions-left-out" in row["flags"]
    assert ids_ST.shape[1] == T


def test_the_spectra_are_those_of_the_positions_that_are_left(found):
    from transformers import AutoModel

    tables, ids_ST = found
    model = AutoModel.from_pretrained(TWINS / "layernorm/step4096", dtype=torch.float32)
    with torch.no_grad():
        last_STD = model(input_ids=ids_ST, use_cache=False).last_hidden_state
    full = N // (T - K)
    kept = torch.cat([last_STD[:full, K:].flatten(0, 1), last_STD[full, K : K + N - full * (T - K)]]).double().numpy()
    expected = np.linalg.svd(kept - kept.mean(0), compute_uv=False) ** 2 / N
    eigenvalues = next(row["eigenvalues"] for row in tables["spectra"] if row["site"] == "final_norm")
    assert np.array(eigenvalues)[:-1] == pytest.approx(expected[:-1], rel=1e-4)


def test_the_hash_of_a_protocol_without_it_is_what_it_was(tmp_path):
    plain, none, some = (job(tmp_path, **each).reads[0] for each in ({}, {"skip_positions": 0}, {"skip_positions": 1}))
    assert plain.protocol_hash == none.protocol_hash
    assert plain.protocol_hash != some.protocol_hash


def test_what_leaves_nothing_is_refused_where_it_is_written(tmp_path):
    with pytest.raises(RegistryError, match="skip_positions 32 leaves nothing of sequences of 32 tokens"):
        job(tmp_path, skip_positions=T)
