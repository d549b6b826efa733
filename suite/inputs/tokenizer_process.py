"""The process in which a stranger's tokenizer.json is tried: it loads the file, and encodes texts given as JSON.

It says first that it is there, then null, or what the library, which is Rust, panicked of. An ordinary error is not
told: who loads the file next gets it too. Where there is no answer, the file has ended the process.
"""

import json
import os
import sys

from deadbench.suite.architectures.watched import limit_cpu


def serve(path: str, cpu_seconds: int) -> None:
    """Answer once."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what libraries print
    from tokenizers import Tokenizer

    print("null", file=answers, flush=True)  # ready
    texts = json.loads(sys.stdin.readline())
    limit_cpu(cpu_seconds)
    panic: str | None = None
    try:
        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_truncation()  # as transformers uses it
        tokenizer.no_padding()
        for text in texts:
            tokenizer.encode(text, add_special_tokens=len(text) <= 1)
    except Exception:
        pass
    except BaseException as error:
        panic = str(error)[:1000]
    print(json.dumps(panic), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
