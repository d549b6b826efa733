"""What repeats is no sample: a read of it gives no count of dead directions, it says so."""

import numpy as np
import pytest
from PIL import Image

from tests.conftest import TWINS, save_tiny
from tests.runners.worker.test_run import reads

D = 32
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 0, "eos_token_id": 0, "vocab_size": 99,
    "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 64,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 99, "hidden_size": D,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
VIT = {
    "model_type": "vit", "architectures": ["ViTModel"], "hidden_size": D, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 32, "intermediate_size": 64, "patch_size": 8,
}  # fmt: skip
COUNTS = ("num_dead_1e6", "num_algebraic", "num_learned")


def read(source, spec, **overrides):
    rows, _ = reads(source, "random", input=spec, **overrides)
    return rows[None, "random"]


def tokens(folder, ids):
    np.save(folder / "ids.npy", ids)
    return f"tokens:{folder / 'ids.npy'}"


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_one_prompt_many_times(config, tmp_path):
    source, rng = save_tiny(tmp_path / "model", config), np.random.default_rng(0)
    row = read(source, tokens(tmp_path, np.repeat(rng.integers(3, 99, (1, 16)), 40, 0)))
    assert row["status"] == "failed"
    assert row["error"].startswith("only 16 of 640 rows differ, for hidden size 32: the rank would be the input's")
    assert [row[name] for name in (*COUNTS, "depth")] == [None] * 4
    row = read(source, tokens(tmp_path, rng.integers(3, 99, (40, 16))))
    assert [row[name] for name in COUNTS] == [config is GPT2, config is GPT2, 0]


def test_sequences_of_one_token(tmp_path):
    source = save_tiny(tmp_path / "model", GPT2)
    assert "only 20 of 400 rows differ" in read(source, tokens(tmp_path, np.arange(400)[:, None] % 20))["error"]
    row = read(source, tokens(tmp_path, np.arange(140)[:, None] % 99))
    assert [row[name] for name in COUNTS] == [1, 1, 0]


@pytest.mark.parametrize("size", [1, 3])
def test_what_only_the_rows_tell(size, tmp_path, monkeypatch):
    """One id all along is the same in every context of a model without absolute positions; batches change nothing."""
    from deadbench.runners.worker import forward

    monkeypatch.setattr(forward, "BATCH_TOKENS", size * 16)
    source = save_tiny(tmp_path / "model", LLAMA)
    row = read(source, tokens(tmp_path, np.arange(3, 23)[:, None] + np.zeros((1, 16), int)), dtype="float32")
    assert "of 320 rows differ, for hidden size 32" in row["error"]


@pytest.mark.parametrize(
    ("text", "right"),
    [("The cat sat on the mat and looked at the dog. ", True), ("a", False)],
    ids=["a sentence, in many contexts", "a letter"],
)
def test_repeated_text(text, right, tmp_path):
    (tmp_path / "text.txt").write_text(text * (60_000 // len(text)))
    row = read(TWINS / "layernorm/step4096", f"text:{tmp_path / 'text.txt'}", dtype="float32")
    if right:
        assert [row[name] for name in COUNTS] == [1, 1, 0]
    else:
        assert "of 512 rows differ, for hidden size 64" in row["error"]


def test_pictures(tmp_path):
    source = save_tiny(tmp_path / "model", VIT)
    rng = np.random.default_rng(0)
    for name, picture in {
        "blank": np.full((64, 64, 3), 255, np.uint8),
        "grey": np.repeat(rng.integers(0, 256, (64, 64, 1), dtype=np.uint8), 3, 2),
    }.items():
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(np.roll(picture, number, 0)).save(tmp_path / name / f"{number}.png")
    row = read(source, f"image:{tmp_path / 'blank'}")
    assert row["error"].startswith("only 17 of 272 rows differ, for hidden size 32")
    row = read(source, f"image:{tmp_path / 'grey'}")
    assert [row[name] for name in COUNTS] == [1, 1, 0], "equal channels are still different rows"
