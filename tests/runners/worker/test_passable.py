"""Around the passes of quantised weights."""

import io
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from deadbench.runners.worker.passable import naming_who_unpacks

UNPACKER = "compressed_tensors.compressors.model_compressors.model_compressor"


def test_who_unpacks_shows_no_bars_meanwhile(monkeypatch):
    shown = io.StringIO()

    def bar(*given, **told):
        return tqdm(*given, file=shown, **told)

    module = SimpleNamespace(tqdm=bar)
    monkeypatch.setitem(sys.modules, UNPACKER, module)
    weights = SimpleNamespace(config=lambda: {"quantization_config": {"quant_method": "compressed-tensors"}})
    with naming_who_unpacks(weights):
        assert list(module.tqdm([1, 2], desc="Decompressing")) == [1, 2]
    assert (shown.getvalue(), module.tqdm) == ("", bar)
    with naming_who_unpacks(SimpleNamespace(config=dict)):
        assert list(module.tqdm([1], desc="Decompressing")) == [1]
    assert "Decompressing" in shown.getvalue()


def test_what_is_raised_over_quantised_weights_names_their_method():
    weights = SimpleNamespace(config=lambda: {"quantization_config": {"quant_method": "gptq"}})
    told = "no kernel for 24 columns; the weights are quantised by gptq, which may not"
    with pytest.raises(ValueError, match=told), naming_who_unpacks(weights):
        raise RuntimeError("no kernel for 24 columns")
