"""Whole reads, without Ray, against an independent float64 SVD of the hooked activations."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished, Progress
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.worker.run import run_model
from deadbench.suite.registry.loading import load_registry
from tests.conftest import TINY_NEOX, TWINS, save_tiny, write_checkpoint

ROOT = TWINS.parents[2]
REGISTRY = ROOT / "models.yaml"


def reads(source, kinds="parameters,random,trained", **overrides):
    """Run the reads of one source in this process; returns (rows by (revision, read), their spectra)."""
    jobs = build_jobs(load_registry(REGISTRY), REGISTRY, [str(source)], None, kinds.split(","), Overrides(**overrides))
    events = [event for job in jobs for event in run_model(job, "run", 1)]
    rows, spectra = {}, {}
    for event in events:
        if isinstance(event, Finished):
            key = (event.job.revision, event.job.read)
            rows[key] = event.row
            if "spectra" in event.tables:
                spectra[key] = np.array(event.tables["spectra"].to_pylist()[0]["eigenvalues"])
    assert isinstance(events[0], Progress)
    return rows, spectra


def read_tables(source, kind, **overrides):
    """Run one read; returns its tables as lists of rows."""
    jobs = build_jobs(load_registry(REGISTRY), REGISTRY, [str(source)], None, [kind], Overrides(**overrides))
    (event,) = (e for e in run_model(jobs[0], "run", 1) if isinstance(e, Finished))
    assert event.row["status"] == "ok", event.row["error"]
    return {name: table.to_pylist() for name, table in event.tables.items()}


def independent(model, norm, ids):
    """Plain numpy on the hooked outputs: eigenvalues, bottom vector, lambda_v."""
    caught = []
    module = model.get_submodule(norm)
    handle = module.register_forward_hook(lambda m, a, y: caught.append(y.detach()))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids), use_cache=False)
    handle.remove()
    y = caught[-1].reshape(-1, caught[-1].shape[-1]).double().numpy()
    centred = y - y.mean(0)
    _, sigma, right = np.linalg.svd(centred, full_matrices=False)
    gamma = module.weight.detach().double().numpy()
    v = 1 / gamma / np.linalg.norm(1 / gamma)
    return sigma**2 / len(y), right[-1], np.mean((centred @ v) ** 2), v


@pytest.mark.parametrize("kind", ["trained", "random"])
@pytest.mark.parametrize(
    ("source", "norm"),
    [(TWINS / "layernorm/step4096", "final_layer_norm"), (TWINS / "rmsnorm/step4096", "norm")],
    ids=["layernorm", "rmsnorm"],
)
def test_rows_agree_with_an_independent_svd(source, norm, kind, tmp_path):
    import transformers

    ids = np.random.default_rng(0).integers(0, 512, (10, 77))
    np.save(tmp_path / "ids.npy", ids)
    spec = f"tokens:{tmp_path / 'ids.npy'}"
    rows, spectra = reads(source, kind, input=spec, dtype="float32", seed=3)
    row = rows[None, kind]
    assert row["status"] == "ok", row["error"]
    if kind == "trained":
        model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    else:
        transformers.set_seed(3)
        model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(source), dtype=torch.float32)
    eigenvalues, bottom, lambda_v, v = independent(model.eval(), norm, ids)
    certified = eigenvalues > row["spectrum_floor"]
    if kind == "trained" or norm == "norm":
        assert certified.sum() >= 63
    assert spectra[None, kind][certified] == pytest.approx(eigenvalues[certified], rel=1e-6)
    assert row["lambda_v"] == pytest.approx(lambda_v, rel=0.01)
    assert row["alignment"] == pytest.approx(abs(bottom @ v), abs=1e-6)
    assert (row["num_tokens"], row["input"]) == (770, spec)
    assert row["num_distinct_inputs"] == len(np.unique(ids))


@pytest.mark.parametrize("kind", ["trained", "random"])
@pytest.mark.parametrize("case", ["layernorm twin", "rmsnorm twin", pytest.param("MiniLM", marks=pytest.mark.slow)])
def test_every_block_agrees_with_an_independent_svd(case, kind, minilm, tmp_path):
    import transformers

    source = minilm if case == "MiniLM" else TWINS / case.split()[0] / "step4096"
    ids = np.random.default_rng(0).integers(5, 512, (16 if case == "MiniLM" else 8, 100))
    np.save(tmp_path / "ids.npy", ids)
    tables = read_tables(source, kind, input=f"tokens:{tmp_path / 'ids.npy'}", dtype="float32", seed=3)
    if kind == "trained":
        model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    else:
        transformers.set_seed(3)
        model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(source), dtype=torch.float32)
    with torch.no_grad():  # what these three architectures call hidden states is the stream, but for the last
        states = model.eval()(input_ids=torch.from_numpy(ids), output_hidden_states=True).hidden_states
    blocks = tables["blocks"]
    assert [row["block"] for row in blocks] == list(range(len(states)))
    spectra = {row["site"]: np.array(row["eigenvalues"]) for row in tables["spectra"]}
    for index, state in enumerate(states[:-1]):
        rows = state.reshape(-1, state.shape[-1]).double()
        reference = (torch.linalg.svdvals(rows - rows.mean(0)).square() / len(rows)).numpy()
        alive = reference > 1e-10 * reference.max()
        assert spectra[f"tap {index}"][alive] == pytest.approx(reference[alive], rel=1e-6)
        if alive.all():
            assert blocks[index]["sigma_min"] == pytest.approx(np.sqrt(reference[-1]), rel=1e-6)
    if case == "MiniLM":
        assert {row["state"] for row in blocks} <= {None, "preserved-dead"}
        assert spectra[f"tap {len(states) - 1}"] == pytest.approx(spectra["final_norm"], rel=1e-6, abs=1e-12)
        assert tables["reads"][0]["blocks_preserved"] is True
    for row, before, state, state_before in zip(blocks[1:-1], blocks, states[1:], states, strict=False):
        if row["state"] in ("preserved", "collapsed"):
            fallen = [
                smallest(now) < (row["collapse_below"] or 0) * smallest(then)
                for now, then in zip(state.chunk(2), state_before.chunk(2), strict=True)
            ]
            assert row["state"] == ("collapsed" if all(fallen) else "preserved")
            assert row["ratio"] == pytest.approx(row["sigma_min"] / before["sigma_min"])


def smallest(state):
    """Smallest singular value of the centred rows of a hidden state, over sqrt(N)."""
    rows = state.reshape(-1, state.shape[-1]).double()
    return float(torch.linalg.svdvals(rows - rows.mean(0))[-1]) / len(rows) ** 0.5


@pytest.mark.slow
def test_taps_read_in_several_passes_are_the_same_rows(monkeypatch):
    from deadbench.runners.engines.resident import TorchEngine

    source, run, begun = TWINS / "layernorm/step4096", TorchEngine.passes, []
    monkeypatch.setattr(TorchEngine, "passes", lambda self, *arguments: begun.append(self) or run(self, *arguments))
    whole, cut = (
        read_tables(source, "trained", input="tokens:random", tokens=512, accumulator_gb=gb) for gb in (None, 1e-6)
    )
    assert len(whole["blocks"]) == 5
    assert len(begun) == 1 + 5, "all taps in one pass, then one a pass"
    keys = ("run_id",)
    for table in ("blocks", "spectra"):
        assert [{k: v for k, v in row.items() if k not in keys} for row in whole[table]] == [
            {k: v for k, v in row.items() if k not in keys} for row in cut[table]
        ]
    assert whole["reads"][0]["lambda_v"] == cut["reads"][0]["lambda_v"]


@pytest.mark.parametrize("left", [0.0, 1e-4], ids=["gone", "1e-4"])
def test_a_direction_projected_out_of_a_model_is_pinpointed(left, monkeypatch):
    """After block 2 of the trained twin the stream loses one direction; that block is named, and no other."""
    from deadbench.runners.engines.resident import TorchEngine

    generator = torch.Generator().manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    load = TorchEngine.load_trained

    def damaged(self, folder, dtype):
        model = load(self, folder, dtype)
        model.layers[1].register_forward_hook(lambda m, a, y: y - (1 - left) * (y @ q)[..., None] * q)
        return model

    monkeypatch.setattr(TorchEngine, "load_trained", damaged)
    tables = read_tables(TWINS / "layernorm/step4096", "trained", input="text", tokens=1024, dtype="float32")
    blocks = tables["blocks"]
    assert [row["block"] for row in blocks if row["state"] == "collapsed"] == [2]
    assert abs(np.dot(blocks[2]["bottom_direction"], q.numpy())) > 0.999
    read = tables["reads"][0]
    assert (read["blocks_preserved"], read["worst_block"]) == (False, 2)


@pytest.mark.slow
def test_minilm_every_read(minilm):
    rows, spectra = reads(minilm, tokens=1600)
    parameters, random, trained = (rows[None, kind] for kind in ("parameters", "random", "trained"))
    for row in (parameters, random, trained):
        assert (row["status"], row["family"], row["placement"]) == ("ok", "layernorm", "post"), row["error"]
        assert (row["hidden_size"], row["num_blocks"], row["num_parameters"]) == (384, 6, 22713216)
    assert (parameters["num_zero_scales"], parameters["predicted_dim"]) == (3, 3)
    # random: one algebraic kernel, rounding alone in it
    assert random["alignment"] == pytest.approx(1, abs=5e-5)
    assert 1e-15 < random["lambda_v"] < 1e-12
    assert (random["num_dead_1e4"], random["num_dead_1e10"], random["kernel_exact"]) == (1, 1, True)
    # trained: three dead directions, the three zero scales, at every threshold
    assert [trained[f"num_dead_1e{k}"] for k in (4, 6, 8, 10)] == [3, 3, 3, 3]
    assert trained["containment"] == pytest.approx(1, abs=1e-6)
    assert trained["num_zero_scales"] == 3
    assert trained["lambda_v"] < 1e-30
    assert spectra[None, "trained"][-4] > 1e-4
    assert trained["num_tokens"] == 1600


@pytest.mark.slow
def test_twins_differ_as_the_paper_says():
    layernorm, _ = reads("twin-layernorm", "random,trained")
    rmsnorm, _ = reads("twin-rmsnorm", "random,trained")
    assert len(layernorm) == len(rmsnorm) == 7
    for row in layernorm.values():
        assert row["alignment"] > 0.99995
        assert row["kernel_exact"] is True
        assert row["depth"] > 12
    for row in rmsnorm.values():
        assert row["alignment"] < 0.9
        assert row["kernel_exact"] is False
        assert row["depth"] < 1
    assert [layernorm[f"step{s}", "trained"]["checkpoint_step"] for s in (0, 4096)] == [0, 4096]
    assert layernorm[None, "random"]["checkpoint_step"] is None


def test_a_model_without_a_final_norm_is_a_row_with_a_reason(tmp_path):
    config = {"model_type": "opt", "vocab_size": 99, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32,
              "num_hidden_layers": 2, "num_attention_heads": 2, "_remove_final_layer_norm": True,
              "architectures": ["OPTForCausalLM"], "max_position_embeddings": 64}  # fmt: skip
    rows, spectra = reads(save_tiny(tmp_path / "m", config), input="tokens:random")
    for row in rows.values():
        assert (row["status"], row["family"]) == ("ok", "none")
        assert (row["final_norm"], row["alignment"], row["depth"], row["depth_predicted"]) == (None,) * 4
        assert "no normalisation" in row["error"]
    assert spectra == {}


def spoil(kind, folder):
    tensors = load_file(folder / "model.safetensors")
    if kind == "nan":
        tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"][0, 0] = torch.nan
    elif kind == "inf":
        tensors["gpt_neox.embed_in.weight"][:] = torch.inf
    elif kind == "lacking":
        del tensors["gpt_neox.layers.0.attention.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("nan", {}, "not finite"),
        ("inf", {}, "not finite"),
        ("lacking", {}, "lack 1 tensors of GPTNeoXModel"),
        ("good", {"tokens": 16}, "16 tokens for hidden size 16"),
        ("good", {"input": "text"}, "needs the model's tokenizer"),
    ],
)
def test_what_goes_wrong_is_a_failed_row_of_one_line(kind, overrides, message, tmp_path):
    folder = save_tiny(tmp_path / "m")
    spoil(kind, folder)
    rows, _ = reads(folder, "trained", **({"input": "tokens:random"} | overrides))
    row = rows[None, "trained"]
    assert row["status"] == "failed"
    assert message in row["error"]
    assert "\n" not in row["error"]
    assert (row["depth"], row["alignment"]) == (None, None)


def test_one_bad_checkpoint_does_not_stop_the_next_read(tmp_path):
    folder = save_tiny(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"short")
    rows, _ = reads(folder, input="tokens:random")
    assert [rows[None, kind]["status"] for kind in ("parameters", "random", "trained")] == ["failed", "ok", "failed"]


def test_remote_code_is_never_run(tmp_path):
    folder = write_checkpoint(tmp_path / "m", {"model_type": "mine", "auto_map": {"AutoModel": "evil.Model"}}, {})
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    rows, _ = reads(folder, "parameters,random", input="tokens:random")
    for row in rows.values():
        assert row["status"] == "failed"
        assert "never run" in row["error"]


def test_padding_does_not_enter_the_statistics(tmp_path):
    """330 tokens in sequences of 256: the second is padded, and the row must be that of the tokens alone."""
    rows, spectra = reads(TWINS / "layernorm/step512", "trained", tokens=330, dtype="float32")
    row = rows[None, "trained"]
    assert row["num_tokens"] == 330
    from transformers import AutoModel, AutoTokenizer

    text = (ROOT / "suite/data/corpus.txt").read_text()[:5000]
    ids = AutoTokenizer.from_pretrained(TWINS / "layernorm/step512")(text)["input_ids"][:330]
    model = AutoModel.from_pretrained(TWINS / "layernorm/step512", dtype=torch.float32)
    with torch.no_grad():
        y = [model(input_ids=torch.tensor([part])).last_hidden_state[0] for part in (ids[:256], ids[256:])]
    centred = torch.cat(y).double() - torch.cat(y).double().mean(0)
    reference = torch.linalg.svdvals(centred).square().numpy() / 330
    assert spectra[None, "trained"][:-1] == pytest.approx(reference[:-1], rel=1e-4)


def test_bfloat16_runs_in_bfloat16_and_is_replayed_in_float32(tmp_path):
    rows, _ = reads(save_tiny(tmp_path / "m"), "trained", input="tokens:random", dtype="bfloat16")
    row = rows[None, "trained"]
    assert (row["dtype"], row["status"]) == ("bfloat16", "ok"), row["error"]
    assert row["depth_as_executed"] < 8 < 12 < row["depth"] < 16 < 28 < row["depth_exact"]


def test_dtype_auto_is_that_of_the_stored_tensors(tmp_path):
    folder = save_tiny(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    rows, _ = reads(folder, "trained", input="tokens:random")
    assert rows[None, "trained"]["dtype"] == "bfloat16"


def test_images_are_read(tmp_path):
    config = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
              "intermediate_size": 64, "image_size": 32, "architectures": ["ViTForImageClassification"]}  # fmt: skip
    rows, _ = reads(save_tiny(tmp_path / "m", config), "random,trained")
    for row in rows.values():
        assert (row["modality"], row["status"], row["family"]) == ("image", "ok", "layernorm"), row["error"]
        assert row["num_tokens"] >= 8 * 32
        assert row["num_tokens"] % 17 == 0
        assert row["alignment"] > 0.99995


def test_a_final_norm_over_the_channels_of_maps_is_read_position_by_position(tmp_path):
    config = {"model_type": "sam_vision_model", "hidden_size": 32, "output_channels": 12, "num_hidden_layers": 2,
              "num_attention_heads": 4, "mlp_dim": 64, "image_size": 32, "patch_size": 8, "window_size": 2,
              "global_attn_indexes": [1], "architectures": ["SamVisionModel"], "initializer_range": 0.02}  # fmt: skip
    rows, spectra = reads(save_tiny(tmp_path / "m", config), tokens=400, dtype="float32")
    for row in rows.values():
        assert (row["status"], row["family"], row["hidden_size"]) == ("ok", "layernorm", 12), row["error"]
    trained = rows[None, "trained"]
    # The kernel is that of each position's 12 channels: exact, and the only one.
    assert (trained["num_dead_1e10"], trained["num_algebraic"], trained["kernel_exact"]) == (1, 1, True)
    assert trained["alignment"] == pytest.approx(1, abs=1e-6)
    assert trained["num_tokens"] >= 400
    assert len(spectra[None, "trained"]) == 12


def test_tokens_fingerprints_and_versions_are_recorded(tmp_path):
    rows, _ = reads(save_tiny(tmp_path / "m", TINY_NEOX), input="tokens:random")
    for (_, kind), row in rows.items():
        assert row["source_fingerprint"]
        assert '"torch"' in row["versions"]
        assert row["started_at"] <= row["finished_at"]
        assert row["engine"] == (None if kind == "parameters" else "torch")
        assert row["peak_host_bytes"] > 10_000_000
