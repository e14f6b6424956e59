"""URLs: what is refused, what a signature goes along with."""

import os
import time
from pathlib import Path

import aiohttp
import pytest
import s3fs
from botocore.exceptions import CredentialRetrievalError, EndpointConnectionError, NoCredentialsError
from google.auth.exceptions import RefreshError, TransportError

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import split_index
from fulllora_dist.distributed.comm import free_port
from fulllora_dist.storage import store, urls
from tests.services.fault_server import FaultServer


@pytest.mark.parametrize("user", ["user:pw", "user", "user:p@w", "user:p/w", "user:p?w"])
def test_a_url_with_a_password_is_refused(user: str) -> None:
    for use in (urls.is_remote, urls.filesystem, lambda url: urls.join("/folder", url)):
        with pytest.raises(UserError, match=r"^https://\*\*\*@host/x: a URL must not hold user:password@"):
            use(f"https://{user}@host/x")
    assert urls.is_remote("https://host:8080/a@b/x")


@pytest.mark.parametrize(
    ("where", "folder", "name"),
    [
        ("https://h/p/mine.safetensors?sig=a/b", "https://h/p?sig=a/b", "mine.safetensors"),
        ("https://h/p?sig=a/b.safetensors", "https://h/p?sig=a/b.safetensors", "index.safetensors"),
        ("s3://b/p/mine.safetensors?versionId=1", "s3://b/p", "mine.safetensors?versionId=1"),
        ("mine.safetensors", ".", "mine.safetensors"),
    ],
)
def test_a_signature_goes_to_the_index_and_the_shards(where: str, folder: str, name: str) -> None:
    assert split_index(where) == (folder, name)
    if "sig" in where:
        assert urls.join(folder, "a.tar").startswith("https://h/p/a.tar?sig=a/b")
        assert urls.join(folder, name).startswith(f"https://h/p/{name}?sig=a/b")


@pytest.mark.parametrize(
    ("url", "environment", "message"),
    [
        ("s3://bucket/x", {"AWS_PROFILE": "nobody"}, r"s3://bucket/x: The config profile \(nobody\) "),
        ("s3://bucket/x", {"AWS_ENDPOINT_URL": "no url"}, r"s3://bucket/x: Invalid endpoint: no url"),
        ("s3://bad_bucket!/x", {}, r"s3://bad_bucket!/x: .*[Ii]nvalid bucket name"),
        ("http://127.0.0.1:99999/x", {}, r"http://127.0.0.1:99999/x: "),
    ],
)
def test_a_mistake_that_cannot_pass_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], message: str
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in ({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"} | environment).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 5)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"^{message}.*; check") as caught:
        store.info(url)
    assert time.monotonic() - began < 4
    assert str(caught.value).count("://") == 1
    s3fs.S3FileSystem.clear_instance_cache()


def of_metadata(cause: Exception | None) -> Exception:
    """What google-auth raises where a metadata service gave no token."""
    error = RefreshError("no token")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError("peer"), True),
        (TimeoutError(), True),
        (aiohttp.ServerDisconnectedError(), True),
        (EndpointConnectionError(endpoint_url="http://h"), True),
        (aiohttp.InvalidURL("http://"), False),
        (KeyError("size"), False),
        (TypeError("an argument is missing"), False),
        (NoCredentialsError(), True),
        (CredentialRetrievalError(provider="iam-role", error_msg="throttled"), True),
        (of_metadata(TransportError("429")), True),
        (of_metadata(None), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, passes: bool) -> None:
    assert isinstance(urls.classify_error(error, "s3://bucket/x"), UserError) != passes


@pytest.mark.parametrize(("container", "passes"), [(None, False), ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", True)])
def test_a_containers_credentials_may_come_later_without_a_metadata_service(
    container: str | None, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if container is not None:
        monkeypatch.setenv(container, "/credentials")
    assert isinstance(urls.classify_error(NoCredentialsError(), "s3://bucket/x"), UserError) != passes


def test_a_message_says_the_url_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.1)
    (tmp_path / "x").write_bytes(bytes(10))
    with FaultServer(tmp_path) as server:
        assert [store.exists(f"{server.url}/{name}") for name in ("x", "y")] == [True, False]
        for fault, message in (("503", "503 Service Unavailable"), ("short", "got 6 of 10 bytes at 0")):
            server.fault = lambda request, fault=fault: fault
            with (
                store.ObjectStream(f"{server.url}/x", 10) as stream,
                pytest.raises(UserError, match=f"^{server.url}/x: {message} .tried for 0 s.$"),
            ):
                stream.read(10)
    nowhere = f"http://127.0.0.1:{free_port()}/x"
    with pytest.raises(UserError, match=f"^{nowhere}: Cannot connect .*tried for 0 s"):
        store.exists(nowhere)
