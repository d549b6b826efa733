"""Places that are read from or written to: any that fsspec opens, and how they are named without their secrets.

A URL may carry a password (`https://me:secret@host/`) or a signature (`?sig=…`). What is printed or stored names the
place without them: user and password go, and so does the whole query.
"""

import re
from typing import Any

import fsspec

_PASSWORD = re.compile(r"(?<=://)[^/\s'\"@]+@")
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s'\"?#]*)[?#][^\s'\")]*", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
# The extra that brings the library for a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "abfs": "azure", "abfss": "azure", "az": "azure"}


def scrubbed(text: str) -> str:
    """`text` with no password, no query and no Hub token in whatever URLs it holds."""
    return _HUB_TOKEN.sub("hf_…", _QUERY.sub(r"\1", _PASSWORD.sub("", text)))


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
