"""The process in which configurations of extraordinary size are tried: a line of JSON in, a line out.

It has no network, and so much CPU time for each; the one who asks ends it when it takes too much memory.
"""

import gc
import json
import os
import sys

from deadbench.suite.architectures.watched import limit_cpu


def serve(cpu_seconds: int) -> None:
    """Answer until there are no more questions: null, or why a configuration cannot be built."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # for what libraries print
    import transformers

    from deadbench.suite.architectures import trial
    from deadbench.suite.architectures.build import build_config, build_published
    from deadbench.suite.architectures.locate import locate_final_norm
    from deadbench.suite.architectures.no_network import nothing_fetched
    from deadbench.suite.errors import one_line

    trial.is_the_trial = True
    assert transformers.AutoModel is not None  # imported, which no trial is to pay for
    print("null", file=answers, flush=True)  # ready
    for line in sys.stdin:
        limit_cpu(cpu_seconds)
        answer: str | None = None
        try:
            with nothing_fetched():
                config = build_config(json.loads(line))
                build_published(config, "meta")
                locate_final_norm(config)
        except Exception as error:
            answer = one_line(error)
        gc.collect()  # a model's modules refer to each other
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
