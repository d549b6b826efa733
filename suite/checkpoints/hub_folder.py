"""A repository of the Hub as a folder of files behind HTTP."""

import json
import re
import urllib.parse
from collections.abc import Callable

import httpx2

from deadbench.suite.checkpoints.http_folder import HttpFolder
from deadbench.suite.checkpoints.http_requests import Requests, T
from deadbench.suite.errors import CheckpointError, UnreachableError
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import is_hidden

_MAX_API_BYTES = 64_000_000


class _NotOnHubError(FileNotFoundError):
    """The Hub knows: there is no such repository, or no such revision."""


class _HubRequests(Requests):
    """Requests to the Hub, which says in a header what a status means."""

    def __init__(self, source: str, page: str, revision: str):
        from huggingface_hub.utils._headers import build_hf_headers

        super().__init__(page, build_hf_headers(library_name="deadbench"))
        self._source, self._page, self._revision = shown_place(source), page, revision

    def ask(
        self, url: str, called: str, headers: Callable[[], dict[str, str]], take: Callable[[httpx2.Response], T]
    ) -> T:
        """What `take` makes of an answer of the Hub's; none is asked for where HF_HUB_OFFLINE is set."""
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise UnreachableError(f"{called}: HF_HUB_OFFLINE is set and the file is not in the cache")
        return super().ask(url, called, headers, take)

    def missing(self, answer: httpx2.Response, called: str) -> FileNotFoundError:
        """What a 404 means."""
        told = answer.headers.get("X-Error-Code")
        if told == "RepoNotFound":
            return _NotOnHubError(f"{self._source}: no such repository on the Hub")
        if told == "RevisionNotFound":
            return _NotOnHubError(f"{self._source}: the repository has no revision {self._revision!r}")
        return super().missing(answer, called)

    def denied(self, answer: httpx2.Response, called: str) -> CheckpointError:
        """What a 401 or 403 means."""
        code, status = answer.headers.get("X-Error-Code"), answer.status_code
        if code == "RepoNotFound":  # what the Hub answers to who is not logged in
            text = f"no such repository on the Hub, or it is private and HF_TOKEN is not set ({status})"
            return CheckpointError(f"{self._source}: {text}")
        token = "check that HF_TOKEN may read it" if "authorization" in self.headers else "set HF_TOKEN"
        return CheckpointError(f"{called}: gated or private ({status}): accept its licence on {self._page} and {token}")

    def token_advice(self) -> str:
        """What would raise the limit of requests."""
        return "" if "authorization" in self.headers else ", or set HF_TOKEN for a higher limit"


class HubFolder(HttpFolder):
    """The files of a Hub repository at a revision; with the Hub's own HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE."""

    lists = True

    def __init__(self, source: str, repository: str, revision: str):
        """Open `repository` at `revision`."""
        from huggingface_hub import constants

        page, quoted = f"{constants.ENDPOINT}/{repository}", urllib.parse.quote(revision, safe="")
        self._page, self._moving = page, f"{page}/resolve/{quoted}"
        super().__init__(source, self._moving, _HubRequests(source, page, revision))
        self._api = f"{constants.ENDPOINT}/api/models/{repository}/revision/{quoted}"

    def names(self) -> list[str]:
        """Names of the files, as the Hub lists them; a mirror without the Hub's API is asked for known names."""
        try:
            answer = self._requests.ask(
                self._api, self.source, dict, lambda each: self._requests.body_of(each, _MAX_API_BYTES)
            )
            listing = json.loads(answer)
            commit = listing.get("sha")
            if isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{40}", commit):
                self.commit = commit
                self._pin(f"{self._page}/resolve/{commit}")  # a branch may move on meanwhile
            listed = (f["rfilename"] for f in listing["siblings"])
            return sorted(name for name in listed if "/" not in name and not is_hidden(name))
        except _NotOnHubError as error:
            raise CheckpointError(str(error)) from error
        except CheckpointError:
            raise
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            pass  # no such API here, or another one
        names = super().names()
        if not names:
            raise CheckpointError(f"{self.source}: no such repository on the Hub, or no such revision")
        return names

    def _head(self, name: str) -> bytes:
        """As everywhere; a mirror may list commits and not know them as addresses."""
        try:
            return super()._head(name)
        except FileNotFoundError:
            if not self._pinned:
                raise
            pinned = self.url
            self._pin(self._moving)
            try:
                return super()._head(name)
            except FileNotFoundError:
                self._pin(pinned)
                raise

    def _pin(self, url: str) -> None:
        self.url, self._pinned = url, url != self._moving
