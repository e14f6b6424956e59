"""What other programs and URLs say, made fit to be shown."""

import re

# to the last @ before the path; to the last of all where no port follows a colon, but a password with / ? or # in it
CREDENTIALS = re.compile(r"(\w+://)(?:[^/?#\s]*@|[^/?#\s:]*:(?!\d*(?:[/?#\s'\"]|$))\S*@)")
_QUERY = re.compile(r"(https?://[^\s?]*\?)\S+", re.IGNORECASE)


def redacted(text: object) -> str:
    """`text` without the credentials in its URLs."""
    return _QUERY.sub(r"\1***", CREDENTIALS.sub(r"\1***@", str(text)))


def one_line(error: object, limit: int = 200) -> str:
    """What an error says, without the credentials in its URLs, on one line of at most `limit` characters."""
    return " ".join(redacted(error).split())[:limit]
