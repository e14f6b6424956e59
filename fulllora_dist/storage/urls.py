"""Where shards lie: a path, or a URL that fsspec opens. The only place that knows schemes, clients and their errors.

Credentials are fsspec's own matter (environment, ~/.aws, ~/.config/fsspec). A URL with user:password@ is refused, as it
would end up in configs, indexes and logs; of a signed one no message shows what follows the question mark.
"""

import asyncio
import importlib
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import aiohttp
import fsspec

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import CREDENTIALS, redacted

SCHEMES = ("file", "s3", "gs", "http", "https")
CONNECT_SECONDS = 15
READ_SECONDS = 60  # of silence; s3fs alone would wait for ever

# what botocore and google-auth, which may not be installed, call network errors that are no OSError
_PASSING = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError"}
_PASSING |= {"MetadataRetrievalError", "TransportError"}
# held for good: fsspec drops a parent's clients in a forked process, which would close their connections, and take them
# out of the epoll instance that both processes share, so that the parent waited for an answer in vain
_clients: set[Any] = set()
_TO_INSTALL = {"s3": "s3fs: pip install 'fulllora-dist[s3]'", "gs": "gcsfs: pip install 'fulllora-dist[gs]'"}


# how botocore says that a metadata service gave no credentials: it throttles when all ranks of a node start at once
_NO_CREDENTIALS = {"NoCredentialsError", "CredentialRetrievalError"}
_METADATA = {"metadata_service_num_attempts": "3", "metadata_service_timeout": "2"}  # botocore's own are 1 and 1


class NoCredentials(OSError):
    """The client found no credentials; a metadata service may give some later, to a new session."""


@dataclass(frozen=True)
class ObjectInfo:
    """An object as its store describes it.

    Attributes:
        bytes: its length; None where the server does not say.
        etag: the store's name of this content; None where it has none (local files, some web servers).
    """

    bytes: int | None
    etag: str | None


def scheme_of(url: str) -> str:
    """One of SCHEMES; a plain path is "file".

    Raises:
        UserError: anything else, `pipe:` and chained URLs (`simplecache::s3://`) among it; user:password@; what would
            not be part of a file's name, such as # in a URL of https.
    """
    scheme, separator, _ = url.partition("://")
    if url.startswith("pipe:") or "::" in scheme or (separator and scheme.lower() not in SCHEMES):
        raise UserError(f"{redacted(url)}: must be a path or a URL of {', '.join(f'{s}://' for s in SCHEMES)}")
    refuse_credentials(url)
    if separator and scheme.lower() not in ("s3", "gs"):
        parts = urlsplit(url)
        if parts.fragment or url.endswith("#"):
            raise UserError(f"{redacted(url)}: '#' ends the path of such a URL; write it as %23")
        if scheme.lower() == "file" and (parts.query or parts.netloc not in ("", "localhost")):
            raise UserError(f"{url}: must be file:///PATH with '?' written as %3F; or give the path itself")
    return scheme.lower() if separator else "file"


def refuse_credentials(url: str) -> None:
    """Raise UserError for a URL with user:password@."""
    if CREDENTIALS.match(url):
        raise UserError(
            f"{redacted(url)}: a URL must not hold user:password@; credentials belong in the environment or "
            "~/.config/fsspec (docs/data.md)"
        )


def is_remote(url: str) -> bool:
    """Not on a mounted disk. Raises UserError for schemes that are not allowed."""
    return scheme_of(url) != "file"


def local_path(url: str) -> str:
    """The path of a plain path, in which ~ is the home folder, or of a file:// URL."""
    return unquote(urlsplit(url).path) if "://" in url else os.path.expanduser(url)


def join(folder: str, name: str) -> str:
    """`name` in `folder`, or `name` itself where it is absolute. A query (a signature) stays at the end of the URL."""
    if "://" in name or os.path.isabs(name) or name.startswith("pipe:"):
        scheme_of(name)
        return name
    if not is_remote(folder):
        return os.path.join(local_path(folder), name)
    if ".." in name.split("/"):
        raise UserError(f"{redacted(folder)}: {name} leaves the folder")
    if scheme_of(folder) in ("http", "https"):
        parts = urlsplit(folder)
        name = quote(name, safe="/!$&'()*+,;=:@~")  # a file may have %, # and ? in its name
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
    return f"{folder.rstrip('/')}/{name}"


def filesystem(url: str) -> Any:
    """The fsspec filesystem of `url`, made in this process when first asked for (fsspec keeps it).

    Raises:
        UserError: a scheme that is not allowed, or whose client is not installed.
    """
    scheme = scheme_of(url)
    options: dict[str, Any] = {}
    if scheme in ("s3", "gs"):
        options["use_listings_cache"] = False  # what was listed once may have changed since
    if scheme == "s3":
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"read_timeout": READ_SECONDS, "connect_timeout": CONNECT_SECONDS, **given}
        _ask_metadata_again()
    try:
        client = fsspec.filesystem(scheme, **options)
        _clients.add(client)
        return client
    except ImportError as error:
        raise UserError(f"{redacted(url)}: needs {_TO_INSTALL.get(scheme, error)}") from error


@cache
def _ask_metadata_again() -> None:
    """Let botocore ask a metadata service several times, unless the environment or ~/.aws/config says how often."""
    with suppress(Exception):  # without botocore, or with a profile that is not there, the client says so
        named = importlib.import_module("botocore.session").Session().get_scoped_config()
        for name, value in _METADATA.items():
            if name not in named:
                os.environ.setdefault(f"AWS_{name.upper()}", value)


def object_info(url: str) -> ObjectInfo:
    """Length and etag, not from any cache.

    Raises:
        UserError: a local file that cannot be read.
        Exception: the client's own, for `classify_error`.
    """
    if not is_remote(url):
        try:
            return ObjectInfo(os.stat(local_path(url)).st_size, None)
        except OSError as error:
            raise UserError(f"{url}: cannot be read ({error.strerror})") from error
    metadata = filesystem(url).info(url)
    return ObjectInfo(metadata.get("size"), metadata.get("ETag") or metadata.get("etag"))


def bare_etag(etag: str) -> str:
    """Without what clients add: some give it with quotes, some without; W/ before it is a web server's."""
    return etag.removeprefix("W/").strip('"')


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind an exception of s3fs, gcsfs or fsspec's http, where there is one."""
    seen: BaseException | None = error
    while seen is not None:
        status = None
        if isinstance(seen, aiohttp.ClientResponseError):
            status = seen.status
        elif isinstance(response := getattr(seen, "response", None), dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif type(seen).__module__.startswith("gcsfs"):
            status = getattr(seen, "code", None)
        if status is not None and str(status).isdigit():
            return int(status)
        seen = seen.__cause__ or seen.__context__
    return None


def is_missing(error: Exception) -> bool:
    """Whether `error`, raised by a client, says that there is no such object, and not that the store failed."""
    status, cause = http_status(error), error.__cause__
    # fsspec's http calls everything "not found" that goes wrong while it asks for the length
    missing = isinstance(error, FileNotFoundError) and (cause is None or isinstance(cause, FileNotFoundError))
    return status == 404 or (missing and status is None)


def classify_error(error: Exception, url: str) -> UserError | OSError:
    """What `error`, raised by a client on `url`, means.

    Returns:
        UserError where only the user can fix it: says what to check. OSError where a retry may help: after timeouts,
        network errors and answers that say so, and nothing else.
    """
    if isinstance(error, (UserError, NoCredentials)):
        return error
    name, status = redacted(url), http_status(error)
    reason = _reason(error, name)
    if is_missing(error):
        return UserError(f"{name}: does not exist; check bucket, path and endpoint")
    lacking = type(error).__name__ in _NO_CREDENTIALS or "refreshed credentials are still expired" in reason
    if lacking and _may_have_metadata():
        return NoCredentials(
            f"{name}: no credentials ({reason}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or "
            "give this machine a role whose metadata service answers; set AWS_EC2_METADATA_DISABLED=true if there is "
            "no such service"
        )
    denied = lacking or isinstance(error, PermissionError) or type(error).__name__ == "TokenRetrievalError"
    if denied or status in (401, 403):
        return UserError(f"{name}: access denied ({reason}); check the credentials, their rights and the endpoint")
    if isinstance(error, ImportError):
        return UserError(f"{name}: {reason}")
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return TimeoutError(f"{name}: no answer in time")
    if status is not None and 400 <= status < 500 and status not in (408, 412, 416, 429):
        return UserError(f"{name}: the store refuses the request ({reason}); check the URL and the endpoint")
    if status is None and not _may_pass(error):
        return UserError(f"{name}: {reason} ({type(error).__name__}); check the URL and its client's settings")
    return OSError(f"{name}: {reason}")


def _reason(error: BaseException, name: str) -> str:
    """What `error` says, on one line and without the URL, which stands before it already."""
    if isinstance(error, aiohttp.ClientResponseError):
        return f"{error.status} {error.message}"
    text = " ".join(redacted(error).split())
    if text == name and error.__cause__ is not None:  # fsspec's http
        return _reason(error.__cause__, name)
    return text.removeprefix(name).lstrip(",: ") or type(error).__name__


def _may_have_metadata() -> bool:
    """Whether a metadata service may give credentials: not where AWS_EC2_METADATA_DISABLED rules it out."""
    disabled = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    return not disabled or any(name.startswith("AWS_CONTAINER_CREDENTIALS_") for name in os.environ)


def _may_pass(error: BaseException) -> bool:
    wraps = isinstance(error, FileNotFoundError) or type(error).__name__ == "RefreshError"  # google-auth's
    if wraps and error.__cause__ is not None:
        return _may_pass(error.__cause__)
    if isinstance(error, aiohttp.InvalidURL):
        return False
    known = isinstance(error, (OSError, aiohttp.ClientError))
    return known or not _PASSING.isdisjoint(kind.__name__ for kind in type(error).__mro__)
