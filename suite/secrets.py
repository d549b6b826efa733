"""What of a place, a command or a library's words may be shown: never a secret.

Of a place, what is known to be harmless is kept: scheme, host, port and path. User, password, query, fragment and
parameters of a path go, whatever they are called. What was once taken out of a place or stands in the environment is
known from then on, so that it goes from the words of libraries too, which quote it in ways of their own.
"""

import os
import re
import shlex
import threading
from collections.abc import Sequence
from urllib.parse import quote, unquote, urlsplit

from deadbench.suite.plain_text import plain

_SECRET_NAME = (
    r"[\w.-]*(?:token|key|key_?id|secret|signature|sig|sas|jwt|password|passphrase|passwd|pass|pwd|credentials?|auth)"
)
_HEADER_NAME = r"(?:proxy-)?authorization|(?:set-)?cookie|x-[\w-]*(?:token|key|secret|signature)"
_VALUE = r"""(?:'[^']*'|"[^"]*"|[^&;\s'"])+"""
_SETTINGS = (
    re.compile(rf"(?i)(--{_SECRET_NAME}[=\s]|(?:^|\s){_SECRET_NAME}=){_VALUE}"),
    re.compile(rf"(?i)((?:^|[?&;/\s]|--){_SECRET_NAME}=)[^&;/\s'\"]+"),
)
# As the clients of stores tell what they were given: as an argument, an entry of a dict, an element of XML.
_TOLD_NAME = rf"(?:{_SECRET_NAME}|[\w.-]*(?:access_?id|connection_?string))"
_TOLD_VALUE = (
    r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?!\*\*\*|(?:none|null|true|false)\b)[^\s'",;&<>()\[\]{}]{4,})"""
)
_TOLD = (
    re.compile(rf"(?i)((?<![\w.-]){_TOLD_NAME}\s?=\s?){_TOLD_VALUE}"),
    re.compile(rf"(?i)((['\"]){_TOLD_NAME}\2:\s*){_TOLD_VALUE}"),
    re.compile(rf"(?i)(<(?:{_TOLD_NAME}|\w*(?:signatureprovided|stringtosign\w*|canonicalrequest\w*))>)[^<]+"),
)
_SECRET_OPTION = re.compile(rf"(?i)--{_SECRET_NAME}")
_SECRET_SETTING = re.compile(rf"(?is)((?:--)?{_SECRET_NAME}=).*")
_HEADER = re.compile(rf"(?i)(\b(?:{_HEADER_NAME})['\"]?:\s*['\"]?(?:(?:bearer|basic)\s+)?|\bbearer\s+)[^\s'\",;)}}]+")
# By their form: of the Hub, of AWS, of GitHub and GitLab, of model services, and signed ones in three parts.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|gh[a-z]_[A-Za-z0-9]{16,}"
    r"|(?:github_pat|glpat|sk)[_-][\w-]{16,}|eyJ[\w-]{8,}\.[\w-]{4,}\.[\w-]*)"
)
# No scheme is longer; without an end, a megabyte of letters would be looked through from each of them.
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,40}://"
_URL = re.compile(_SCHEME)
_SCHEMES = (
    "https?|ftps?|sftp|ssh|s3[an]?|gcs|gs|az|adl|abfss?|wasbs?|oss|obs|cos|hf|git|webdavs?|webhdfs|smb|wss?|ray|redis"
    "|mysql|postgres(?:ql)?|mongodb"
)
# A URL that was taken for the path of a file, which has lost a slash.
_FOLDED = re.compile(rf"(?i)(?<![A-Za-z0-9+.-])((?:{_SCHEMES}):/)(?=[^/\s])")
# User and password behind other slashes than two, which no library takes for a URL's.
_USER = r"(?=[^\\/?#@\s:]{0,200}:[^@\s]{0,1000}@)"
_MISSPELT = re.compile(
    rf"(?i)(?<![A-Za-z0-9+.-])((?:https?:(?=[^\\/])|[A-Za-z][A-Za-z0-9+.-]{{1,40}}:(?=[\\/])))(?!//[^\\/])[\\/]*{_USER}"
)
_WITHOUT_SCHEME = re.compile(rf"(?<![^\s'\"(<]){_USER.replace('(?=', '//(?:')}")
_LINK = re.compile(rf"::(?=[a-z0-9]{{1,40}}::|{_SCHEME})")  # between the file systems of a chain
_HOST = re.compile(r"(?:[\w.*…-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_DOTLESS_PORT = re.compile(r"(?!localhost:)[^.\[\]]+:[0-9]*")
_PARAMETERS = re.compile(r";[^/]*=[^/]*")
# Of a URL in the path of another, as archives have it; behind one slash of what is a scheme, or with a password.
_INNER_USER = re.compile(rf"(?i)((?<![A-Za-z0-9+.-])(?:{_SCHEMES}):/|[A-Za-z0-9]:/(?=/|[^/?#\s:@]*:))(/?)([^/?#\s]*)@")
_VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_CLIENT_SECRET", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN",
)  # fmt: skip

# Letters from which a secret is taken out of other words too: a shorter one may be part of any, and what is not known
# to be one, a user's name or a setting of a query, may be a word.
_TELLING, _CERTAIN = 8, 16
_KEY = re.compile(r"(?=.*[0-9])(?=.*[A-Z])(?=.*[a-z]).*", re.DOTALL)  # no word has all of these
_REMEMBERED = 1000
_KNOWN: dict[str, None] = {}  # the latest secrets of places, oldest first
_KNOWING = threading.Lock()


def shown_place(location: str) -> str:
    """A place, as it may be shown and stored: of a URL, or a chain of them, scheme, host, port and path.

    The same place has the same name, however it was signed; and a name of a place names itself.
    """
    location = _WITHOUT_SCHEME.sub("//", _MISSPELT.sub(r"\1//", location))
    return plain("::".join(_shown_link(link) for link in _LINK.split(location)), None)


def scrubbed(text: str) -> str:
    """`text` with the places in it as `shown_place` has them; `***` for tokens, headers, and secrets that are known."""
    text = _WITHOUT_SCHEME.sub("//", _MISSPELT.sub(r"\1//", _starred(text)))
    text, found = _with_shown_urls(_FOLDED.sub(r"\1/", text)), ""
    while text != found:  # what is left of a cut URL may begin another
        found, text = text, _with_shown_urls(text)
    for pattern in _TOLD:
        text = pattern.sub(r"\1***", text)
    return _TOKEN.sub("***", _HEADER.sub(r"\1***", text))


def _starred(text: str) -> str:
    """`***` for what is known to be secret; where two of it, or one and a token, lie over each other, one for both."""
    there = [secret for secret in _known() if secret in text]
    if not there:
        return text
    spans = [(*found.span(), True) for secret in there for found in re.finditer(re.escape(secret), text)]
    spans += [(*found.span(), False) for found in _TOKEN.finditer(text)]
    kept, done = list[str](), 0
    start, stop, is_known = 0, 0, False  # of what lies over each other
    for begin, end, known in [*sorted(spans), (len(text), len(text), False)]:
        if begin < stop:
            stop, is_known = max(stop, end), is_known or known
            continue
        if is_known:
            kept += (text[done:start], "***")
            done = stop
        start, stop, is_known = begin, end, known
    return "".join(kept) + text[done:]


def shown_command(words: Sequence[str]) -> str:
    """The words of a command as a line for a shell, without the secrets that it was given."""
    shown, is_secret = [], False
    for word in words:
        shown.append("***" if is_secret else _shown_word(word))
        is_secret = _SECRET_OPTION.fullmatch(word) is not None
    return shlex.join(shown)


def _shown_word(word: str) -> str:
    setting = _SECRET_SETTING.fullmatch(word)
    if setting:
        return f"{setting[1]}***"
    return shown_place(word) if _URL.search(word) else scrubbed(_without_settings(word))


def _shown_link(link: str) -> str:
    """One file system of a chain; what stands before its URL, as in `text:https://…`, stays."""
    found = _URL.search(link)
    if not found:
        return _TOKEN.sub("***", link)
    before, scheme, rest = link[: found.start()], found.group(), link[found.end() :]
    kept = _host_and_path(scheme, rest)
    if kept is None:
        told, at, place = rest.rpartition("@")
        _remember(told)
        _remember(told.partition(":")[2])
        for piece in re.split(r"[/?#@:]", told.partition(":")[2]):  # as a library takes it that ends the host there
            _remember(piece)
        # What is behind the only @ is the place where a password, begun in front of it, may have any letters.
        is_password = at and "@" not in told and ":" in re.split(r"[/?#]", told, maxsplit=1)[0]
        kept = (_host_and_path(scheme, place) if is_password else None) or "***"
    _remember_parts(rest)
    return _TOKEN.sub("***", before) + scheme + _TOKEN.sub("***", kept)


def _host_and_path(scheme: str, rest: str) -> str | None:
    """Host, port and path of a URL; None where it is none, or where an @ that stands too late may end a password."""
    try:
        parts = urlsplit(scheme + rest)
    except ValueError:
        return None
    host = parts.netloc.rpartition("@")[2]
    behind = f"{parts.path}?{parts.query}#{parts.fragment}"
    late = "@" in behind and (not parts.path or _DOTLESS_PORT.fullmatch(parts.netloc))
    if late or not _HOST.fullmatch(host):
        return None
    for *_, user in _INNER_USER.findall(parts.path):
        _remember(user.partition(":")[2])
    return host + _without_settings(_PARAMETERS.sub("", _INNER_USER.sub(r"\1\2", parts.path)))


def _without_settings(text: str) -> str:
    for pattern in _SETTINGS:
        text = pattern.sub(r"\1***", text)
    return text


def _with_shown_urls(text: str) -> str:
    done, start = [], 0
    while found := _URL.search(text, start):
        end = _end_of_url(text, found.start(), found.end())
        done += [text[start : found.start()], shown_place(text[found.start() : end])]
        start = end
    return "".join([*done, text[start:]])


def _end_of_url(text: str, start: int, after_scheme: int) -> int:
    """Where a URL in words ends: at its closing quote, else at a blank, but not within what may be a password."""
    mark = text[start - 1 : start]
    closing = re.compile(rf"{mark}(?=[\s,:;.)\]}}>]|$)" if mark in ("'", '"') else r"\s|$")
    end = _first(closing, text, after_scheme)
    authority = re.split(r"[/?#]", text[after_scheme:end], maxsplit=1)[0]
    following = _URL.search(text, end)
    at = text.rfind("@", end, following.start() if following else len(text))
    if at >= 0 and "@" not in text[after_scheme:end] and not _HOST.fullmatch(authority.rstrip(":,;.)'\"")):
        end = _first(closing, text, at)
    while end > after_scheme and text[end - 1] in "'\"),:;.]}>":  # of the sentence
        end -= 1
    return end


def _first(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.search(text, start)
    return found.start() if found else _first(re.compile(r"\s|$"), text, start)


def _remember_parts(rest: str) -> None:
    """Keep in mind what of a URL is not shown, as it was written: the library's parts have lost their line feeds."""
    user = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[0]
    before, _, fragment = rest.partition("#")
    query = before.partition("?")[2]
    pairs = [pair.partition("=") for pair in query.split("&")]
    of_path = [part.partition("=") for part in re.split("[/;]", before.partition("?")[0])]
    for piece in (user, query, fragment, *(value for _, _, value in pairs)):
        if ":" in piece or len(piece) >= _CERTAIN or _KEY.fullmatch(piece):
            _remember(piece)
    told = (value for name, _, value in (*pairs, *of_path) if _SECRET_SETTING.fullmatch(f"{name}="))
    for piece in (user.partition(":")[2], *told):
        _remember(piece)


def _remember(secret: str) -> None:
    spelled = {secret, unquote(secret), quote(unquote(secret), safe=""), repr(secret)[1:-1], " ".join(secret.split())}
    with _KNOWING:
        for each in spelled:
            if len(each) >= _TELLING:
                _KNOWN.pop(each, None)
                _KNOWN[each] = None
        while len(_KNOWN) > _REMEMBERED:
            del _KNOWN[next(iter(_KNOWN))]


def _known() -> list[str]:
    """Secrets of places and of the environment."""
    told = (os.environ.get(name, "") for name in _VARIABLES)
    with _KNOWING:
        return [*_KNOWN, *(value for value in told if len(value) >= _TELLING)]
