"""A LayerNorm model converted to RMSNorm by folding the mean into what writes: equal outputs, and the kernel is found.

StableLM without shifts is Llama but for the norm; GPT-2 is converted where no class of transformers has its twin.
"""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from deadbench.suite.architectures.kernel_test import live_norm, probe
from deadbench.suite.architectures.wiring import trace
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.reads.centred_stream import CENTRED
from deadbench.suite.reads.classify import classify
from deadbench.suite.reads.final_norm import FinalNormRead
from deadbench.suite.reads.parameters import read_parameters
from examples.centre_weights import centre_weights

SHAPE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0,
         "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0,
         "eos_token_id": 0}  # fmt: skip
IDS = torch.randint(1, 99, (12, 32), generator=torch.Generator().manual_seed(0))


class RMSNorm(nn.Module):
    """`gamma x / sqrt(mean(x^2) + eps) + beta`."""

    def __init__(self, of: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.eps = of.weight, of.bias, of.eps

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() + self.bias


@pytest.fixture(scope="module")
def stablelm():
    """A LayerNorm model, its scales and embeddings with a mean that counts."""
    torch.manual_seed(0)
    config = transformers.StableLmConfig(**SHAPE, partial_rotary_factor=1.0, layer_norm_eps=1e-6, use_cache=False)
    model = transformers.StableLmForCausalLM(config).double()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.05)
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.3, 2.0)
    return model.requires_grad_(False)


def as_llama(stablelm, folder, *, centred=True):
    """The same function by RMSNorm, its mean folded into what writes; saved, and the model."""
    before = {name: tensor.clone() for name, tensor in stablelm.state_dict().items()}
    model = transformers.StableLmForCausalLM(stablelm.config).double()
    model.load_state_dict(before)
    if centred:
        centre_weights(model, trace(model))
    config = transformers.LlamaConfig(**SHAPE, rms_norm_eps=1e-6, tie_word_embeddings=False, use_cache=False)
    llama = transformers.LlamaForCausalLM(config).double().requires_grad_(False)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("norm.bias")}
    llama.load_state_dict({k: v for k, v in state.items() if "layernorm.bias" not in k}, strict=True)
    llama.save_pretrained(folder)
    return llama


def test_a_converted_model_is_the_same_function_and_classify_says_where_its_kernel_hides(stablelm, tmp_path):
    llama = as_llama(stablelm, tmp_path)
    with torch.no_grad():
        there, here = stablelm(input_ids=IDS).logits, llama(input_ids=IDS).logits
    # transformers' own RMSNorm computes in float32, whatever it is given.
    assert float((here - there).abs().max() / there.abs().max()) < 1e-6
    told, _ = classify(str(tmp_path))
    assert told["family"] == "rmsnorm"
    assert told["evidence"][-1] == CENTRED
    assert read_parameters(Checkpoint(str(tmp_path))).columns()["stream_centred"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_centred_stream_is_seen_through_the_rounding_of_what_is_stored(stablelm, tmp_path, dtype):
    as_llama(stablelm, tmp_path).to(dtype).save_pretrained(tmp_path)
    assert read_parameters(Checkpoint(str(tmp_path))).stream_centred is True


def test_an_rmsnorm_model_as_any_other_costs_eight_rows_and_is_not_centred(stablelm, tmp_path):
    as_llama(stablelm, tmp_path, centred=False)
    checkpoint = Checkpoint(str(tmp_path))
    read = read_parameters(checkpoint)
    assert read.stream_centred is False
    assert CENTRED not in read.evidence
    headers = Checkpoint(str(tmp_path))
    headers.headers()
    assert checkpoint.bytes_read - headers.bytes_read - headers.size("config.json") <= (8 + 1) * 32 * 8


def test_a_writer_that_is_not_centred_leaves_the_stream_uncentred(stablelm, tmp_path):
    llama = as_llama(stablelm, tmp_path)
    llama.model.layers[1].mlp.down_proj.weight += 0.01
    llama.save_pretrained(tmp_path)
    assert read_parameters(Checkpoint(str(tmp_path))).stream_centred is False


def test_a_converted_gpt2_has_equal_outputs_and_the_kernel():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=64, use_cache=False,
                                     tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double().eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.3, 2.0)
            nn.init.normal_(module.bias, 0, 0.5)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    centre_weights(model, trace(model))
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    for path in norms:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, RMSNorm(model.get_submodule(path)))
    with torch.no_grad():
        after = model(input_ids=IDS).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-12
    row = _read(model.float())
    assert (row["stream_centred"], row["alignment"]) == (True, pytest.approx(1, abs=1e-5))
    assert row["depth"] > 10
    assert row["stream_mean_share"] < 1e-12


def test_an_rmsnorm_of_a_stream_with_a_mean_has_none(stablelm, tmp_path):
    llama = as_llama(stablelm, tmp_path, centred=False).float()
    row = _read(llama, llama.model.norm, llama.model)
    assert (row["stream_centred"], row["depth"] < 2) == (False, True)
    assert row["stream_mean_share"] > 1e-3


def _read(model, norm=None, whole=None):
    norm = model.transformer.ln_f if norm is None else norm
    caught = []
    handle = norm.register_forward_hook(lambda module, args, output: caught.append((args[0], output)))
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    read = FinalNormRead(norm, live_norm(norm, probe(norm, 32), 32))
    read.update(*caught[0])
    row, _ = read.finish()
    assert np.isfinite(row["lambda_v"])
    return row
