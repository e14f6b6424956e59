"""Names that desktops, archivers, NAS boxes and notebooks leave among images: never a class, never a sample."""

import re

_TOOL_NAMES = re.compile(
    r"\..*|__MACOSX|@eaDir|#recycle|lost\+found|\$RECYCLE\.BIN|System Volume Information|PaxHeaders(\.\d+)?"
    r"|Thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)


def leftover(path: str) -> str | None:
    """The path up to its first hidden or tool name (`a/.git` of `a/.git/x.jpg`); None where it has none."""
    parts = path.split("/")
    for i, part in enumerate(parts):
        if part not in (".", "..") and _TOOL_NAMES.fullmatch(part):
            return "/".join(parts[: i + 1])
    return None
