"""What of a stranger's words may be shown: one line, of printable characters, of bounded length.

Names, dtypes, reasons of servers and file names may hold whatever steers a terminal, turns the direction of writing or
breaks a line. Every error, table, log and page shows them by `plain`; secrets are `suite/secrets.py`'s.
"""

MAX_VALUE, MAX_LINE = 200, 300  # characters of one value, and of a line that names it
_LEFT_OUT = " … "


def plain(words: str, limit: int | None = MAX_VALUE) -> str:
    """`words` in one line of at most `limit` characters, what is not printable escaped; cut in its middle.

    Example:
        >>> plain("a\\nb\\x1b[31m")
        'a b\\\\x1b[31m'
    """
    if limit is not None and len(words) > 4 * limit:  # a megabyte is not escaped to be cut
        words = words[: 2 * limit] + words[-2 * limit :]
        cut = True
    else:
        cut = False
    line = printable(" ".join(words.split()))
    if limit is None or (len(line) <= limit and not cut):
        return line
    tail = limit // 3  # where errors say what to do
    return line[: limit - tail - len(_LEFT_OUT)] + _LEFT_OUT + line[-tail:]


def printable(words: str) -> str:
    """`words` with what is not printable escaped, and else as they are.

    Example:
        >>> printable("a  b\\n")
        'a  b\\\\n'
    """
    if words.isprintable():
        return words
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in words)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
