"""Whether the Hub answers, from where checkpoints would be asked for."""

import queue
import threading

from deadbench.runners.doctor.node_checks import NotHereError
from deadbench.suite.errors import first_line
from deadbench.suite.secrets import shown_place

_SECONDS = 3.0  # for all of it: the name, the connection, the answer's head


def hub() -> str:
    """The Hub, or the mirror that HF_ENDPOINT names, answers.

    Raises:
        NotHereError: HF_HUB_OFFLINE is set, and nobody asks it; or it does not answer in time, or says that it cannot,
            which is no fault of a machine that reads local checkpoints.
    """
    from huggingface_hub import constants

    place = shown_place(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        raise NotHereError(f"HF_HUB_OFFLINE is set: {place} is not asked, and checkpoints are those of the cache")
    said: queue.Queue[int | Exception] = queue.Queue()
    # A thread of its own, which nobody waits for: no library has a limit for the look-up of a name.
    threading.Thread(target=_ask, args=(constants.ENDPOINT, said), name="hub", daemon=True).start()
    todo = "only local and cached checkpoints can be read; HF_ENDPOINT names a mirror"
    try:
        answer = said.get(timeout=_SECONDS)
    except queue.Empty:
        raise NotHereError(f"{place} does not answer within {_SECONDS:g} s; {todo}") from None
    if isinstance(answer, Exception):
        raise NotHereError(f"{place} does not answer ({first_line(answer)[:100]}); {todo}")
    if answer >= 500 or answer == 407:  # the latter is a proxy's
        raise NotHereError(f"{place} answers with {answer}; {todo}")
    return f"{place} answers"


def _ask(url: str, said: "queue.Queue[int | Exception]") -> None:
    from deadbench.suite.checkpoints.http_client import client, within

    try:
        with within(_SECONDS), client().stream("GET", url, timeout=_SECONDS) as answer:
            said.put(answer.status_code)
    except Exception as error:
        said.put(error)
