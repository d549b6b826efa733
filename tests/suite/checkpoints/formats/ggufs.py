"""GGUF files as llama.cpp's converter writes them."""

import struct

import numpy as np

TYPES = {"F32": (0, "<f4"), "F16": (1, "<f2"), "BF16": (30, "<u2"), "Q8_0": (8, "packed"), "Q4_0": (2, "packed")}


def q8_0(values):
    """The blocks of Q8_0, and the values that they stand for."""
    wide = np.asarray(values, "<f4").reshape(-1, 32)
    scales = (np.abs(wide).max(1, keepdims=True) / 127).astype("<f2")
    whole = np.rint(wide / np.maximum(scales.astype("f4"), 1e-9)).clip(-127, 127).astype("i1")
    packed = np.concatenate([scales.view("u1").reshape(-1, 2), whole.view("u1")], 1)
    return packed.tobytes(), (scales.astype("f4") * whole).reshape(values.shape)


def q4_0(values):
    """The same of Q4_0: 16 bytes, of which the lower halves are the first 16 integers."""
    wide = np.asarray(values, "<f4").reshape(-1, 32)
    scales = (np.abs(wide).max(1, keepdims=True) / 7).astype("<f2")
    whole = (np.rint(wide / np.maximum(scales.astype("f4"), 1e-9)).clip(-8, 7) + 8).astype("u1")
    packed = np.concatenate([scales.view("u1").reshape(-1, 2), whole[:, :16] | whole[:, 16:] << 4], 1)
    return packed.tobytes(), (scales.astype("f4") * (whole.astype("f4") - 8)).reshape(values.shape)


PACKED = {8: q8_0, 2: q4_0}


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value_of(value):
    """A value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    kind, items = 8, b"".join(map(text, value)) if isinstance(value[0], str) else b""
    if not items:
        kind, items = 5, struct.pack(f"<{len(value)}i", *value)
    return struct.pack("<IIQ", 9, kind, len(value)) + items


def gguf(facts, tensors, types=None, alignment=32, version=3):
    """The bytes of a GGUF; `types` are the stored types of the tensors that are not float32."""
    infos, data = b"", b""
    for name, values in tensors.items():
        kind, form = TYPES[(types or {}).get(name, "F32")]
        data += b"\0" * (-len(data) % alignment)
        axes = struct.pack(f"<{values.ndim}Q", *values.shape[::-1])
        infos += text(name) + struct.pack("<I", values.ndim) + axes + struct.pack("<IQ", kind, len(data))
        if form == "packed":
            data += PACKED[kind](values)[0]
            continue
        wide = np.asarray(values, "<f4")
        data += (wide.view("<u4") >> 16).astype("<u2").tobytes() if form == "<u2" else wide.astype(form).tobytes()
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(facts))
    head += b"".join(text(key) + value_of(value) for key, value in facts.items()) + infos
    return head + b"\0" * (-len(head) % alignment) + data


def llama_like(architecture, width, blocks, eps_key, further=None):
    """Metadata of a model, with a vocabulary as large as real ones beside them."""
    return {
        "general.architecture": architecture,
        "general.name": "a model",
        f"{architecture}.block_count": blocks,
        f"{architecture}.embedding_length": width,
        f"{architecture}.attention.head_count": 2,
        f"{architecture}.attention.head_count_kv": 2,
        f"{architecture}.feed_forward_length": 4 * width,
        f"{architecture}.{eps_key}": 1e-5,
        "tokenizer.ggml.tokens": [f"token {n}" for n in range(2000)],
        "tokenizer.ggml.token_type": [1] * 2000,
        "tokenizer.ggml.add_bos_token": True,
        **(further or {}),
    }
