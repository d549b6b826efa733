"""Weights of transformers' models as other libraries store them, by their own converters' rules the other way round."""

import argparse
import json
import re
import shutil

import torch
import yaml

from tests.suite.checkpoints.formats.ggufs import gguf
from tests.suite.checkpoints.formats.sharded import save_sharded

# Tiny models of four architectures, two of them with keys and values that heads share.
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 97, "n_embd": 16, "n_layer": 3,
        "n_head": 2, "n_positions": 64, "activation_function": "gelu_new"}  # fmt: skip
NEOX = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 97, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}}  # fmt: skip
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 97, "hidden_size": 16,
         "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 3,
                   "num_experts_per_tok": 2}  # fmt: skip
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def blocks(state, begin):
    """(number, name in the block, tensor) of what lies in blocks."""
    for name, tensor in state.items():
        if name.startswith(begin):
            number, _, rest = name.removeprefix(begin).partition(".")
            yield int(number), rest, tensor


def litgpt(folder, state, config):
    """`lit_model.pth` with queries, keys and values one after another, and the fields of `litgpt.Config`."""
    neox = config["model_type"] == "gpt_neox"
    told = {
        "name": "tiny",
        "hf_config": {"org": "o", "name": "tiny"},
        "block_size": 64,
        "n_layer": config["num_hidden_layers"], "n_embd": 16, "vocab_size": 97, "padded_vocab_size": 97,
        "n_head": config["num_attention_heads"],
        "n_query_groups": config.get("num_key_value_heads", config["num_attention_heads"]), "head_size": None,
        "intermediate_size": 32, "norm_eps": 1e-5, "rope_base": 10000, "rope_condense_ratio": 1,
        "rotary_percentage": 0.25 if neox else 1.0, "parallel_residual": neox, "bias": neox,
        "norm_class_name": "LayerNorm" if neox else "RMSNorm", "mlp_class_name": "GptNeoxMLP" if neox else "LLaMAMLP",
        "attn_bias": config["model_type"] == "qwen2",
    }  # fmt: skip
    if neox:
        names = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2", "attention.dense": "attn.proj",
                 "mlp.dense_h_to_4h": "mlp.fc", "mlp.dense_4h_to_h": "mlp.proj"}  # fmt: skip
        made = {
            "transformer.wte.weight": state["gpt_neox.embed_in.weight"],
            "lm_head.weight": state["embed_out.weight"],
        }
        made |= {f"transformer.ln_f.{w}": state[f"gpt_neox.final_layer_norm.{w}"] for w in ("weight", "bias")}
        for number, name, tensor in blocks(state, "gpt_neox.layers."):
            module, _, which = name.rpartition(".")
            if module.endswith("query_key_value"):
                parts = tensor.reshape(2, 3, 8, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
                made[f"transformer.h.{number}.attn.qkv.{which}"] = parts.contiguous()
            else:
                made[f"transformer.h.{number}.{names[module]}.{which}"] = tensor
    else:
        names = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2", "self_attn.o_proj": "attn.proj",
                 "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj"}  # fmt: skip
        made = {"transformer.wte.weight": state["model.embed_tokens.weight"], "lm_head.weight": state["lm_head.weight"]}
        made["transformer.ln_f.weight"] = state["model.norm.weight"]
        for number, name, tensor in blocks(state, "model.layers."):
            module, _, which = name.rpartition(".")
            if module in names:
                made[f"transformer.h.{number}.{names[module]}.{which}"] = tensor
            elif module.endswith("q_proj"):
                parts = [state[f"model.layers.{number}.self_attn.{k}_proj.{which}"] for k in "qkv"]
                made[f"transformer.h.{number}.attn.qkv.{which}"] = torch.cat(parts)
    torch.save(made, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.dump(told))
    return folder


def litgpt_of_before(folder, state, config):
    """Of 2024: each group's queries with its key and value."""
    litgpt(folder, state, config)
    made = torch.load(folder / "lit_model.pth")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    for name in [name for name in made if ".attn.qkv." in name]:
        q, k, v = made.pop(name).split([16, 4 * groups, 4 * groups])
        each = 4 * heads // groups
        parts = [
            p for g in range(groups) for p in (q[g * each : (g + 1) * each], k[4 * g : 4 * g + 4], v[4 * g : 4 * g + 4])
        ]
        made[name.replace("qkv", "attn")] = torch.cat(parts)
    torch.save(made, folder / "lit_model.pth")
    return folder


def lens(folder, state, config):
    """The state dict of a HookedTransformer, without processing."""
    made = {}
    if config["model_type"] == "gpt2":
        made = {"embed.W_E": state["transformer.wte.weight"], "pos_embed.W_pos": state["transformer.wpe.weight"]}
        made |= {"unembed.W_U": state["transformer.wte.weight"].T.contiguous(), "unembed.b_U": torch.zeros(97)}
        made |= {"ln_final.w": state["transformer.ln_f.weight"], "ln_final.b": state["transformer.ln_f.bias"]}
        for number, name, tensor in blocks(state, "transformer.h."):
            begin = f"blocks.{number}."
            module, _, which = name.rpartition(".")
            if module in ("ln_1", "ln_2"):
                made[f"{begin}{module.replace('_', '')}.{which[0]}"] = tensor
            elif module == "attn.c_attn" and which == "weight":
                for kind, part in zip("QKV", tensor.split(16, 1), strict=True):
                    made[f"{begin}attn.W_{kind}"] = part.reshape(16, 2, 8).transpose(0, 1).contiguous()
            elif module == "attn.c_attn":
                for kind, part in zip("QKV", tensor.split(16), strict=True):
                    made[f"{begin}attn.b_{kind}"] = part.reshape(2, 8)
            elif module == "attn.c_proj":
                made[f"{begin}attn.{'W' if which == 'weight' else 'b'}_O"] = (
                    tensor.reshape(2, 8, 16) if which == "weight" else tensor
                )
            else:
                side = "in" if module == "mlp.c_fc" else "out"
                made[f"{begin}mlp.{'W' if which == 'weight' else 'b'}_{side}"] = tensor
            made[f"{begin}attn.mask"] = torch.tril(torch.ones(64, 64)).bool()
            made[f"{begin}attn.IGNORE"] = torch.tensor(-torch.inf)
    elif config["model_type"] == "gpt_neox":
        made = {"embed.W_E": state["gpt_neox.embed_in.weight"], "unembed.W_U": state["embed_out.weight"].T.contiguous()}
        made |= {f"ln_final.{w[0]}": state[f"gpt_neox.final_layer_norm.{w}"] for w in ("weight", "bias")}
        made["unembed.b_U"] = torch.zeros(97)
        norms = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
        for number, name, tensor in blocks(state, "gpt_neox.layers."):
            begin = f"blocks.{number}."
            module, _, which = name.rpartition(".")
            if module in norms:
                made[f"{begin}{norms[module]}.{which[0]}"] = tensor
            elif module == "attention.query_key_value":
                for at, kind in enumerate("QKV"):
                    part = tensor.reshape(2, 3, 8, *tensor.shape[1:])[:, at]
                    called = f"{begin}attn.{'W' if which == 'weight' else 'b'}_{kind}"
                    made[called] = (part.transpose(1, 2) if which == "weight" else part).contiguous()
            elif module == "attention.dense":
                made[f"{begin}attn.{'W' if which == 'weight' else 'b'}_O"] = (
                    tensor.T.reshape(2, 8, 16).contiguous() if which == "weight" else tensor
                )
            else:
                side = "in" if module == "mlp.dense_h_to_4h" else "out"
                made[f"{begin}mlp.{'W' if which == 'weight' else 'b'}_{side}"] = (
                    tensor.T.contiguous() if which == "weight" else tensor
                )
            made[f"{begin}attn.rotary_sin"] = torch.zeros(64, 2)
    else:
        made = {"embed.W_E": state["model.embed_tokens.weight"], "unembed.W_U": state["lm_head.weight"].T.contiguous()}
        made |= {"ln_final.w": state["model.norm.weight"], "unembed.b_U": torch.zeros(97)}
        norms = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
        maps = {"mlp.gate_proj": "W_gate", "mlp.up_proj": "W_in", "mlp.down_proj": "W_out"}
        for number, name, tensor in blocks(state, "model.layers."):
            begin = f"blocks.{number}."
            module, _, which = name.rpartition(".")
            if module in norms:
                made[f"{begin}{norms[module]}.w"] = tensor
            elif module in maps:
                made[f"{begin}mlp.{maps[module]}"] = tensor.T.contiguous()
            elif module == "self_attn.o_proj":
                made[f"{begin}attn.W_O"] = tensor.T.reshape(4, 4, 16).contiguous()
            else:
                kind = module.rpartition(".")[2][0].upper()
                heads, mark = (4, "") if kind == "Q" else (2, "_")
                made[f"{begin}attn.{mark}W_{kind}"] = tensor.reshape(heads, 4, 16).transpose(1, 2).contiguous()
                made[f"{begin}attn.{mark}b_{kind}"] = torch.zeros(heads, 4)
            made[f"{begin}attn.b_O"] = torch.zeros(16)
            made[f"{begin}mlp.b_in"], made[f"{begin}mlp.b_out"] = torch.zeros(32), torch.zeros(16)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(made, folder / "model.pt")
    return folder / "model.pt"


def bridge(folder, state, config):
    """The state dict of a TransformerBridge, of TransformerLens since version 4, without processing."""
    parts = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2", "ln_1": "ln1", "ln_2": "ln2",
             "attention.dense": "attn.o", "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.in", "mlp.c_proj": "mlp.out",
             "mlp.dense_h_to_4h": "mlp.in", "mlp.dense_4h_to_h": "mlp.out", "mlp.gate_proj": "mlp.gate",
             "mlp.up_proj": "mlp.in", "mlp.down_proj": "mlp.out"}  # fmt: skip
    parts |= {f"self_attn.{kind}_proj": f"attn.{kind}" for kind in "qkvo"}
    outside = {"wte": "embed", "wpe": "pos_embed", "embed_in": "embed", "embed_tokens": "embed", "ln_f": "ln_final",
               "final_layer_norm": "ln_final", "norm": "ln_final", "embed_out": "unembed",
               "lm_head": "unembed"}  # fmt: skip
    begin = {"gpt2": "transformer.h.", "gpt_neox": "gpt_neox.layers."}.get(config["model_type"], "model.layers.")
    made = {
        f"{outside[name.split('.')[-2]]}.{name.split('.')[-1]}": tensor
        for name, tensor in state.items()
        if not name.startswith(begin)
    }
    made["unembed.bias"] = torch.zeros(97)
    if "unembed.weight" not in made:
        made["unembed.weight"] = made["embed.weight"]
    for number, name, tensor in blocks(state, begin):
        module, _, which = name.rpartition(".")
        if module in parts:
            made[f"blocks.{number}.{parts[module]}.{which}"] = tensor
            continue
        if module == "attn.c_attn":
            three = tensor.T.chunk(3) if which == "weight" else tensor.chunk(3)
        else:
            three = [tensor.reshape(2, 3, 8, *tensor.shape[1:])[:, at].flatten(0, 1) for at in range(3)]
        made |= {f"blocks.{number}.attn.{k}.{which}": t.contiguous() for k, t in zip("qkv", three, strict=True)}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(made, folder / "model.pt")
    return folder / "model.pt"


def cut(tensor, ranks, axis):
    return [part.contiguous() for part in tensor.chunk(ranks, axis)]


def megatron(folder, state, config, *, ranks=2, stages=1, core=True):
    """The folder of Megatron's ranks and stages, each with its part of the layers and of each map."""
    gpt2 = config["model_type"] == "gpt2"
    layers = config["n_layer"] if gpt2 else config["num_hidden_layers"]
    args = {
        "num_layers": layers, "hidden_size": 16, "padded_vocab_size": 98, "max_position_embeddings": 64,
        "num_attention_heads": 2 if gpt2 else 4, "norm_epsilon": 1e-5, "ffn_hidden_size": 64 if gpt2 else 32,
        "position_embedding_type": "learned_absolute" if gpt2 else "rope", "add_bias_linear": gpt2, "openai_gelu": True,
        "normalization": "LayerNorm" if gpt2 else "RMSNorm", "swiglu": not gpt2, "kv_channels": 8 if gpt2 else 4,
        "group_query_attention": not gpt2, "num_query_groups": 1 if gpt2 else 2, "rotary_base": 10000,
        "rotary_percent": 1.0, "untie_embeddings_and_output_weights": not gpt2, "params_dtype": torch.float32,
        "tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages,
    }  # fmt: skip
    begin = "decoder." if core else "encoder."
    names = {
        "first": ("self_attention.linear_qkv.layer_norm_{}", "input_layernorm.{}"),
        "second": ("mlp.linear_fc1.layer_norm_{}", "post_attention_layernorm.{}"),
        "qkv": ("self_attention.linear_qkv.{}", "self_attention.query_key_value.{}"),
        "out": ("self_attention.linear_proj.{}", "self_attention.dense.{}"),
        "up": ("mlp.linear_fc1.{}", "mlp.dense_h_to_4h.{}"),
        "down": ("mlp.linear_fc2.{}", "mlp.dense_4h_to_h.{}"),
    }

    def called(part, which):
        return names[part][0 if core else 1].format(which)

    embedding = state["transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"]
    each = layers // stages
    held = [[{} for _ in range(ranks)] for _ in range(stages)]

    def put(stage, name, tensor, axis=None):
        parts = [tensor] * ranks if axis is None else tensor if isinstance(tensor, list) else cut(tensor, ranks, axis)
        for rank in range(ranks):
            held[stage][rank][name] = parts[rank]

    put(0, "embedding.word_embeddings.weight", embedding, 0)
    if gpt2:
        put(0, "embedding.position_embeddings.weight", state["transformer.wpe.weight"])
    else:
        put(stages - 1, "output_layer.weight", state["lm_head.weight"], 0)
    for which in ("weight", "bias") if gpt2 else ("weight",):
        put(
            stages - 1,
            f"{begin}final_layernorm.{which}",
            state[f"{'transformer.ln_f' if gpt2 else 'model.norm'}.{which}"],
        )
    for layer in range(layers):
        stage, own = layer // each, f"{begin}layers.{layer % each}."
        for which in ("weight", "bias") if gpt2 else ("weight",):
            old = f"transformer.h.{layer}." if gpt2 else f"model.layers.{layer}."

            def get(name, which=which, old=old):
                return state[f"{old}{name}.{which}"]

            if gpt2:
                turn = (lambda t: t.T) if which == "weight" else lambda t: t
                qkv = torch.stack([p.reshape(2, 8, *p.shape[1:]) for p in turn(get("attn.c_attn")).chunk(3)], 1)
                put(stage, own + called("qkv", which), qkv.reshape(48, *qkv.shape[3:]), 0)
                put(stage, own + called("up", which), turn(get("mlp.c_fc")), 0)
                for part, name in (("out", "attn.c_proj"), ("down", "mlp.c_proj")):
                    put(stage, own + called(part, which), turn(get(name)), 1 if which == "weight" else None)
                for part, name in (("first", "ln_1"), ("second", "ln_2")):
                    put(stage, own + called(part, which), get(name))
            else:
                q, k, v = (get(f"self_attn.{kind}_proj") for kind in "qkv")
                groups = [torch.cat([q[8 * g : 8 * g + 8], k[4 * g : 4 * g + 4], v[4 * g : 4 * g + 4]]) for g in (0, 1)]
                put(stage, own + called("qkv", which), torch.cat(groups), 0)
                gates, ups = cut(get("mlp.gate_proj"), ranks, 0), cut(get("mlp.up_proj"), ranks, 0)
                put(stage, own + called("up", which), [torch.cat(pair) for pair in zip(gates, ups, strict=True)], 0)
                put(stage, own + called("out", which), get("self_attn.o_proj"), 1)
                put(stage, own + called("down", which), get("mlp.down_proj"), 1)
                put(stage, own + called("first", which), get("input_layernorm"))
                put(stage, own + called("second", which), get("post_attention_layernorm"))
    for stage in range(stages):
        for rank in range(ranks):
            model = held[stage][rank]
            if not core:
                encoder = {n.removeprefix(begin): t for n, t in model.items() if n.startswith(begin)}
                outside = {n: t for n, t in model.items() if not n.startswith(begin)}
                model = {"language_model": {"encoder": encoder} | outside}
            below = folder / "iter_0000300" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else ""))
            below.mkdir(parents=True)
            saved = {"model": model, "args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": 300}
            torch.save(saved, below / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("300")
    return folder


def megatron_of_before(folder, state, config):
    return megatron(folder, state, config, core=False)


def megatron_in_stages(folder, state, config):
    layers = config["n_layer"] if "n_layer" in config else config["num_hidden_layers"]
    return megatron(folder, state, config, stages=layers)


def megatron_core(folder, state, config, mesh=(3, 2)):
    """`torch_dist` of Megatron-core: one tensor of all layers, cut over stages and ranks, and optimizers beside it."""
    megatron(folder, state, config, ranks=1)
    step = folder / "iter_0000300"
    saved = torch.load(step / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    shutil.rmtree(step)
    stacked, layers = {}, {}
    for name, tensor in saved.pop("model").items():
        found = re.fullmatch(r"(decoder\.layers\.)\d+\.(.*)", name)
        (layers.setdefault("".join(found.groups()), []) if found else stacked.setdefault(name, [])).append(tensor)
    made = {name: parts[0] for name, parts in stacked.items()} | {name: torch.stack(ts) for name, ts in layers.items()}
    beside = {f"chained_0.optimizer.state.exp_avg.{name}": tensor * 0 for name, tensor in made.items()}
    save_sharded(step, made | beside, mesh, None)
    saved["args"].tensor_model_parallel_size = mesh[1]
    torch.save(saved, step / "common.pt")
    return folder


def megatron_core_of_one_stage(folder, state, config):
    return megatron_core(folder, state, config, (1, 2))


def megatron_core_with_experts(folder, state, config):
    """The maps of all experts of all layers are one tensor; what weighs them is beside."""
    dense = {name: tensor for name, tensor in state.items() if "block_sparse_moe" not in name}
    for layer in range(config["num_hidden_layers"]):  # takes the place of what is there instead
        for part, shape in {"gate": (32, 16), "up": (32, 16), "down": (16, 32)}.items():
            dense[f"model.layers.{layer}.mlp.{part}_proj.weight"] = torch.zeros(shape)
    megatron(folder, dense, config, ranks=1)
    step = folder / "iter_0000300"
    saved = torch.load(step / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    shutil.rmtree(step)
    stacked = {}
    for name, tensor in saved.pop("model").items():
        if "mlp.linear_fc" not in name or "layer_norm" in name:
            stacked.setdefault(re.sub(r"layers\.\d+", "layers", name), []).append(tensor)
    for layer in range(config["num_hidden_layers"]):
        begin = f"model.layers.{layer}.block_sparse_moe."
        experts = [
            [state[f"{begin}experts.{number}.w{part}.weight"] for part in (1, 2, 3)]
            for number in range(config["num_local_experts"])
        ]
        own = {
            "router": state[f"{begin}gate.weight"],
            "experts.experts.linear_fc1": torch.stack([torch.cat([gate, up]) for gate, _, up in experts]),
            "experts.experts.linear_fc2": torch.stack([down for _, down, _ in experts]),
        }
        for name, tensor in own.items():
            stacked.setdefault(f"decoder.layers.mlp.{name}.weight", []).append(tensor)
    made = {name: torch.stack(parts) if ".layers." in name else parts[0] for name, parts in stacked.items()}
    save_sharded(step, made, (2, 2), None)
    vars(saved["args"]).update(num_experts=3, moe_router_topk=2, moe_ffn_hidden_size=32)
    torch.save(saved, step / "common.pt")
    return folder


def neox_layers(folder, state, config, ranks=2):
    """A file a layer and rank; shifts that ranks add are cut by halves, norms are on each."""
    below = folder / "global_step40"
    below.mkdir()
    (folder / "latest").write_text("global_step40")
    (folder / "config.json").write_text(json.dumps(config))
    last = config["num_hidden_layers"] + 3
    layers = {0: {"word_embeddings.weight": state["gpt_neox.embed_in.weight"]}}
    layers[last] = {f"norm.{w}": state[f"gpt_neox.final_layer_norm.{w}"] for w in ("weight", "bias")}
    layers[last + 1] = {"final_linear.weight": state["embed_out.weight"]}
    for number, name, tensor in blocks(state, "gpt_neox.layers."):
        layers.setdefault(number + 2, {})[name] = tensor
    for number, held in layers.items():
        for rank in range(ranks):
            own = {}
            for name, tensor in held.items():
                module, _, which = name.rpartition(".")
                if module.endswith(("dense", "dense_4h_to_h")):
                    own[name] = cut(tensor, ranks, 1)[rank] if which == "weight" else tensor / ranks
                else:
                    own[name] = tensor if "norm" in module else cut(tensor, ranks, 0)[rank]
            torch.save(own, below / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    return folder


def llama_cpp(folder, state, config, matrices="F32"):
    """A GGUF as convert_hf_to_gguf.py writes it."""
    arch = {"gpt_neox": "gptneox"}.get(config["model_type"], config["model_type"])
    rms = arch in ("llama", "qwen2")
    layers = config.get("n_layer") or config["num_hidden_layers"]
    heads = config.get("n_head") or config["num_attention_heads"]
    width = config.get("n_embd") or config["hidden_size"]
    facts = {
        "general.architecture": arch, f"{arch}.context_length": 64, f"{arch}.embedding_length": width,
        f"{arch}.block_count": layers, f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": config.get("num_key_value_heads", heads),
        f"{arch}.feed_forward_length": 64 if arch == "gpt2" else 32,
        f"{arch}.attention.layer_norm_{'rms_' if rms else ''}epsilon": 1e-5, f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.use_parallel_residual": True,
        f"{arch}.rope.dimension_count": 2 if arch == "gptneox" else width // heads,
    }  # fmt: skip
    made = {}

    def put(name, tensor):
        made[name] = tensor.contiguous().numpy()

    if arch == "gpt2":
        names = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
                 "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}  # fmt: skip
        put("token_embd.weight", state["transformer.wte.weight"])
        put("position_embd.weight", state["transformer.wpe.weight"])
        for number, name, tensor in blocks(state, "transformer.h."):
            module, _, which = name.rpartition(".")
            put(f"blk.{number}.{names[module]}.{which}", tensor.T if tensor.ndim == 2 else tensor)
        final = "transformer.ln_f"
    elif arch == "gptneox":
        names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
                 "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
                 "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}  # fmt: skip
        put("token_embd.weight", state["gpt_neox.embed_in.weight"])
        put("output.weight", state["embed_out.weight"])
        for number, name, tensor in blocks(state, "gpt_neox.layers."):
            module, _, which = name.rpartition(".")
            if module.endswith("query_key_value"):
                tensor = tensor.reshape(heads, 3, 8, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
            put(f"blk.{number}.{names[module]}.{which}", tensor)
        final = "gpt_neox.final_layer_norm"
    else:
        names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
                 "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
                 "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
        put("token_embd.weight", state["model.embed_tokens.weight"])
        put("output.weight", state["lm_head.weight"])
        for number, name, tensor in blocks(state, "model.layers."):
            module, _, which = name.rpartition(".")
            if arch == "llama" and module.endswith(("q_proj", "k_proj")):
                size = width // heads
                tensor = tensor.reshape(tensor.shape[0] // size, 2, size // 2, -1).transpose(1, 2).reshape(tensor.shape)
            put(f"blk.{number}.{names[module]}.{which}", tensor)
        final = "model.norm"
    for which in ("weight",) if rms else ("weight", "bias"):
        put(f"output_norm.{which}", state[f"{final}.{which}"])
    packed = {name: matrices for name, tensor in made.items() if tensor.ndim == 2}
    (folder / "model.gguf").write_bytes(gguf(facts, made, packed))
    return folder / "model.gguf"


OPT = {"model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 97, "hidden_size": 16, "ffn_dim": 32,
       "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
       "max_position_embeddings": 64}  # fmt: skip


def fairseq(folder, state, config, fused=False):
    """What fairseq's trainer saves of a decoder; metaseq has keys, values and queries `fused`."""
    made = {"decoder.version": torch.tensor([3.0])}
    for name, tensor in state.items():
        called = name.removeprefix("model.").replace("decoder.final_layer_norm", "decoder.layer_norm")
        if fused and ("v_proj" in name or "q_proj" in name):
            continue
        if fused and "k_proj" in name:
            called = called.replace("k_proj", "qkv_proj")
            tensor = torch.cat([state[name.replace("k_proj", f"{kind}_proj")] for kind in "kvq"])
        made[called.replace("lm_head", "decoder.output_projection")] = tensor
    (folder / "config.json").write_text(json.dumps(config))
    saved = {
        "args": argparse.Namespace(arch="transformer_lm"),
        "model": made,
        "optimizer_history": [{"num_updates": 7}],
    }
    torch.save(saved, folder / "checkpoint_last.pt")
    return folder / "checkpoint_last.pt"


def metaseq(folder, state, config):
    return fairseq(folder, state, config, fused=True)


CLIP = {
    "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 12,
    "text_config": {
        "model_type": "clip_text_model", "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 20, "vocab_size": 97, "projection_dim": 12,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 3, "image_size": 8, "patch_size": 4, "projection_dim": 12, "hidden_act": "gelu",
    },
}  # fmt: skip


def open_clip(folder, state, config):
    """`open_clip_pytorch_model.bin` and its configuration."""
    text, vision = config["text_config"], config["vision_config"]
    told = {
        "model_cfg": {
            "embed_dim": 12,
            "vision_cfg": {"image_size": 8, "layers": 2, "width": 24, "patch_size": 4, "head_width": 8},
            "text_cfg": {"context_length": 20, "vocab_size": 97, "width": 16, "heads": 2, "layers": 2},
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]},
    }
    assert (text["hidden_size"], vision["hidden_size"]) == (16, 24)
    outside = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight", "logit_scale": "logit_scale",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    }  # fmt: skip
    norms = {"text_model.final_layer_norm": "ln_final", "vision_model.pre_layrnorm": "visual.ln_pre",
             "vision_model.post_layernorm": "visual.ln_post"}  # fmt: skip
    outside |= {f"{ours}.{w}": f"{theirs}.{w}" for ours, theirs in norms.items() for w in ("weight", "bias")}
    made = {theirs: state[ours] for ours, theirs in outside.items()}
    made |= {"text_projection": state["text_projection.weight"].T.contiguous()}
    made |= {"visual.proj": state["visual_projection.weight"].T.contiguous(), "attn_mask": torch.zeros(20, 20)}
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj"}  # fmt: skip
    for tower, begin in (("text_model", "transformer.resblocks"), ("vision_model", "visual.transformer.resblocks")):
        for number, name, tensor in blocks(state, f"{tower}.encoder.layers."):
            module, _, which = name.rpartition(".")
            if module in parts:
                made[f"{begin}.{number}.{parts[module]}.{which}"] = tensor
            elif module.endswith("q_proj"):
                three = [state[f"{tower}.encoder.layers.{number}.self_attn.{kind}_proj.{which}"] for kind in "qkv"]
                made[f"{begin}.{number}.attn.in_proj_{which}"] = torch.cat(three)
    torch.save(made, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    return folder
