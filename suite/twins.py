"""Train the twins: one small decoder with LayerNorm (GPT-NeoX), one with RMSNorm (Llama), on the bundled corpus.

    python -m deadbench.suite.twins OUT [--only layernorm]

Writes `OUT/<twin>/step<S>/{config.json,model.safetensors,tokenizer.json,…}` for every step in `CHECKPOINT_STEPS`,
step 0 being the untrained initialisation. The twins share everything but the normalisation and what an
architecture brings with it: data order, width, depth, vocabulary, optimiser, and to 1 % the number of parameters.

One CPU thread and a fixed seed make the files a function of this script, the corpus and the installed torch on one
machine. Weights are stored in float16 to keep the repository small.
"""

import argparse
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


CHECKPOINT_STEPS = (0, 16, 128, 512, 2048, 4096)
VOCAB_SIZE = 512
SEQUENCES, SEQUENCE_LENGTH = 16, 128
PEAK_LEARNING_RATE, WARMUP_STEPS = 3e-3, 64
SEED = 0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# One dict line a twin: model_type and the configuration that differs from the shared one.
TWINS = {
    "layernorm": ("gpt_neox", {"intermediate_size": 160}),
    "rmsnorm": ("llama", {"intermediate_size": 108}),
}
SHARED_CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def train_tokenizer(corpus: str) -> "PreTrainedTokenizerFast":
    """Byte-level BPE of `VOCAB_SIZE` tokens, trained on `corpus`; token 0 is `<|end|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def learning_rate(step: int) -> float:
    """Linear warm-up, then cosine decay to a tenth of the peak."""
    import math

    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (CHECKPOINT_STEPS[-1] - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.55 + 0.45 * math.cos(math.pi * progress))


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """One whole checkpoint folder, weights in float16."""
    import copy

    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for extra in folder.iterdir():
        if extra.name not in (*TOKENIZER_FILES, "config.json", "model.safetensors"):
            extra.unlink()


def train_twin(name: str, out: Path, corpus: str) -> None:
    """Train twin `name` and write its checkpoints below `out`; prints the loss to stderr as it goes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer(corpus)
    tokens = torch.tensor(tokenizer(corpus, verbose=False)["input_ids"])

    model_type, own_config = TWINS[name]
    set_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHARED_CONFIG, **own_config))
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    order = torch.Generator().manual_seed(SEED)

    for step in range(CHECKPOINT_STEPS[-1] + 1):
        if step in CHECKPOINT_STEPS:
            save(model, tokenizer, out / name / f"step{step}")
        if step == CHECKPOINT_STEPS[-1]:
            break
        starts = torch.randint(len(tokens) - SEQUENCE_LENGTH, (SEQUENCES,), generator=order)
        batch = torch.stack([tokens[s : s + SEQUENCE_LENGTH] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step)
        optimiser.step()
        if step % 100 == 0:
            print(f"{name} step {step}: loss {loss.item():.4f}", file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m deadbench.suite.twins",
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=sorted(TWINS), help="train one twin instead of both")
    args = parser.parse_args()
    corpus = resources.files("deadbench.suite").joinpath("data/corpus.txt").read_text(encoding="utf-8")
    for name in [args.only] if args.only else TWINS:
        train_twin(name, args.out, corpus)


if __name__ == "__main__":
    main()
