"""A repository of the Hub as a folder of files behind HTTP."""

import json
import urllib.parse

import httpx2

from deadbench.suite.checkpoints.http_folder import HttpFolder
from deadbench.suite.checkpoints.http_requests import body_of
from deadbench.suite.errors import CheckpointError

_MAX_API_BYTES = 64_000_000


class HubFolder(HttpFolder):
    """The files of a Hub repository at a revision; with the Hub's own HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE."""

    lists = True

    def __init__(self, source: str, repository: str, revision: str):
        """Open `repository` at `revision`."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils._headers import build_hf_headers

        super().__init__(source, f"{constants.ENDPOINT}/{repository}/resolve/{urllib.parse.quote(revision, safe='')}")
        quoted = urllib.parse.quote(revision, safe="")
        self._api = f"{constants.ENDPOINT}/api/models/{repository}/revision/{quoted}"
        self._repository, self._revision = repository, revision
        self._headers |= build_hf_headers(library_name="deadbench")
        self._client = get_session()

    def names(self) -> list[str]:
        """Names of the files, as the Hub lists them; a mirror without the Hub's API is asked for known names."""
        try:
            listing = json.loads(self._ask("", dict, lambda answer: body_of(answer, _MAX_API_BYTES)))
            self.commit = listing.get("sha")
            return sorted(f["rfilename"] for f in listing["siblings"] if "/" not in f["rfilename"])
        except FileNotFoundError as error:
            if not str(error).endswith("(404)"):  # the Hub knows: no such repository, no such revision
                raise CheckpointError(str(error)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
        names = super().names()
        if not names:
            raise CheckpointError(f"{self.source}: no such repository on the Hub, or no such revision")
        return names

    def _address(self, name: str) -> str:
        return super()._address(name) if name else self._api

    def _missing(self, answer: httpx2.Response, name: str) -> str:
        told = answer.headers.get("X-Error-Code")
        if told == "RepoNotFound":
            return f"{self.source}: no such repository on the Hub"
        if told == "RevisionNotFound":
            return f"{self.source}: the repository has no revision {self._revision!r}"
        return super()._missing(answer, name)

    def _denied(self, answer: httpx2.Response, name: str) -> str:
        code, status = answer.headers.get("X-Error-Code"), answer.status_code
        if code == "RepoNotFound":  # what the Hub answers to who is not logged in
            return f"{self.source}: no such repository on the Hub, or it is private and HF_TOKEN is not set ({status})"
        page = f"{self.url.split('/resolve/')[0]}"
        token = "check that HF_TOKEN may read it" if "authorization" in self._headers else "set HF_TOKEN"
        return f"{self._called(name)}: gated or private ({status}): accept its licence on {page} and {token}"

    def _token_advice(self) -> str:
        return "" if "authorization" in self._headers else ", or set HF_TOKEN for a higher limit"
