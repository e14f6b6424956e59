"""What is shown of what others say: one line, and nothing secret."""

import pytest

from fulllora_dist.core.messages import one_line, redacted


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
    assert redacted(text) == shown


def test_an_error_is_one_line_without_a_credential() -> None:
    error = OSError("no answer\n  from https://user:SECRET@host/x\n  nor https://host/x?sig=SECRET " + 300 * "x")
    line = one_line(error)
    assert line.startswith("no answer from https://***@host/x nor https://host/x?*** xxx")
    assert len(line) == 200
    assert one_line(error, 9) == "no answer"
