"""Dead parameter directions: the counts against the exact Fisher, and the model's own outputs when it is moved."""

import numpy as np
import pytest
import torch
from torch import nn

from deadbench.suite.architectures.build import build_config, build_published
from deadbench.suite.architectures.kernel_test import live_norm
from deadbench.suite.architectures.wiring import is_linear, private_parameters, trace
from deadbench.suite.reads.dead_parameters import count_dead_parameters, dead_at_initialisation, trace_published

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 11}
NEOX = SMALL | {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "max_position_embeddings": 16}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ARCHITECTURES = {
    "gpt_neox": (NEOX, "pre-LN, a head without bias"),
    "gpt2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_layer": 2, "n_head": 2,
              "n_positions": 16, "vocab_size": 11} | SPECIAL, "Conv1D, tied head"),
    "bert": (SMALL | {"model_type": "bert", "architectures": ["BertForMaskedLM"], "max_position_embeddings": 16},
             "post-LN, a head behind a norm of its own"),
    "opt": (SMALL | {"model_type": "opt", "architectures": ["OPTForCausalLM"], "ffn_dim": 12,
                     "word_embed_proj_dim": 8, "max_position_embeddings": 16} | SPECIAL, "learned positions"),
    "bloom": ({"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 8, "n_layer": 2,
               "n_head": 2, "vocab_size": 11} | SPECIAL, "a norm that writes to the stream"),
    "vit": ({"model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 8, "image_size": 8,
             "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "patch_size": 4},
            "parameters that are no module's weight"),
}  # fmt: skip


def randomised(config, zero_scale=None):
    """The architecture with every parameter drawn at random, in float64; its wiring and norms."""
    built = build_config(config)
    _, wiring = trace_published(built)
    torch.manual_seed(0)
    model = build_published(built).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
        if zero_scale is not None:
            model.get_submodule(zero_scale).weight[[1, 3]] = 0.0
    modules = dict(model.named_modules())
    return model, wiring, {path: live_norm(modules[path], b, D) for path, (b, D) in wiring.norms.items()}


def claimed_directions(model, wiring, norms):
    """Every direction that is counted, one by one, as {parameter name: tensor}; written from method, not from code."""
    private = private_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}

    def unit(shape, index, along=None):
        direction = torch.zeros(shape, dtype=torch.float64)
        direction[index] = 1.0 if along is None else along
        return direction

    for path, norm_path in wiring.reads.items():
        module, norm = model.get_submodule(path), norms[norm_path]
        gamma, beta = torch.from_numpy(norm.scale_D), torch.zeros(len(norm.scale_D), dtype=torch.float64)
        beta = beta if norm.shift_D is None else torch.from_numpy(norm.shift_D)
        zeros = torch.nonzero(gamma == 0)[:, 0]
        kernel = torch.eye(len(gamma), dtype=torch.float64)[zeros] if len(zeros) else (1 / gamma)[None]
        if norm.family != "layernorm" or any(id(p) not in private for p in module.parameters()):
            continue
        transposed = not isinstance(module, nn.Linear)
        out = module.weight.shape[1 if transposed else 0]
        for w in kernel if module.bias is not None or not beta.any() else []:
            for i in range(out):
                row = unit((out, len(w)), i, w)
                moved = {names[id(module.weight)]: row.T if transposed else row}
                if module.bias is not None:
                    moved[names[id(module.bias)]] = -unit(out, i, w @ beta)
                yield moved
    parameters = dict(model.named_parameters())
    for path in wiring.writes:
        if path in parameters:
            shape = parameters[path].shape
            yield from ({path: unit(shape, index)} for index in np.ndindex(*shape[:-1]))
            continue
        module = model.get_submodule(path)
        if any(id(p) not in private for p in module.parameters()):
            continue
        if path in wiring.norms or (is_linear(module) and module.bias is not None):
            yield {names[id(module.bias)]: torch.ones_like(module.bias)}
        if path in wiring.norms:
            continue
        weight = module.weight
        per_column = isinstance(module, nn.Linear)
        for i in range(weight.shape[1 if per_column else 0]):
            yield {names[id(weight)]: unit(weight.shape, (slice(None), i) if per_column else i)}


def vit_or_token_inputs(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 3, 8, 8, dtype=torch.float64)}
    return {"input_ids": torch.randint(1, 11, (3, 7))}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_counted_directions_together_leave_the_logits_as_they_are(name):
    model, wiring, norms = randomised(ARCHITECTURES[name][0])
    counts = count_dead_parameters(model, wiring, norms)
    inputs = vit_or_token_inputs(model)
    with torch.no_grad():
        before = model(**inputs).logits
        parameters = dict(model.named_parameters())
        total = 0
        for direction in claimed_directions(model, wiring, norms):
            size = torch.randn(())
            total += 1
            for parameter, change in direction.items():
                parameters[parameter] += size * change
        after = model(**inputs).logits
        parameters[next(iter(direction))][0] += 0.1 * torch.randn_like(parameters[next(iter(direction))][0])
        control = model(**inputs).logits
    assert sum(map(sum, counts.values())) == total > 0
    assert (after - before).norm() < 1e-12 * before.norm()
    assert (control - after).norm() > 1e-6 * before.norm()


def fisher_factor(model, names, ids):
    """F with F^T F the Fisher over `names`, from the Jacobian of the logits: `sqrt(p) (J - E_p J)`, rows stacked."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def logits(chosen):
        return torch.func.functional_call(model, parameters | chosen, (ids,), {"use_cache": False}).logits.flatten(0, 1)

    chosen = {name: parameters[name] for name in names}
    jacobian = torch.func.jacrev(logits, chunk_size=256)(chosen)
    J = torch.cat([jacobian[name].flatten(2) for name in names], dim=2)
    p = logits(chosen).softmax(-1)[..., None]
    return (p.sqrt() * (J - (p * J).sum(1, keepdim=True))).flatten(0, 1)


def nullity(factor):
    sigma = torch.linalg.svdvals(factor)
    return factor.shape[1] - int((sigma > 1e-11 * sigma[0]).sum())


@pytest.mark.parametrize("zero_scale", [None, "gpt_neox.layers.0.post_attention_layernorm"], ids=["", "zero scales"])
def test_the_counts_are_a_lower_bound_on_the_exact_fishers_nullity(zero_scale):
    model, wiring, norms = randomised(NEOX | {"num_hidden_layers": 1, "use_parallel_residual": False}, zero_scale)
    model.set_attn_implementation("eager")  # which has a batched backward pass
    counts = count_dead_parameters(model, wiring, norms)
    mlp, up = "gpt_neox.layers.0.post_attention_layernorm", "gpt_neox.layers.0.mlp.dense_h_to_4h"
    assert counts["gpt_neox.layers.0.input_layernorm"] == (24, 11)  # queries, keys, values; one a token embedding
    assert counts[mlp] == (24 if zero_scale else 12, 8 + 1)  # what the MLP reads; attention's output map
    assert counts["gpt_neox.final_layer_norm"] == (0, 12 + 1)  # the head has no bias; the MLP's output map
    ids = torch.randint(0, 11, (14, 8))
    names = [name for name, _ in model.named_parameters()]
    factor = fisher_factor(model, names, ids)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert len(factor) > factor.shape[1]

    claimed = list(claimed_directions(model, wiring, norms))
    basis = torch.stack(
        [torch.cat([d.get(n, torch.zeros(sizes[n], dtype=torch.float64)).flatten() for n in names]) for d in claimed]
    )
    total = sum(map(sum, counts.values()))
    assert torch.linalg.matrix_rank(basis) == len(basis) == total
    assert (factor @ basis.T).abs().max() < 1e-12 * factor.abs().max()
    assert total <= nullity(factor) < factor.shape[1]
    # Where nothing else is degenerate the count is the nullity itself.
    assert nullity(fisher_factor(model, [f"{up}.weight", f"{up}.bias"], ids)) == counts[mlp][0]


LLAMA = SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | SPECIAL
# By kind: the architecture, a map that a norm feeds, one that writes to the stream, and what each counts.
KINDS = {
    "pre-LN": (NEOX | {"use_parallel_residual": False},
               "gpt_neox.layers.0.mlp.dense_h_to_4h", 12, "gpt_neox.layers.0.mlp.dense_4h_to_h", 12 + 1),
    "post-LN": (ARCHITECTURES["bert"][0], "bert.encoder.layer.0.intermediate.dense", 12,
                "bert.encoder.layer.0.output.dense", 12 + 1),
    "pre-LN, tied embeddings": (ARCHITECTURES["gpt2"][0] | {"n_inner": 12, "n_layer": 1},
                                "transformer.h.0.mlp.c_fc", 12, "transformer.h.0.mlp.c_proj", 12 + 1),
    "maps without biases": (SMALL | {"model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"],
                                     "use_bias": False, "num_key_value_heads": 2} | SPECIAL,
                            "model.layers.0.mlp.c_fc", 0, "model.layers.0.mlp.c_proj", 12),
    "no bias at all": ({"model_type": "mpt", "architectures": ["MptForCausalLM"], "d_model": 8, "n_heads": 2,
                        "n_layers": 1, "max_seq_len": 16, "vocab_size": 11} | SPECIAL,
                       "transformer.blocks.0.ffn.up_proj", 32, "transformer.blocks.0.ffn.down_proj", 32),
    "RMSNorm": (LLAMA, "model.layers.0.mlp.up_proj", 0, "model.layers.0.mlp.down_proj", 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_fisher_of_each_kind_of_norm_confirms_the_counts(kind):
    config, read, num_read, written, num_written = KINDS[kind]
    model, wiring, norms = randomised(config | {"num_hidden_layers": 1})
    model.set_attn_implementation("eager")
    total = sum(map(sum, count_dead_parameters(model, wiring, norms).values()))
    claimed = list(claimed_directions(model, wiring, norms))
    names, sizes = zip(*((name, p.numel()) for name, p in model.named_parameters()), strict=True)
    factor = fisher_factor(model, names, torch.randint(1, 11, (14, 8)))
    assert len(factor) > factor.shape[1]
    none = {n: torch.zeros(size, dtype=torch.float64) for n, size in zip(names, sizes, strict=True)}
    basis = [torch.cat([d.get(n, none[n]).flatten() for n in names]) for d in claimed]
    if basis:
        assert torch.linalg.matrix_rank(torch.stack(basis)) == len(basis)
        assert (factor @ torch.stack(basis).T).abs().max() < 1e-12 * factor.abs().max()
    assert len(basis) == total <= nullity(factor)
    assert (total > 0) == (kind != "RMSNorm")
    # In one map alone nothing else is degenerate: there the count is the nullity, not a bound.
    columns = dict(zip(names, factor.split(sizes, dim=1), strict=True))
    for path, expected in ((read, num_read), (written, num_written)):
        own = [columns[f"{path}.{name}"] for name, _ in model.get_submodule(path).named_parameters()]
        assert nullity(torch.cat(own, 1)) == expected


class Stream(nn.Module):
    """One embedding, one writer, one norm, one reader; `leak` adds another reader of the stream."""

    main_input_name = "input_ids"

    def __init__(self, leak):
        super().__init__()
        self.leak = leak
        self.embed, self.write, self.norm = nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.read = nn.Linear(4, 5)
        self.gate = nn.Linear(4, 1)

    def forward(self, input_ids):
        stream = self.embed(input_ids)
        stream = stream + self.write(torch.tanh(self.norm(stream)))
        normed = self.norm(stream)
        if self.leak == "linear":
            return self.read(normed) * self.gate(stream)
        if self.leak == "in place":
            stream *= torch.arange(4.0)
            return self.read(self.norm(stream))
        if self.leak == "half":
            return self.read(torch.cat([normed[..., :2], normed[..., :2]], -1))
        if self.leak == "reversed":
            return self.read(normed.flip(-1))
        if self.leak == "past the module":
            return nn.functional.linear(normed, self.read.weight) + self.read(normed)
        return self.read(normed)


@pytest.mark.parametrize(
    ("leak", "reads", "writes"),
    [
        (None, {"read"}, {"embed", "write"}),
        ("linear", {"read"}, set()),
        ("in place", {"read"}, set()),
        ("half", set(), {"embed", "write"}),
        ("reversed", set(), {"embed", "write"}),
        ("past the module", set(), {"embed", "write"}),
    ],
)
def test_any_use_that_is_not_understood_ends_the_claim(leak, reads, writes):
    found = trace(Stream(leak), {"input_ids": torch.tensor([[1, 2, 3]])})
    assert set(found.norms) == {"norm"}
    assert (set(found.reads), set(found.writes)) == (reads, writes)


def test_an_rmsnorm_and_a_tied_head_give_no_direction():
    model, wiring, norms = randomised(LLAMA)
    assert sum(map(sum, count_dead_parameters(model, wiring, norms).values())) == 0
    model, wiring, norms = randomised(ARCHITECTURES["gpt2"][0])
    read, written = count_dead_parameters(model, wiring, norms)["transformer.h.0.ln_1"]
    assert (read, written) == (24, 16)  # the positions alone: the token embedding is also the head
    assert wiring.reads["lm_head"] == "transformer.ln_f"
    assert count_dead_parameters(model, wiring, norms)["transformer.ln_f"][0] == 0


def test_the_count_at_initialisation_is_that_of_scales_one_and_shifts_zero():
    for config, expected in ((NEOX, None), (LLAMA, 0)):
        built = build_config(config)
        torch.manual_seed(0)
        model = build_published(built).double()
        _, wiring = trace_published(built)
        modules = dict(model.named_modules())
        norms = {path: live_norm(modules[path], b, D) for path, (b, D) in wiring.norms.items()}
        counted = sum(map(sum, count_dead_parameters(model, wiring, norms).values()))
        assert dead_at_initialisation(*trace_published(built)) == counted
        assert expected is None or counted == expected
    # The head has no bias, and none is needed while the shift is zero: 11 directions that training ends.
    model, wiring, norms = randomised(NEOX)
    assert (
        dead_at_initialisation(*trace_published(build_config(NEOX)))
        == sum(map(sum, count_dead_parameters(model, wiring, norms).values())) + 11
    )
