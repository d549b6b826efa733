"""Block streaming gives what the resident model gives: every tap and the final norm, over many architectures."""

import gc
import json
import re

import numpy as np
import pytest
import torch

from deadbench.runners.engines import deferred_init
from deadbench.runners.engines.base import Blocks, Swept
from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.engines.streaming import StreamingEngine
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished, Progress
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.worker import forward
from deadbench.runners.worker.run import run_model
from deadbench.suite.architectures.build import build_config
from deadbench.suite.architectures.parts import block_list
from deadbench.suite.architectures.resolve import resolve
from deadbench.suite.inputs.batches import Batch
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, TINY_NEOX, TWINS, save_tiny

TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}
LLAMA = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
ARCHITECTURES: dict[str, dict] = {
    "gpt_neox": TEXT,
    "llama": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99},
    "opt": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 99,
            "word_embed_proj_dim": 32},
    "gemma3_text": LLAMA | {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2
                            + ["full_attention"]},
    "qwen2_moe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                          "shared_expert_intermediate_size": 16},
    "bert": TEXT,
    "albert": TEXT | {"embedding_size": 16},
    "t5": {"d_model": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "d_ff": 48, "d_kv": 8,
           "vocab_size": 99},
    "cohere": LLAMA,
    "gemma3": {
        "text_config": LLAMA | {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 5, "pad_token_id": 0},
        "vision_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                          "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92,
    },
    "vit": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
            "image_size": 32, "patch_size": 8},
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch):
    monkeypatch.setattr(deferred_init, "_DEFERRED_ELEMENTS", 64)


def batches_for(model_type):
    generator = torch.Generator().manual_seed(0)
    if model_type == "vit":
        return [Batch({"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}) for _ in range(3)]
    whole = [Batch({"input_ids": torch.randint(3, 99, (2, 12), generator=generator)}) for _ in range(2)]
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    padded = Batch({"input_ids": whole[0].model_inputs["input_ids"], "attention_mask": mask}, mask.bool())
    if model_type != "t5":
        return [*whole, padded]
    return [
        Batch(b.model_inputs | {"decoder_input_ids": b.model_inputs["input_ids"]}, b.mask_ST) for b in (*whole, padded)
    ]


def everything(engine, whole, batches):
    """What enters every block, in order of tokens, and what passes the final norm."""
    found = engine.resolved or resolve(whole, "text", "encoder")
    norm, model = found.final.path, whole.get_submodule(found.part)
    path, _ = block_list(model, norm)
    taps = {}
    blocks = Blocks(
        list(model.get_submodule(path).children()), lambda tap, acts, _: taps.setdefault(tap, []).append(acts.clone())
    )
    passes, swept = [], []
    for step in engine.passes(model, model.get_submodule(norm), batches, blocks):
        if isinstance(step, Swept):
            if not step.num_ahead:
                swept.append((step.num_done, len(taps)))
        else:
            passes.append((step[1].input_BTD.clone(), step[1].output_BTD.clone(), step[1].num_block_calls))
    return taps, passes, swept


def assert_same(resident, streamed):
    taps, passes, _ = resident
    assert streamed[0].keys() == taps.keys()
    for tap in taps:
        for one, other in zip(streamed[0][tap], taps[tap], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
    for one, other in zip(streamed[1], passes, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(one[1], other[1], rtol=2e-6, atol=2e-6)
        assert one[2] == other[2] == len(taps)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_random_and_trained_are_the_resident_models(model_type, tmp_path):
    parked = 0 if len(model_type) % 2 else 1e9  # streams on disk, or in memory
    settings = {"model_type": model_type} | ARCHITECTURES[model_type]
    batches = batches_for(model_type)
    resident, streaming = TorchEngine(CPU), StreamingEngine(CPU, parked_bytes=parked)
    whole = resident.load_random(build_config(settings), 3, torch.float32)
    expected = everything(resident, whole, batches)
    model = streaming.load_random(build_config(settings), 3, torch.float32)
    streamed = everything(streaming, model, batches)
    assert (streaming.resolved.part == "encoder") == (model_type == "t5")
    assert_same(expected, streamed)
    # After each block: how many taps were complete, and none of the next begun.
    assert streamed[2] == [(n + 1, n + 1) for n in range(len(expected[0]))]

    whole.save_pretrained(tmp_path)
    stored = streaming.load_trained(tmp_path, torch.float32)
    assert_same(expected, everything(streaming, stored, batches))
    again = everything(streaming, stored, batches)
    assert_same(expected, again)


def test_a_final_norm_that_ends_a_block_is_there_although_its_part_has_other_paths(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 99}
    config = build_config({"model_type": "bart"} | sizes | heads)
    TorchEngine(CPU).load_random(config, 3, torch.float32).save_pretrained(tmp_path)
    streaming = StreamingEngine(CPU)
    model = streaming.load_trained(tmp_path, torch.float32)
    path = streaming.resolved.final_in_whole.path
    assert (streaming.resolved.part, path) == ("encoder", "encoder.layers.1.final_layer_norm")
    assert {name for name, p in model.named_parameters() if name.startswith("encoder.layers.") and not p.is_meta} == {
        f"{path}.weight", f"{path}.bias"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes_are_cast_as_the_resident_model_is(dtype):
    settings = {"model_type": "llama"} | LLAMA
    results = []
    for engine in (TorchEngine(CPU), StreamingEngine(CPU)):
        model = engine.load_random(build_config(settings), 3, getattr(torch, dtype))
        results.append(everything(engine, model, batches_for("llama")))
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert one[0].dtype == getattr(torch, dtype)
        assert torch.equal(one[0], other[0])


def test_one_block_at_a_time_is_in_memory():
    """The parameters that are real while block 1 runs are its own, and what is outside the blocks."""
    engine = StreamingEngine(CPU)
    model = engine.load_random(build_config({"model_type": "gpt_neox"} | TEXT), 0, torch.float32)
    real = []

    def look(tap, acts, batch):
        real.append({name.split(".")[1] for name, p in model.named_parameters()
                     if name.startswith("layers.") and p.ndim == 2 and not p.is_meta})  # fmt: skip

    norm = model.get_submodule("final_layer_norm")
    for _ in engine.passes(model, norm, batches_for("gpt_neox")[:1], Blocks(list(model.layers), look)):
        pass
    assert real == [{"0"}, {"1"}, {"2"}]
    assert all(p.is_meta for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2)


def test_an_abandoned_pass_leaves_the_model_as_it_was():
    engine = StreamingEngine(CPU)
    model = engine.load_random(build_config({"model_type": "gpt_neox"} | TEXT), 0, torch.float32)
    batches = batches_for("gpt_neox")
    expected = everything(engine, model, batches)
    passes = engine.passes(model, model.final_layer_norm, batches, Blocks(list(model.layers), lambda *_: None))
    next(passes)
    passes.close()
    gc.collect()
    assert_same(expected, everything(engine, model, batches))


def run_read(source, kind, **overrides):
    jobs = build_jobs(load_registry(ROOT / "models.yaml"), ROOT / "models.yaml", [str(source)], None, [kind],
                      Overrides(**overrides))  # fmt: skip
    events = list(run_model(jobs[0], "run", 1))
    (finished,) = (event for event in events if isinstance(event, Finished))
    return finished, [event for event in events if isinstance(event, Progress)]


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_rows_are_those_of_the_resident_read(kind):
    source = TWINS / "layernorm/step4096"
    results = [run_read(source, kind, input="tokens:random", tokens=600, engine=e) for e in ("torch", "streaming")]
    rows = [finished.row for finished, _ in results]
    assert [row["status"] for row in rows] == ["ok", "ok"], rows[1]["error"]
    assert [row["engine"] for row in rows] == ["torch", "streaming"]
    assert "streamed" in rows[1]["engine_detail"]
    for table in ("blocks", "spectra"):
        one, other = (
            [{k: v for k, v in row.items() if k != "engine"} for row in finished.tables[table].to_pylist()]
            for finished, _ in results
        )
        assert one == other
    for name in ("lambda_v", "lambda_min", "alignment", "depth", "worst_block_ratio", "num_tokens"):
        assert rows[0][name] == rows[1][name]
    told = [e.done for e in results[1][1] if e.phase == "blocks"]
    assert [done for done in told if done == int(done)] == [1, 2, 3, 4], "a block is progress"


def test_without_taps_the_final_norm_is_the_same_and_each_block_is_progress():
    source = TWINS / "layernorm/step4096"
    settings = {"input": "tokens:random", "tokens": 600, "engine": "streaming"}
    (whole, _), (alone, events) = (run_read(source, "trained", taps=taps, **settings) for taps in ("all", "none"))
    assert alone.row["lambda_min"] == whole.row["lambda_min"]
    assert (alone.row["blocks_preserved"], alone.row["worst_block_ratio"]) == (None, None)
    assert alone.tables["blocks"].num_rows == 0
    whole_blocks = [(e.done, e.total) for e in events if e.phase == "blocks" and e.done == int(e.done)]
    assert whole_blocks == [(n, 4) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("engine", ["torch", "streaming"])
def test_a_checkpoint_that_does_not_match_its_configuration_is_one_line(engine, tmp_path):
    save_tiny(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    finished, _ = run_read(tmp_path / "m", "trained", input="tokens:random", tokens=100, engine=engine)
    assert finished.row["status"] == "failed"
    assert "does not match config.json" in finished.row["error"]
    assert "layers.0.mlp.dense" in finished.row["error"]
    assert "64" in finished.row["error"].split("by the configuration")[0]
    assert finished.row["error"].count("\n") == 0


@pytest.mark.parametrize("engine", ["torch", "streaming"])
@pytest.mark.parametrize("name", ["gpt_neox", "bert"])
def test_a_checkpoint_with_more_blocks_than_its_configuration_is_refused(engine, name, tmp_path):
    """transformers would leave them out, and what was read would be the stream of another model."""
    classes = {"gpt_neox": "GPTNeoXForCausalLM", "bert": "BertForMaskedLM"}
    save_tiny(tmp_path / "m", TINY_NEOX | {"model_type": name, "architectures": [classes[name]]})
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    finished, _ = run_read(tmp_path / "m", "trained", input="tokens:random", tokens=100, engine=engine)
    assert finished.row["status"] == "failed"
    assert re.search(r"layers?\.1\..* is of a block that the configuration does not have", finished.row["error"])


@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_memory_is_tried_again_with_half_the_batch(failures, monkeypatch, tmp_path):
    save_tiny(tmp_path / "m")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 97, (32, 8)))
    seen = []
    monkeypatch.setattr(forward, "BATCH_TOKENS", 64)
    passes = TorchEngine.passes

    def short_of_memory(self, model, norm, batches, blocks=None):
        seen.append(len(batches))
        if len(seen) <= failures:
            raise torch.OutOfMemoryError("no memory")
        yield from passes(self, model, norm, batches, blocks)

    monkeypatch.setattr(TorchEngine, "passes", short_of_memory)
    finished, _ = run_read(tmp_path / "m", "trained", input=f"tokens:{tmp_path}/ids.npy")
    assert seen == [4, 8]
    if failures == 1:
        assert finished.row["status"] == "ok"
        assert finished.row["num_tokens"] == 256
    else:
        assert "batches of 32 tokens" in finished.row["error"]
        assert "--engine streaming" in finished.row["error"]
