"""vLLM's CPU build in two stages on one machine: a worker that makes the buffer which vLLM makes on GPUs alone.

As a program it reads a small random Llama by torch and by vLLM in two stages, and prints both rows and both tables of
blocks, as JSON on its last line.
"""

import json
import os

import torch

from deadbench.runners.engines.vllm_worker import StreamReader


class Buffered(StreamReader):
    """With the buffer for what the stage before sends: vLLM makes it in a warm-up that its CPU build leaves out."""

    def deadbench_begin(self, *given):
        """As `StreamReader` has it."""
        runner = self.model_runner
        if runner.intermediate_tensors is None:
            model = runner.get_model()
            runner.intermediate_tensors = model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.dtype, device=torch.device("cpu")
            )
        super().deadbench_begin(*given)


def read(engine, devices, stages):
    """The tables of a read of the Llama by `engine`."""
    from deadbench.runners.doctor.small_models import LLAMA
    from deadbench.runners.jobs.build import build_jobs
    from deadbench.runners.jobs.events import Finished
    from deadbench.runners.jobs.job import Overrides
    from deadbench.runners.worker.run import run_model
    from deadbench.suite.registry.loading import load_registry, own_registry
    from deadbench.suite.scratch import Scratch

    path = own_registry()
    asked = Overrides(tokens=1024, input="tokens:random", dtype="float32", engine=engine)
    with Scratch() as folder:
        (folder / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 4}), encoding="utf-8")
        (job,) = build_jobs(load_registry(path), path, [str(folder)], None, ["random"], asked)
        events = run_model(job.over(devices, stages), "stages", 1)
        return next(event.tables for event in events if isinstance(event, Finished))


def main():
    """Both reads; torch's first, since vLLM changes its classes."""
    from deadbench.runners.engines.vllm_support import ENVIRONMENT

    by_torch = read("torch", 1, 1)
    os.environ.update(ENVIRONMENT)
    import vllm

    made = vllm.LLM

    def on_one_machine(**options):
        extension = f"{Buffered.__module__}.{Buffered.__name__}".replace("__main__", "tests.runners.engines.pipelined")
        return made(**options | {"distributed_executor_backend": "mp", "worker_extension_cls": extension})

    vllm.LLM = on_one_machine
    tables = {"torch": by_torch, "vllm": read("vllm", 2, 2)}
    rows = {engine: [each[name].to_pylist() for name in ("reads", "blocks")] for engine, each in tables.items()}
    print(json.dumps(rows, default=str))


if __name__ == "__main__":
    main()
