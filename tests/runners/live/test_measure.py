"""A live model is read as its checkpoint would be, and left as it was found."""

import random

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import deadbench
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.worker.run import run_model
from deadbench.suite.registry.loading import load_registry, own_registry
from tests.runners.live.models import Gpt
from tests.same_rows import TINY, _save

# What says when, where and of which file a row was made, not what was measured.
ELSEWHERE = {
    "run_id", "model", "source", "source_fingerprint", "source_format", "protocol", "protocol_hash", "input",
    "versions", "started_at", "finished_at", "load_seconds", "forward_seconds", "spectrum_seconds", "peak_host_bytes",
    "engine_detail",
}  # fmt: skip


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return Gpt()


def of(rows):
    return [{name: value for name, value in row.items() if name not in ELSEWHERE} for row in rows]


@pytest.mark.parametrize("case", ["gpt2", "llama", "bert"])
def test_the_rows_are_those_of_the_checkpoint_and_its_tokens(case, tmp_path, tokens):
    _save(case, tmp_path / case)
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    overrides = Overrides(input=f"tokens:{tmp_path / 'tokens.npy'}")
    path, names = own_registry(), [str(tmp_path / case)]
    (job,) = build_jobs(load_registry(path), path, names, None, ["parameters", "trained"], overrides)
    stored = [event for event in run_model(job, "run", 1) if isinstance(event, Finished)]
    model = getattr(transformers, TINY[case][1]).from_pretrained(tmp_path / case, dtype="auto")
    reading = deadbench.measure(model, [{"input_ids": tokens}], reads=("parameters", "trained"))
    parameters, trained = (event.row for event in stored)
    assert parameters["stream_centred"] is (False if case == "llama" else None)
    parameters["stream_centred"] = None  # a live model's own maps are not looked at: its stream is, by `trained`
    assert of(reading.rows) == of([parameters, trained])
    assert reading.rows[0]["protocol_hash"] == stored[0].row["protocol_hash"]
    for table in ("spectra", "blocks", "norms"):
        expected = [row for event in stored if table in event.tables for row in event.tables[table].to_pylist()]
        assert of(getattr(reading, table)) == of(expected)
        assert expected


def test_padding_does_not_count(tmp_path, tokens):
    _save("gpt2", tmp_path)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    mask_ST = torch.ones_like(tokens)
    mask_ST[:, 24:] = 0
    padded = deadbench.measure(model, [{"input_ids": tokens, "attention_mask": mask_ST}]).row
    cut = deadbench.measure(model, [{"input_ids": tokens[:, :24]}]).row
    assert padded["num_tokens"] == cut["num_tokens"] == 16 * 24
    assert padded["lambda_mean"] == pytest.approx(cut["lambda_mean"], rel=1e-5)


@pytest.mark.parametrize("fed", ["embeddings", "in a dictionary"])
def test_padding_does_not_count_however_a_batch_is_made_up(fed, tmp_path, tokens):
    _save("gpt2", tmp_path)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    mask_ST = torch.ones_like(tokens)
    mask_ST[:, 24:] = 0
    expected = deadbench.measure(model, {"input_ids": tokens, "attention_mask": mask_ST}).row
    if fed == "embeddings":
        batch = {"inputs_embeds": model.transformer.wte(tokens), "attention_mask": mask_ST}
        found = deadbench.measure(model, [batch]).row
    else:
        model = Wrapped(model, lambda output: output)
        found = deadbench.measure(model, [({"input_ids": tokens, "attention_mask": mask_ST}, None)]).row
    assert found["num_tokens"] == 16 * 24
    assert found["lambda_mean"] == pytest.approx(expected["lambda_mean"], rel=1e-5)


def test_padding_of_something_else_than_the_rows_is_refused_and_an_encoders_is_none(tokens):
    config = transformers.T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    mask_ST = (torch.arange(32) < 24).expand(16, 32).long()
    batch = {"input_ids": tokens, "attention_mask": mask_ST, "decoder_input_ids": tokens}
    assert deadbench.measure(model, batch).row["num_tokens"] == 16 * 32
    assert deadbench.measure(model, batch | {"decoder_attention_mask": mask_ST}).row["num_tokens"] == 16 * 24

    class Coarser(nn.Sequential):
        """One row of two tokens, as of sound."""

        def forward(self, tokens, attention_mask):
            return super().forward(tokens[:, ::2])

    coarser = Coarser(nn.Embedding(97, 16), nn.Linear(16, 16), nn.LayerNorm(16))
    whole = {"tokens": tokens, "attention_mask": torch.ones_like(tokens)}
    assert deadbench.measure(coarser, whole).row["num_tokens"] == 16 * 16
    with pytest.raises(ValueError, match=r"attention_mask of \(16, 32\) leaves positions out"):
        deadbench.measure(coarser, [whole, whole | {"attention_mask": mask_ST}])


class Wrapped(nn.Module):
    """A model whose batch is a dictionary in a place, and which returns as it likes."""

    def __init__(self, model, returned):
        super().__init__()
        self.model, self.returned = model, returned

    def forward(self, batch, targets):
        return self.returned(self.model(**batch).logits)


@pytest.mark.parametrize(
    "returned",
    [
        lambda logits: [logits],
        lambda logits: (torch.ones(()), logits),  # a loss before them
        lambda logits: {"logits": logits, "probabilities": logits.softmax(-1)},
    ],
)
def test_whatever_a_module_returns_its_norm_is_found(returned, tmp_path, tokens):
    _save("gpt2", tmp_path)
    model = Wrapped(transformers.GPT2LMHeadModel.from_pretrained(tmp_path), returned)
    assert deadbench.measure(model, [({"input_ids": tokens}, None)]).row["final_norm"] == "model.transformer.ln_f"


def test_modules_called_by_name(gpt, tokens):
    expected = deadbench.measure(gpt, tokens).row

    def forward(tokens, targets=None):
        x = gpt.embed(tokens)
        for block in gpt.h:
            x = block(x=x)
        return gpt.lm_head(gpt.ln_f(input=x))

    gpt.forward = forward
    assert of([deadbench.measure(gpt, tokens).row]) == of([expected])


def test_torchs_own_encoder_runs_as_it_is_written(tokens):
    """Without gradients its layers would be one operation each, on nested tensors where something is padded."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(97, 16)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16))

        def forward(self, tokens, attention_mask):
            return self.encoder(self.embed(tokens), src_key_padding_mask=attention_mask == 0)

    batch = {"tokens": tokens, "attention_mask": (torch.arange(32) < 24).expand(16, 32)}
    reading = deadbench.measure(Encoder(), batch)
    assert (reading.row["num_tokens"], len(reading.blocks)) == (16 * 24, 3)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_module_of_ones_own_is_found_and_may_be_told(gpt, tokens):
    found = deadbench.measure(gpt, tokens).row
    assert (found["final_norm"], found["family"], found["placement"]) == ("ln_f", "layernorm", "pre")
    assert (found["num_blocks"], found["num_tokens"], found["status"]) == (2, 512, "ok")
    assert found["alignment"] > 0.999
    assert found["depth"] > 10
    for final_norm, blocks in (("ln_f", "h"), (gpt.ln_f, list(gpt.h))):
        told = deadbench.measure(gpt, [(tokens,)], final_norm=final_norm, blocks=blocks).row
        assert of([told]) == of([found])
    inside = deadbench.measure(gpt, [{"tokens": tokens}], final_norm="h.1.ln", taps="none")
    assert (inside.row["placement"], inside.blocks, inside.row["blocks_preserved"]) == ("post", [], None)


def test_its_parameters_are_read_where_the_norm_is_told(gpt):
    reading = deadbench.measure(gpt, final_norm="ln_f", blocks="h")
    assert (reading.row["read"], reading.row["engine"], reading.row["num_zero_scales"]) == ("parameters", None, 0)
    assert {row["norm"]: row["role"] for row in reading.norms} == {
        "h.0.ln": "block",
        "h.1.ln": "block",
        "ln_f": "final",
    }
    with torch.no_grad():
        gpt.ln_f.weight[3] = 0
    assert deadbench.measure(gpt, final_norm="ln_f").norms[-1]["zero_coordinates"] == [3]
    with pytest.raises(ValueError, match="without a batch the final norm .* give final_norm, its path"):
        deadbench.measure(gpt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final_norm": "norm"}, "Gpt has no module 'norm'; it has embed, h, ln_f, lm_head"),
        ({"final_norm": "lm_head"}, "lm_head .Linear. is neither LayerNorm nor RMSNorm"),
        ({"taps": "every"}, "taps 'every' is unknown; choose all or none"),
        ({"reads": ["random"]}, "read 'random' cannot be made of a live model; choose parameters or trained"),
        ({"batches": None, "reads": ["trained"]}, "needs batches"),
        ({"batches": []}, "there is no batch; give an iterable of a tensor"),
        ({"batches": ["words"]}, "a batch is a str; give a tensor"),
        ({"max_tokens": 8}, "8 tokens for hidden size 16"),
        (
            {"batches": [(torch.ones(2, 8).long(),) * 3]},
            r"too many positional arguments.*it takes .tokens, targets=None",
        ),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(gpt, tokens, arguments, message):
    batches = {"batches": [tokens[:1, :8]] * 4} | arguments
    with unchanged(gpt), pytest.raises(ValueError, match=message) as caught:
        deadbench.measure(gpt, **batches)
    assert "\n" not in str(caught.value)


class unchanged:  # noqa: N801
    """Everything that training depends on is, to the bit, what it was."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.model.train()
        self.model.h[0].eval()
        self.model.ln_f.weight.requires_grad_(False)
        self.model.embed.weight.grad = torch.ones_like(self.model.embed.weight)
        self.model.h[1].register_forward_hook(lambda *_: None)
        self.before = self.state()

    def state(self):
        model = self.model
        return {
            "modes": [module.training for module in model.modules()],
            "grads": [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
            "values": [(name, value.tolist()) for name, value in model.state_dict().items()],
            "identities": [(id(p), p.device, p._version) for p in (*model.parameters(), *model.buffers())][:-1],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
            "kept": model.longest,
            "grad mode": torch.is_grad_enabled(),
        }

    def __exit__(self, *exception):
        assert self.state() == self.before


def test_all_is_left_as_it_was_found(gpt, tokens):
    def batches():
        yield torch.randint(3, 97, (16, 32))
        random.random()
        np.random.rand()

    with unchanged(gpt):
        assert deadbench.measure(gpt, batches()).row["status"] == "ok"


def test_what_modules_keep_of_a_call_is_left_as_it_was(gpt, tokens):
    kept = {"losses": [], "last": None, "average": torch.zeros(2), "stats": {"of": [0]}}
    vars(gpt).update(kept)

    def keep(module, args, output):
        gpt.losses.append(output[0].mean())
        gpt.last, gpt.stats["calls"] = output, 1
        gpt.average.add_(1)
        gpt.stats["of"].append(1)
        if len(gpt._forward_hooks) == 1:  # as transformers hangs on the hooks by which it gives hidden states
            gpt.register_forward_hook(lambda *_: None)

    gpt.register_forward_hook(keep)
    deadbench.measure(gpt, tokens)
    assert {name: vars(gpt)[name] for name in kept if name != "average"} == {
        "losses": [],
        "last": None,
        "stats": {"of": [0]},
    }
    assert gpt.losses is kept["losses"]
    assert gpt.average.tolist() == [0, 0]
    assert len(gpt._forward_hooks) == 1


def test_an_exception_on_the_way_changes_nothing(gpt, tokens):
    def broken():
        yield tokens[:4]
        raise OSError("the disk is gone")

    with unchanged(gpt), pytest.raises(OSError, match="the disk is gone"):
        deadbench.measure(gpt, broken())
    with unchanged(gpt), pytest.raises(IndexError):
        deadbench.measure(gpt, [tokens, tokens + 97])


def test_training_goes_on_to_the_bit(gpt, tokens):
    def weights(looks):
        torch.manual_seed(1)
        model = Gpt()
        optimiser = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                if looks:
                    deadbench.measure(model, tokens)
                logits, _ = model(tokens)
            nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
            optimiser.step()
            optimiser.zero_grad()
        return [p.tolist() for p in model.parameters()]

    assert weights(True) == weights(False)


def test_under_autocast_the_row_says_in_which_precision(gpt, tokens):
    with torch.autocast("cpu", torch.bfloat16):
        row = deadbench.measure(gpt, tokens).row
    assert row["dtype"] == "bfloat16"
    assert row["kernel_exact"] is True


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "by block", "in place"])
def test_a_compiled_model_is_read_uncompiled(gpt, tokens, how):
    expected = deadbench.measure(gpt, tokens).row
    ran = []

    def backend(graph, example_inputs):
        ran.append(graph)
        return graph.forward

    model = gpt
    if how == "whole":
        model = torch.compile(gpt, backend=backend)
    else:
        for place, block in enumerate(gpt.h):
            if how == "in place":
                block.compile(backend=backend)
            else:
                gpt.h[place] = torch.compile(block, backend=backend)
    assert of([deadbench.measure(model, tokens).row]) == of([expected])
    assert not ran
    with torch.no_grad():
        model(tokens)
    assert ran
    assert of([deadbench.measure(model, tokens, final_norm="ln_f", blocks="h").row]) == of([expected])


def test_with_gradient_checkpointing(tmp_path, tokens):
    _save("gpt2", tmp_path)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    expected = deadbench.measure(model, [{"input_ids": tokens}]).row
    model.gradient_checkpointing_enable()
    model.train()
    assert of([deadbench.measure(model, [{"input_ids": tokens, "labels": tokens}]).row]) == of([expected])
    assert model.is_gradient_checkpointing
    assert model.training


def test_what_is_saved_is_a_result_set(gpt, tokens, tmp_path):
    for step in (10, 20):
        reading = deadbench.measure(gpt, tokens, reads=("parameters", "trained"))
        reading.save(tmp_path, model="mine", step=step)
        with torch.no_grad():
            gpt.ln_f.weight.mul_(0.5)
    assert deadbench.trend(tmp_path, "mine")["checkpoint_step"].to_list() == [10, 20]
    changed = deadbench.compare(f"{tmp_path}@step10", f"{tmp_path}@step20").filter(metric="lambda_v")
    assert changed["candidate"][0] / changed["baseline"][0] == pytest.approx(0.25, rel=0.2)
    assert deadbench.leaderboard(tmp_path)["model"].to_list() == ["mine"]
    assert set(deadbench.scan(tmp_path, "blocks").collect()["revision"]) == {"step10", "step20"}
