"""How places are named without their secrets.

A URL may carry a password (`https://me:secret@host/`) or a signature (`?sig=…`). What is printed or stored names the
place without them: user and password go, and so does the whole query.
"""

import re

_SECRET_NAME = r"[\w.-]*(?:token|key|key_?id|secret|signature|sig|password|passwd|credentials?|auth)"
_USER = re.compile(r"(?<=://)[^/\s'\"@]+@")
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,})")  # of the Hub, of AWS
_SECRETS = (
    (_USER, "***@"),
    (re.compile(rf"(?i)((?:^|[?&;\s]|--){_SECRET_NAME}[=\s])[^&;\s'\"]+"), r"\1***"),
    (_TOKEN, "***"),
)
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s'\"?#]*)[?#][^\s'\")]*", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """`text`, such as a command, with `***` for what by name, form or place in a URL looks like a secret."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def scrubbed(text: str) -> str:
    """`text` with whatever places it holds named without user, password and query, and with `***` for tokens."""
    return _TOKEN.sub("***", _QUERY.sub(r"\1", _USER.sub("", text)))
