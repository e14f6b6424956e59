"""Classes of images that lie in no class folder: ImageNet's validation part, mostly."""

import io
import re
import tarfile
from pathlib import Path, PurePosixPath

from fulllora_dist.core.errors import UserError

_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_VALIDATION_NAME = "ILSVRC2012_val_{:08d}"


def read_labels(path: Path) -> dict[str, str]:
    """File name without extension -> class name.

    Args:
        path: ImageNet's development kit (ILSVRC2012_devkit_t12.tar.gz, or the folder it unpacks to); or a text file
            with a file name and its class on each line, separated by a comma or space, further columns ignored, as in
            Kaggle's LOC_val_solution.csv.

    Raises:
        UserError: missing, or something else.
    """
    try:
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.name in (_TRUTH, _META)]
            return _devkit({file.name: file.read_bytes() for file in files}, path)
        if path.name.endswith((".tar.gz", ".tgz", ".tar")):
            return _devkit(_members(path), path)
        return _table(path.read_text(), path)
    except (OSError, UnicodeDecodeError, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot read labels ({error})") from error


def _members(path: Path) -> dict[str, bytes]:
    contents = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if name in (_TRUTH, _META) and (file := tar.extractfile(member)) is not None:
                contents[name] = file.read()
    return contents


def _devkit(files: dict[str, bytes], path: Path) -> dict[str, str]:
    """Line i of the ground truth is the ILSVRC2012_ID of validation image i; meta.mat gives each ID its WordNet id.
    IDs are in no order that the sorted class folders have, so both files are needed."""
    from scipy.io import loadmat  # imported here: slow, and needed for this alone

    if missing := [name for name in (_TRUTH, _META) if name not in files]:
        raise UserError(f"{path}: no {missing[0]} in the development kit")
    try:
        synsets = loadmat(io.BytesIO(files[_META]), squeeze_me=True)["synsets"]
        wordnet = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets}
        truth = [int(line) for line in files[_TRUTH].split()]
        return {_VALIDATION_NAME.format(i): wordnet[identity] for i, identity in enumerate(truth, start=1)}
    except Exception as error:  # scipy raises nearly anything on bad bytes
        raise UserError(f"{path}: the development kit cannot be read ({error!r})") from error


def _table(text: str, path: Path) -> dict[str, str]:
    labels: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        fields = re.split(r"[,\s]+", line.strip())
        if fields in ([""], ["ImageId", "PredictionString"]):
            continue
        if len(fields) < 2:
            raise UserError(f"{path}, line {number}: {line[:40]!r} is not a file name and its class")
        name = PurePosixPath(fields[0])
        stem = name.stem if name.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") else name.name
        if labels.setdefault(stem, fields[1]) != fields[1]:
            raise UserError(f"{path}, line {number}: {stem} already has another class")
    return labels
