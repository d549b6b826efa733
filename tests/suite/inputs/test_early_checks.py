"""What a configuration and file names tell of an input: right, wrong, and nothing, which refuses nothing."""

import numpy as np
import pytest

from deadbench.suite.errors import InputError
from deadbench.suite.inputs.early_checks import check_config, check_text, open_ids
from deadbench.suite.inputs.specs import MODALITIES

GPT2 = {"model_type": "gpt2", "vocab_size": 256, "n_positions": 64}
LLAMA = {"model_type": "llama", "vocab_size": 256, "max_position_embeddings": 64}
ROBERTA = {"model_type": "roberta", "vocab_size": 256, "max_position_embeddings": 66}
VIT = {"model_type": "vit", "image_size": 32, "patch_size": 8, "encoder_stride": 16}
CLIP = {"model_type": "clip", "text_config": {"vocab_size": 99}, "vision_config": {"image_size": 32}}
MAMBA = {"model_type": "mamba", "conv_kernel": 4}
WHISPER = {"model_type": "whisper", "vocab_size": 99, "num_mel_bins": 80, "max_target_positions": 448}


def checked(spec, config, names):
    check_config(spec, MODALITIES[spec.partition(":")[0]][0], config, names)


@pytest.fixture
def ids(tmp_path):
    def saved(length=64, highest=255):
        np.save(tmp_path / "ids.npy", np.full((4, length), highest))
        return f"tokens:{tmp_path / 'ids.npy'}"

    return saved


@pytest.mark.parametrize(
    ("spec", "config", "names", "message"),
    [
        ("text", GPT2, ["model.safetensors"], "needs the model's tokenizer, and there is none; give --input tokens"),
        ("hf:org/texts", GPT2, [], "needs the model's tokenizer"),
        ("text", VIT, None, "is text, and vit takes none; give --input image"),
        ("tokens:random", VIT, [], "is text, and vit takes none; give --input image"),
        ("image", GPT2, None, "is image, and gpt2 takes text"),
        ("audio:noise", LLAMA, None, "is audio, and llama takes text"),
    ],
)
def test_what_does_not_fit_is_one_line(spec, config, names, message):
    with pytest.raises(InputError, match=message):
        checked(spec, config, names)


@pytest.mark.parametrize(
    ("spec", "config", "names"),
    [
        ("text", GPT2, None),
        ("text", GPT2, ["tokenizer_config.json"]),  # of bytes, without a vocabulary
        ("text", GPT2, ["vocab.json"]),
        ("tokens:random", GPT2, []),
        ("text", CLIP, None),
        ("image", CLIP, None),
        ("image", VIT, []),
        ("tokens:random", MAMBA, None),
        ("audio:noise", WHISPER, []),
        ("text", WHISPER, ["vocab.json"]),
        ("image", {"model_type": "mine"}, []),
        ("text", {}, None),
    ],
)
def test_what_fits_or_cannot_be_told_is_let_pass(spec, config, names):
    checked(spec, config, names)


def test_sequences_longer_than_a_table_of_positions(ids):
    for config in (GPT2, ROBERTA):
        checked(ids(64), config, [])
        with pytest.raises(InputError, match="65 tokens a sequence, and the model has 64 positions"):
            checked(ids(65), config, [])
    checked(ids(100), LLAMA, [])  # rotary positions have no end


def test_ids_beyond_the_vocabulary(ids):
    with pytest.raises(InputError, match=r"ids.npy: token ids 256 to 256, the model knows 0 to 255"):
        checked(ids(10, 256), LLAMA, [])
    with pytest.raises(InputError, match="the model knows 0 to 98"):
        checked(ids(10, 99), CLIP | {"vocab_size": 1000}, [])


def test_files_that_are_no_arrays_of_ids(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.arange(10))
    for name, shape in (("open", "((((((((,"), ("deep", "(" * 4000), ("text", "'''"), ("huge", "9" * 5000)):
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}\n".encode()
        (tmp_path / f"{name}.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    for name, message in (
        ("train.bin", r"not a \.npy array; .*numpy.fromfile\('.*train.bin', 'uint16'\).reshape"),
        ("objects.npy", "not a .npy array"),
        ("flat.npy", "shape"),
        *((f"{name}.npy", "not a .npy array of integers") for name in ("open", "deep", "text", "huge")),
    ):
        with pytest.raises(InputError, match=message) as caught:
            open_ids(tmp_path / name)
        assert "pickle" not in str(caught.value)
        assert name in str(caught.value)


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "text"
    for content, message in (
        (
            np.arange(100, dtype=np.uint16).tobytes(),
            "not text .a zero at byte 0.; token ids are given as tokens",
        ),
        ("naïve".encode("latin-1"), "not UTF-8 text .invalid continuation byte at byte 2."),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            checked(f"text:{path}", GPT2, ["vocab.json"])
    path.write_bytes(b"a" + "é".encode() * 600_000)  # of which the first megabyte ends within a letter
    check_text(path)
