"""The reads of `tests/test_same_rows.py`: small, whole, in this process, with all that decides their bits fixed.

Six tiny architectures with weights and scales of fixed seeds, two checkpoints of both bundled twins, and MiniLM.
"""

import hashlib
import platform
import struct
from contextlib import contextmanager

import numpy as np
import torch
import transformers

from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.worker.run import run_model
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT

THREADS = 1  # of torch: the order of a sum depends on them
LONG = 24  # a list of more numbers is kept by its hash and its ends
ENDS = 4
# What says when, where and from what a row was made, and not what was measured.
LEFT_OUT = (
    "run_id", "source", "source_fingerprint", "source_format", "source_step", "versions", "started_at",
    "finished_at", "load_seconds", "forward_seconds", "spectrum_seconds", "peak_device_bytes", "peak_host_bytes",
)  # fmt: skip
TEXT = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 64}  # fmt: skip
# By model: (model type, the published class, its configuration, dtype of the stored weights).
TINY = {
    "gpt2": ("gpt2", "GPT2LMHeadModel", {"vocab_size": 97, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
                                         "bos_token_id": 0, "eos_token_id": 0}, torch.float32),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", TEXT | {"bos_token_id": 0, "eos_token_id": 0}, torch.float32),
    "llama": ("llama", "LlamaForCausalLM", TEXT | {"num_key_value_heads": 1}, torch.bfloat16),
    "bert": ("bert", "BertForMaskedLM", TEXT, torch.float32),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", TEXT | {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 0},
              torch.float32),
    "vit": ("vit", "ViTForImageClassification", {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 48, "image_size": 32, "patch_size": 8, "num_labels": 7}, torch.float32),
}  # fmt: skip
TWINS = ("twin-layernorm", "twin-rmsnorm")
CHECKPOINTS = ("step16", "step4096")
CASES = (*TINY, *TWINS, "minilm")


def rows_of(case, folder, minilm):
    """{table: {column: [one value a row]}} of every read of `case`; `folder` is for what has to be written."""
    with _fixed_threads():
        jobs = _twin_jobs(case) if case in TWINS else _minilm_jobs(folder, minilm)
        if case in TINY:
            _save(case, folder / case)
            jobs = _tiny_jobs(case, folder)
        tables = [event for job in jobs for event in run_model(job, "run", 1) if isinstance(event, Finished)]
    rows = {}
    for event in tables:
        assert event.row["status"] == "ok", f"{event.job.label()}: {event.row['error']}"
        for name, table in event.tables.items():
            columns = rows.setdefault(name, {})
            for column in table.column_names:
                if column not in LEFT_OUT:
                    columns.setdefault(column, []).extend(map(_packed, table[column].to_pylist()))
    return rows


def machine():
    """What the last bit of a row depends on beside the code."""
    with _fixed_threads():
        generator = torch.Generator().manual_seed(0)
        acts_ND = torch.randn(257, 129, generator=generator)
        gram_DD = acts_ND.T @ acts_ND
        values_D, vectors_DD = torch.linalg.eigh(gram_DD.double())
        norm_ND = torch.nn.functional.layer_norm(acts_ND, (129,))
        singular_D = np.linalg.svd(acts_ND[:8].double().numpy(), compute_uv=False)  # numpy's own BLAS, at such sizes
        results = [each.numpy() for each in (gram_DD, values_D, vectors_DD, norm_ND)]
        results += [singular_D, np.exp(singular_D)]
    return {
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": THREADS,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": transformers.__version__,
        "arithmetic": hashlib.sha256(b"".join(each.tobytes() for each in results)).hexdigest(),
    }


@contextmanager
def _fixed_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _packed(value):
    numbers = isinstance(value, list) and len(value) > LONG and all(isinstance(each, float) for each in value)
    if not numbers:
        return value
    digest = hashlib.sha256(struct.pack(f"<{len(value)}d", *value)).hexdigest()
    return {"length": len(value), "sha256": digest, "first": value[:ENDS], "last": value[-ENDS:]}


def _save(case, folder):
    model_type, published, settings, dtype = TINY[case]
    seed = list(TINY).index(case)
    torch.manual_seed(seed)
    model = getattr(transformers, published)(transformers.AutoConfig.for_model(model_type, **settings))
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.weight.mul_(torch.empty_like(module.weight).uniform_(0.3, 2.0, generator=generator))
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_(0, 0.5, generator=generator)
    model.to(dtype).save_pretrained(folder)


def _jobs(folder, models, names, reads, **overrides):
    path = folder / "models.yaml"
    path.write_text(
        f"protocols: {{standard: {{tokens: 512, sequence_length: 32}}}}\nsuites: {{}}\nmodels:\n{models}", "utf-8"
    )
    return build_jobs(load_registry(path), path, names, None, list(reads), Overrides(**overrides))


def _tiny_jobs(case, folder):
    what = "modality: image" if case == "vit" else "input: 'tokens:random'"
    reads = ("parameters", "random", "trained", "functional")
    return _jobs(folder, f"  - {{id: {case}, source: {case}, {what}}}\n", [case], reads)


def _minilm_jobs(folder, minilm):
    model = f"  - {{id: minilm, source: {minilm}}}\n"
    return _jobs(folder, model, ["minilm"], ("parameters", "trained"), tokens=1024)


def _twin_jobs(case):
    path = ROOT / "models.yaml"
    (job,) = build_jobs(load_registry(path), path, [case], "quick", None, Overrides())
    left = [each.identity() for each in job.reads if each.revision not in CHECKPOINTS]
    return [job.without(left)]
