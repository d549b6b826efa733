"""Every column that the schema declares is filled by a read: `to_table` gives null for whatever a read forgets."""

import json

import pytest
import torch

from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.worker.run import run_model
from deadbench.suite.registry.loading import load_registry
from deadbench.suite.schema import TABLES
from tests.conftest import TINY_NEOX, TWINS, write_checkpoint

EMPTY = {
    ("reads", "peak_device_bytes"),  # on a CPU
    ("reads", "source_step"),  # safetensors record none
    ("norms", "engine"),  # a column of the key: this table is of the read that runs none
}


@pytest.fixture(scope="module")
def tables(minilm, tmp_path_factory):
    """Rows by table: of a checkpoint of a series, with a broken and a massive block, of zero scales, of a failure."""
    folder = tmp_path_factory.mktemp("columns")
    write_checkpoint(folder / "broken", TINY_NEOX)
    (folder / "broken" / "model.safetensors").write_bytes(b"broken")
    models = [
        {
            "id": "twin",
            "source": str(TWINS / "layernorm"),
            "family": "layernorm",
            "dtype": "float32",
            "checkpoints": ["step4096"],
            "tokens_per_step": 2048,
        },
        {"id": "minilm", "source": str(minilm)},
        {"id": "broken", "source": "broken"},
    ]
    registry = folder / "models.yaml"
    registry.write_text(json.dumps({"protocols": {"standard": {"tokens": 2048}}, "suites": {}, "models": models}))
    load, q_D = TorchEngine.load_trained, torch.nn.functional.normalize(torch.arange(1.0, 65), dim=0)

    def damaged(self, *arguments):
        model = load(self, *arguments)
        model.layers[1].register_forward_hook(lambda module, args, y: y - 0.98 * (y @ q_D)[..., None] * q_D)
        model.layers[3].register_forward_hook(lambda module, args, y: y + 1e3 * torch.eye(64)[5])
        return model

    found = {name: [] for name in TABLES}
    with pytest.MonkeyPatch.context() as patched:
        for model, read, tokens in (
            ("twin", "parameters", None), ("twin", "functional", 32), ("twin", "trained", None),
            ("minilm", "parameters", None), ("broken", "parameters", None),
        ):  # fmt: skip
            if read == "trained":
                patched.setattr(TorchEngine, "load_trained", damaged)
            for job in build_jobs(load_registry(registry), registry, [model], None, [read], Overrides(tokens=tokens)):
                (event,) = (event for event in run_model(job, "run", 1) if isinstance(event, Finished))
                assert (event.row["status"] == "failed") == (model == "broken"), event.row["error"]
                for name, table in event.tables.items():
                    found[name] += table.to_pylist()
    return found


def test_every_declared_column_is_filled_by_some_read(tables):
    empty = {
        (name, column.name)
        for name, columns in TABLES.items()
        for column in columns
        if all(row[column.name] in (None, []) for row in tables[name])
    }
    assert empty == EMPTY
