"""Ray's client of jobs, for an address that may be anybody's: an answer has its time, its size and its place.

Ray's own waits without an end for a dashboard that is silent, and holds whatever it sends.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

_SECONDS = 15.0  # for one answer
_ANSWER_BYTES = 2**25  # thousands of jobs with their environments
_PIECE_BYTES = 2**16

T = TypeVar("T")


class AnswerError(Exception):
    """An answer that no dashboard of Ray's gives; one line."""


@cache
def client_class() -> type:
    """The class, made when Ray is first needed."""
    from ray.job_submission import JobSubmissionClient

    class BoundedClient(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            bounds = {"timeout": _SECONDS, "stream": True, "hooks": {"response": _taken}}
            ask = super()._do_request
            return in_time(lambda: ask(method, endpoint, **(options | bounds)), _SECONDS)

    return BoundedClient


def _taken(answer: Any, *_: Any, **__: Any) -> None:
    """Read an answer of requests' as far as one may go."""
    if answer.is_redirect:
        answer.close()
        raise AnswerError(f"it sends to {answer.headers.get('Location')}; give the address itself")
    pieces, received = list[bytes](), 0
    for piece in answer.iter_content(_PIECE_BYTES):
        pieces.append(piece)
        received += len(piece)
        if received > _ANSWER_BYTES:
            answer.close()
            raise AnswerError(f"an answer of more than {_ANSWER_BYTES:,} bytes")
    answer._content = b"".join(pieces)


def in_time(call: Callable[[], T], seconds: float) -> T:
    """What `call` returns or raises; AnswerError where it takes longer, and goes on in a thread of its own."""
    ended = list[Callable[[], T]]()

    def run() -> None:
        try:
            value = call()
            ended.append(lambda: value)
        except BaseException as error:
            raised = error
            ended.append(lambda: _raise(raised))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise AnswerError(f"no answer within {seconds:.0f} s")
    return ended[0]()


def _raise(error: BaseException) -> Any:
    raise error
