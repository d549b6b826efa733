"""A small model of pictures and text, read by the command over all tokens, those of text and those of pictures."""

import json

import polars as pl
import pytest

from tests.suite.inputs.test_mixed import BOTH


@pytest.mark.slow
def test_each_kind_of_token_has_a_row_and_spectra_of_its_own(deadbench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = BOTH["llava"][0] | {"model_type": "llava"}
    (tmp_path / "models.yaml").write_text(json.dumps({"models": [{"id": "both", "config": config}]}))
    for spec in ("image-text", "image-text/text", "image-text/picture"):
        arguments = ("run", "both", "--address", "none", "--reads", "random", "--out", "out", "--input", spec)
        code, _, err = deadbench(*arguments)
        assert code == 0, err
    rows = {row["protocol"]: row for row in pl.read_parquet("out/reads/*.parquet").iter_rows(named=True)}
    assert set(rows) == {f"standard[input=image-text{kind}]" for kind in ("", "/text", "/picture")}
    assert len({row["protocol_hash"] for row in rows.values()}) == 3
    assert all("random-input" in row["flags"] for row in rows.values())
    assert {row["final_norm"] for row in rows.values()} == {"language_model.norm"}
    assert rows["standard[input=image-text/picture]"]["num_tokens"] % 16 == 0
    assert rows["standard[input=image-text/text]"]["num_tokens"] % 48 == 0
    spectra = pl.read_parquet("out/spectra/*.parquet").filter(site="final_norm")
    assert len({tuple(each) for each in spectra["eigenvalues"]}) == 3
    code, _, err = deadbench("run", "both", "--address", "none", "--input", "image-text:none", "--out", "out")
    assert (code, "no such directory" in err) == (2, True)
