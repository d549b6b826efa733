"""The process in which configurations of extraordinary size are tried: a line of JSON in, a line out.

It has no network, and so much CPU time for each; the one who asks ends it when it takes too much memory. That is
watched and not refused: what is refused an allocation may go another way, which where nothing is refused is not gone.
"""

import json
import os
import resource
import sys


def serve(cpu_seconds: int) -> None:
    """Answer until there are no more questions: null, or why a configuration cannot be built."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # for what libraries print
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
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
        _limit(cpu_seconds)
        answer: str | None = None
        try:
            with nothing_fetched():
                config = build_config(json.loads(line))
                build_published(config, "meta")
                locate_final_norm(config)
        except Exception as error:
            answer = one_line(error)
        print(json.dumps(answer), file=answers, flush=True)


def _limit(cpu_seconds: int) -> None:
    """The limit of the next trial, counted from here."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
