"""How places are named without their secrets.

A URL may carry a password (`https://me:secret@host/`) or a signature (`?sig=…`). What is printed or stored names the
place without them: user and password go, and so does the whole query.
"""

import re

_SECRET_NAME = r"[\w.-]*(?:token|key|key_?id|secret|signature|sig|password|passwd|credentials?|auth)"
_HEADER_NAME = r"(?:proxy-)?authorization|(?:set-)?cookie|x-[\w-]*(?:token|key|secret|signature)"
_WORD = r"""(?:'[^']*'|"[^"]*"|[^&;\s'"])+"""  # of a shell: plain characters and quoted pieces
_USER = re.compile(r"(?<=://)[^/\s'\"@]+@")
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,})")  # of the Hub, of AWS
_HEADER = re.compile(rf"(?i)(\b(?:{_HEADER_NAME})['\"]?:\s*['\"]?(?:(?:bearer|basic)\s+)?|\bbearer\s+)[^\s'\",;)}}]+")
_QUOTED_SETTING = re.compile(rf"""(?i)('(?:--)?{_SECRET_NAME}=)[^']*'(?:"'"'[^']*')*""")  # as shlex.join writes it
_SECRETS = (
    (_USER, "***@"),
    (_HEADER, r"\1***"),
    (_QUOTED_SETTING, r"\1***'"),
    (re.compile(rf"(?i)(--{_SECRET_NAME}[=\s]|(?:^|\s){_SECRET_NAME}=){_WORD}"), r"\1***"),
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
    """`text` with whatever places it holds named without user, password and query; `***` for tokens and in headers."""
    return _TOKEN.sub("***", _HEADER.sub(r"\1***", _QUERY.sub(r"\1", _USER.sub("", text))))
