"""URLs: what is shown of them, what is refused, what a signature goes along with."""

import pytest

from fulllora_dist.data import urls
from fulllora_dist.data.index import split_index
from fulllora_dist.errors import UserError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("HTTPS://u/x?sig=SECRET", "HTTPS://u/x?***"),
        ("https://user:p@SECRET@host/x", "https://***@host/x"),
        ("https://user:p/SECRET@host/x", "https://***@host/x"),
        ("https://user:p?SECRET#@host:80/x", "https://***@host:80/x"),
        ("https://SECRET@host/x", "https://***@host/x"),
        ("https://u/x?sig='SECRET'", "https://u/x?***"),
        ("a http://u/x?SECRET and HTTP://v:SECRET@h", "a http://u/x?*** and HTTP://***@h"),
        ("http://host:80/a@b/x", "http://host:80/a@b/x"),
        ("(http://host:80) a@b", "(http://host:80) a@b"),
        ("s3://bucket/a:b@c?versionId=1", "s3://bucket/a:b@c?versionId=1"),
    ],
)
def test_no_part_of_a_credential_is_shown(text: str, shown: str) -> None:
    assert urls.redacted(text) == shown


@pytest.mark.parametrize("user", ["user:pw", "user", "user:p@w", "user:p/w", "user:p?w"])
def test_a_url_with_a_password_is_refused(user: str) -> None:
    for use in (urls.is_remote, urls.filesystem, lambda url: urls.join("/folder", url)):
        with pytest.raises(UserError, match=r"^https://\*\*\*@host/x: a URL without user:password@ is right"):
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
