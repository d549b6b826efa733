"""Places that are read from or written to: any that fsspec opens, and how they are named without their secrets.

A URL may carry a password (`https://me:secret@host/`) or a signature (`?sig=…`). What is printed or stored names the
place without them: user and password go, and so does the whole query.
"""

import re
from typing import Any

import fsspec

_SECRET_NAME = r"[\w.-]*(?:token|key|key_?id|secret|signature|sig|password|passwd|credentials?|auth)"
_USER = re.compile(r"(?<=://)[^/\s'\"@]+@")
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,})")  # of the Hub, of AWS
_SECRETS = (
    (_USER, "***@"),
    (re.compile(rf"(?i)((?:^|[?&;\s]|--){_SECRET_NAME}[=\s])[^&;\s'\"]+"), r"\1***"),
    (_TOKEN, "***"),
)
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s'\"?#]*)[?#][^\s'\")]*", re.IGNORECASE)
# The extra that brings the library for a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "abfs": "azure", "abfss": "azure", "az": "azure"}


def without_secrets(text: str) -> str:
    """`text`, such as a command, with `***` for what by name, form or place in a URL looks like a secret."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def scrubbed(text: str) -> str:
    """`text` with whatever places it holds named without user, password and query, and with `***` for tokens."""
    return _TOKEN.sub("***", _QUERY.sub(r"\1", _USER.sub("", text)))


def open_place(location: str) -> tuple[Any, str]:
    """The file system of a path or URI, and the path on it.

    Raises:
        ImportError, ValueError: no such protocol, or its library is not installed; one line that says what to install.
    """
    try:
        fs, root = fsspec.core.url_to_fs(location)
    except ImportError as error:
        protocol = location.partition("://")[0]
        if protocol not in _EXTRAS:
            raise
        raise ImportError(f"{protocol}:// needs a library: pip install 'deadbench[{_EXTRAS[protocol]}]'") from error
    return fs, root.rstrip("/") or "/"


def is_local(fs: Any) -> bool:
    """Whether a file system is this machine's own."""
    return "file" in (fs.protocol, *fs.protocol)
