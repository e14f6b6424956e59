"""What a file of weights is, told from its first bytes and its header, without torch.

The ending of a name says little: a safetensors file may be called .pth, and a failed download is a web page.
"""

import json
import os
import zipfile
from typing import IO, Any

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted

_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_MAX_HEADER = 100_000_000  # bytes; the limit of safetensors itself
_HEADER_LENGTH = 8  # bytes, little endian, in front of the JSON


def weights_format(file: IO[bytes], source: str) -> str:
    """ "safetensors", or "torch" for what torch.save wrote. The file is at its start before and after.

    Args:
        source: its path or URL, for messages.

    Raises:
        UserError: anything else; the message says what it is, and what to do.
    """
    start = file.read(512)
    file.seek(0)
    text = start.lstrip().lower()
    if (
        start[_HEADER_LENGTH : _HEADER_LENGTH + 1] == b"{"
        and int.from_bytes(start[:_HEADER_LENGTH], "little") < _MAX_HEADER
    ):
        return "safetensors"
    if start.startswith(b"PK"):
        return _of_zip(file, source)
    if start.startswith(b"\x80"):  # a pickle: torch.save before version 1.6
        return "torch"
    for is_it, what in (
        (not start, "is empty; copy or download it again"),
        (start.startswith(b"version https://git-lfs"), "is a pointer of git-lfs, not the weights; run git lfs pull"),
        (
            text.startswith((b"<!doctype", b"<html", b"<?xml")),
            "is a web page, not weights; download the file itself, not the page about it",
        ),
        (start.startswith(b"\x93NUMPY"), "is a NumPy array; give a .safetensors file, or one that torch.save wrote"),
        (start.startswith(b"\x1f\x8b"), "is compressed with gzip; unpack it first"),
        (
            text.startswith((b"{", b"[")),
            "is JSON, perhaps the list of a checkpoint's parts; give a file with all weights",
        ),
    ):
        if is_it:
            raise _refusal(source, what)
    raise _refusal(source, "is no weights file; give a .safetensors file, or one that torch.save wrote")


def _of_zip(file: IO[bytes], source: str) -> str:
    try:
        names = zipfile.ZipFile(file).namelist()
    except zipfile.BadZipFile:
        raise _refusal(source, "is not a complete torch file; copy or download it again") from None
    file.seek(0)
    members = {name.partition("/")[2] for name in names}
    if members & {"constants.pkl", "code/"} or any(member.startswith("code/") for member in members):
        raise _refusal(source, "is a TorchScript program; save torch.jit.load(FILE).state_dict() with torch.save")
    if "data.pkl" in members:
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        raise _refusal(
            source,
            "is a NumPy archive (weights of JAX); save timm.create_model(NAME, checkpoint_path=FILE).state_dict()",
        )
    raise _refusal(source, "is a zip archive; unpack it, and give the weights file in it")


def _refusal(source: str, what: str) -> UserError:
    return UserError(f"model.checkpoint_path: {redacted(source)} {what}")


def refuse_folder(path: str) -> None:
    """Raise UserError for a local folder, which names the weights files in it."""
    if os.path.isdir(path):
        inside = [name for name in sorted(os.listdir(path)) if name.endswith(_ENDINGS)]
        hint = f"one of its files: {', '.join(inside[:5])}" if inside else "a .safetensors or .pth file"
        raise _refusal(path, f"is a folder; give {hint}")


def read_header(path: str) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """{tensor: (dtype as safetensors calls it, shape)} of a local weights file; None where only torch can tell.

    Raises:
        UserError: the file is missing, is no weights file, or is cut off.
    """
    refuse_folder(path)
    try:
        with open(path, "rb") as file:
            if weights_format(file, path) != "safetensors":
                return None
            length = int.from_bytes(file.read(_HEADER_LENGTH), "little")
            header: dict[str, Any] = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size - _HEADER_LENGTH - length
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        tensors = {name: (str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in header.items()}
    except UserError:
        raise
    except FileNotFoundError:
        raise _refusal(path, "does not exist; give a .safetensors or .pth file") from None
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _refusal(path, "is not a complete safetensors file; copy or download it again") from None
    if size != max(ends, default=0):
        raise _refusal(path, "is not a complete safetensors file; copy or download it again")
    return tensors
