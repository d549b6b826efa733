"""Inputs: exactly what was asked for, padding marked, nothing silently replaced."""

import hashlib
import os
import tracemalloc
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem

from deadbench.suite.errors import InputError
from deadbench.suite.inputs import specs
from deadbench.suite.inputs import tokens as inputs_tokens
from deadbench.suite.inputs.batches import check_count
from deadbench.suite.inputs.hub_text import DatasetError, read_hub_text
from deadbench.suite.inputs.hub_text import _pieces as _documents
from deadbench.suite.inputs.specs import check_spec, content_hash
from deadbench.suite.inputs.tokens import _pieces, token_batches
from tests.conftest import TWINS

TWIN = TWINS / "layernorm" / "step0"
SETTINGS = {"vocab_size": 512, "num_tokens": 300, "sequence_length": 64, "seed": 0, "tokenizer_folder": TWIN}


def tokens(spec, **changes):
    return token_batches(spec, **(SETTINGS | {"batch_tokens": 128} | changes))


def counted(inputs):
    return sum(
        int(b.model_inputs["input_ids"].numel() if b.mask_ST is None else b.mask_ST.sum()) for b in inputs.batches
    )


@pytest.mark.parametrize("spec", ["text", "tokens:random"])
@pytest.mark.parametrize("num_tokens", [64, 300, 512])
def test_exactly_so_many_tokens(spec, num_tokens):
    inputs = tokens(spec, num_tokens=num_tokens)
    assert inputs.num_tokens == counted(inputs) == num_tokens
    for batch in inputs.batches:
        ids = batch.model_inputs["input_ids"]
        assert ids.shape[1] <= 64
        if batch.mask_ST is not None:
            assert torch.equal(batch.model_inputs["attention_mask"].bool(), batch.mask_ST)


def test_the_bundled_corpus_is_large_english_and_accounted_for():
    data = resources.files("deadbench.suite").joinpath("data")
    corpus = data.joinpath("corpus.txt").read_text(encoding="utf-8")
    assert len(corpus.encode()) > 1_000_000
    assert corpus.startswith("In the beginning God created the heaven and the earth.")
    readme = data.joinpath("README.md").read_text(encoding="utf-8")
    assert "bible-kjv-text" in readme
    for photo in data.joinpath("photos").iterdir():
        assert f"photos/{photo.name}" in readme


def test_text_is_the_corpus_tokenised():
    from transformers import AutoTokenizer

    ids = torch.cat([b.model_inputs["input_ids"].flatten() for b in tokens("text", num_tokens=128).batches])
    text = AutoTokenizer.from_pretrained(TWIN).decode(ids)
    assert text.startswith("In the beginning God created")


def test_special_tokens_go_around_every_window(minilm):
    inputs = tokens("text", tokenizer_folder=minilm, vocab_size=30522, num_tokens=128)
    ids = inputs.batches[0].model_inputs["input_ids"]
    assert (ids[:, 0] == 101).all()
    assert (ids[:, -1] == 102).all()


def test_a_token_file_is_used_exactly_as_given(tmp_path):
    array = np.random.default_rng(0).integers(0, 512, (5, 40), dtype=np.int32)
    np.save(tmp_path / "t.npy", array)
    inputs = tokens(f"tokens:{tmp_path / 't.npy'}", num_tokens=1)
    read = torch.cat([b.model_inputs["input_ids"] for b in inputs.batches])
    assert torch.equal(read, torch.from_numpy(array).long())
    assert all(b.mask_ST is None and set(b.model_inputs) == {"input_ids"} for b in inputs.batches)
    assert (inputs.num_tokens, inputs.num_distinct) == (200, len(np.unique(array)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3)), "expected an integer array"),
        (np.zeros(6, int), "expected an integer array"),
        (np.zeros((0, 3), int), "expected an integer array"),
        (np.full((2, 3), 512), "0 to 511"),
        (np.full((2, 3), -1), "0 to 511"),
    ],
)
def test_token_files_that_do_not_fit(array, message, tmp_path):
    np.save(tmp_path / "t.npy", array)
    with pytest.raises(InputError, match=message):
        tokens(f"tokens:{tmp_path / 't.npy'}")


def test_pickled_token_files_are_refused(tmp_path):
    np.save(tmp_path / "t.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not a .npy array"):
        tokens(f"tokens:{tmp_path / 't.npy'}")


def test_without_a_tokenizer_text_is_refused_and_nothing_replaces_it(tmp_path):
    with pytest.raises(InputError, match="needs the model's tokenizer.*tokens:random"):
        tokens("text", tokenizer_folder=tmp_path)
    with pytest.raises(InputError, match="needs the model's tokenizer"):
        tokens("text", tokenizer_folder=None)


def test_another_models_tokenizer_is_noticed(minilm):
    with pytest.raises(InputError, match="not this model's tokenizer"):
        tokens("text", tokenizer_folder=minilm, vocab_size=100)


def test_too_little_text(tmp_path):
    (tmp_path / "short.txt").write_text("In the beginning\n")
    with pytest.raises(InputError, match="has only .* of the 300 tokens asked for"):
        tokens(f"text:{tmp_path / 'short.txt'}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        tokens(f"text:{tmp_path / 'latin.txt'}")


@pytest.mark.parametrize("avoided", [(), (3,), (3, 4, 511), tuple(range(511))])
def test_random_tokens_avoid_ids_that_stand_for_something_else(avoided):
    inputs = tokens("tokens:random", num_tokens=5120, avoided_ids=avoided)
    ids = torch.cat([b.model_inputs["input_ids"].flatten() for b in inputs.batches])
    assert not np.isin(ids.numpy(), avoided).any()
    assert (ids >= 0).all()
    assert (ids < 512).all()


def test_random_tokens_follow_the_seed():
    first, again, other = (tokens("tokens:random", seed=s).batches[0].model_inputs["input_ids"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("spec", "modality", "message"),
    [
        ("txt", "text", "is unknown; choose text, text:FILE"),
        ("tokens", "text", "is unknown"),
        ("tokens:none.npy", "text", "no such file"),
        ("text:none.txt", "text", "no such file"),
        ("image:none", "image", "no such directory"),
        ("image", "text", "does not fit a model that reads text"),
        ("text", "image", "does not fit a model that reads image"),
        ("audio", "audio", "is unknown"),
        ("audio:x.wav", "audio", "is unknown; .* or audio:noise"),
        ("text", "audio", "does not fit a model that reads audio"),
        ("hf:wikitext", "text", "'hf:wikitext': a dataset of the Hub is OWNER/NAME; give hf:OWNER/NAME"),
        ("hf:a/b/c:en", "text", "is OWNER/NAME"),
    ],
)
def test_specifications_are_checked_before_anything_runs(spec, modality, message):
    with pytest.raises(InputError, match=message):
        check_spec(spec, modality)


def test_too_few_tokens_are_refused():
    check_count(65, 64)
    with pytest.raises(InputError, match="64 tokens for hidden size 64.*at least 256"):
        check_count(64, 64)


def test_content_counts_not_names(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("one")
    b.write_text("one")
    assert content_hash(f"text:{a}") == content_hash(f"text:{b}")
    before = content_hash(f"text:{a}")
    a.write_text("two")
    assert content_hash(f"text:{a}") != before
    assert content_hash("text") != content_hash("image") != content_hash("tokens:random")


def test_the_hash_of_a_file_is_that_of_its_bytes_and_none_of_it_is_held(tmp_path):
    path = tmp_path / "ids.npy"
    path.write_bytes(bytes(range(256)) * 40_000)  # more than two pieces
    whole = hashlib.sha256(b"tokens" + path.read_bytes()).hexdigest()[:16]
    tracemalloc.start()
    try:
        assert content_hash(f"tokens:{path}") == whole
        assert tracemalloc.get_traced_memory()[1] < 9_000_000  # of 10 240 000 bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["tokens", "text"])
def test_files_of_no_end_are_one_line(kind, tmp_path):
    sparse, fifo = tmp_path / "sparse", tmp_path / "fifo"
    with sparse.open("wb") as file:
        file.truncate(50_000_000_000)
    os.mkfifo(fifo)
    for path, message in (
        *([(sparse, "more than 1,073,741,824 bytes")] if kind == "tokens" else []),
        (fifo, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (Path("/proc/self/mem"), "Input/output error"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(InputError, match=rf"^input '{kind}:{path}': {path} cannot be read \({message}\)$"):
            content_hash(f"{kind}:{path}")


def test_of_a_long_text_the_beginning_counts_and_is_read(tmp_path, monkeypatch):
    text = "".join(f"{number} é\r\n" for number in range(2_000))
    whole, longer, other = tmp_path / "whole", tmp_path / "longer", tmp_path / "other"
    for most in (9_001, 9_002, 9_003):  # one of them within a letter
        monkeypatch.setattr(specs, "MOST_TEXT_BYTES", most)
        monkeypatch.setattr(inputs_tokens, "MOST_TEXT_BYTES", most)
        whole.write_bytes(text.encode()[:most])
        longer.write_bytes(text.encode())
        other.write_bytes(b"x" + text.encode())
        assert content_hash(f"text:{longer}") == content_hash(f"text:{whole}") != content_hash(f"text:{other}")
        head = text.encode()[:most].decode(errors="ignore").replace("\r\n", "\n")
        read = "".join(_pieces(f"text:{longer}")).rstrip("\n")
        assert head.startswith(read)
        assert "\n" not in head[len(read) :].strip(), "all but the line within which it is cut"
    whole.write_bytes("aé".encode()[:2])
    with pytest.raises(InputError, match="unexpected end of data"):
        list(_pieces(f"text:{whole}"))


def test_fifty_gigabytes_of_text_cost_what_their_beginning_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(specs, "MOST_TEXT_BYTES", 1_000_000)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(50_000_000_000)
    assert content_hash(f"text:{tmp_path / 'sparse'}") == hashlib.sha256(b"text" + bytes(1_000_000)).hexdigest()[:16]


def test_a_line_without_an_end_is_cut_and_lines_of_any_length_stay_what_they_were(tmp_path):
    path, lines = tmp_path / "a.txt", ["x" * length + "\n" for length in (99_990, 8, 1, 250_000, 5, 60_000, 50_000)]
    path.write_text("".join(lines))
    with path.open() as file:
        whole = ["".join(piece) for piece in iter(lambda: file.readlines(100_000), [])]
    assert list(_pieces(f"text:{path}")) == whole
    path.write_text("y" * 2_500_000)
    assert [len(piece) for piece in _pieces(f"text:{path}")] == [1_000_000, 1_000_000, 500_000]


def hub(tmp_path: Path) -> DirFileSystem:
    for name, texts in (("en/train", ["one", "two"]), ("en/test", ["three"]), ("de/train", ["vier"])):
        path = tmp_path / "datasets/org/data" / f"{name}-0.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path)
    pq.write_table(pa.table({"id": [1]}), tmp_path / "datasets/org/data/numbers-train.parquet")
    return DirFileSystem(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "text"),
    [("org/data:en", "one\ntwo\n"), ("org/data:en:test", "three\n"), ("org/data:de", "vier\n")],
)
def test_hub_datasets_by_configuration_and_split(spec, text, tmp_path):
    assert "".join(read_hub_text(spec, hub(tmp_path))) == text


def test_hub_datasets_that_cannot_be_read(tmp_path):
    with pytest.raises(DatasetError, match="no parquet files"):
        list(read_hub_text("org/data:fr", hub(tmp_path)))
    with pytest.raises(DatasetError, match="no text column; its columns: id"):
        list(read_hub_text("org/data", hub_numbers(tmp_path)))


def hub_numbers(tmp_path):
    folder = tmp_path / "only/datasets/org/data"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"id": [1]}), folder / "train.parquet")
    return DirFileSystem(str(tmp_path / "only"))


def shared(value, count, kind=None):
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([value], kind))


@pytest.mark.parametrize("encoding", ["dictionary", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_a_text_that_a_thousand_rows_share_is_held_once_and_long_ones_come_in_pieces(tmp_path, monkeypatch, encoding):
    path = tmp_path / "datasets/org/long/train.parquet"
    path.parent.mkdir(parents=True)
    text = "In the beginning " * 300_000
    how = {} if encoding == "dictionary" else {"use_dictionary": False, "column_encoding": {"text": encoding}}
    rows = 1000 if encoding == "dictionary" else 4
    column = shared(text, rows).cast(pa.string()) if how else shared(text, rows)
    pq.write_table(pa.table({"text": column}), path, compression="zstd", store_schema=False, **how)
    before, pieces = pa.total_allocated_bytes(), []
    for piece in read_hub_text("org/long", DirFileSystem(str(tmp_path))):
        pieces.append(piece)
        assert pa.total_allocated_bytes() - before < (5 if encoding == "dictionary" else 10) * len(text)
        if len(pieces) == 3:
            break
    assert "".join(pieces).startswith(f"{text}\n{text}\n")
    assert all(len(piece) <= 2**25 for piece in pieces)


@pytest.mark.parametrize("lengths", [[0], [5, 0, 7], [2**24], [2**24 + 5, 3], [3, 2**25 + 1, 4, 2**24, 6]])
def test_pieces_are_the_documents_one_below_another(lengths):
    texts = [chr(ord("a") + place) * length for place, length in enumerate(lengths)]
    pieces = list(_documents(iter([*texts, None])))
    assert all(len(piece) <= 2 * 2**24 + len(lengths) for piece in pieces)
    assert "".join(pieces).replace("\n", "") == "".join(texts)
    if sum(lengths) <= 2**24:
        assert pieces == ["\n".join(text for text in texts if text) + "\n"]
