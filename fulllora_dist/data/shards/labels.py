"""Classes of images that lie in no class folder: ImageNet's validation part, caffe's lists, csv tables."""

import csv
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.shards.fields import IMAGE_EXTENSIONS

_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_VALIDATION_NAME = "ILSVRC2012_val_{:08d}"

# Headers without case and punctuation; of several columns that could name the image, the first in this order.
_NAME_HEADERS = (
    "filename", "file", "filepath", "path", "imagepath", "image", "imagename", "imagefile", "imageid", "img", "name",
    "id",
)  # fmt: skip
_CLASS_HEADERS = (
    "label", "labels", "labelname", "labelid", "class", "classname", "classid", "category", "target",
    "predictionstring", "synset", "wnid", "breed", "species",
)  # fmt: skip
_IMAGE = rf"\.(?:{'|'.join(IMAGE_EXTENSIONS)})"
_AFTER_NAME = re.compile(rf"(.*?{_IMAGE}|\S+)\s+(\S.*)", re.IGNORECASE)  # a name with blanks ends with its extension
_Row = tuple[int, list[str]]  # line number, fields


def read_labels(path: Path) -> dict[str, str]:
    """Image name, with the folders that the file gives it and without its extension -> class name.

    Args:
        path: ImageNet's development kit (ILSVRC2012_devkit_t12.tar.gz, or the folder it unpacks to); or a UTF-8 text
            file with an image's name and its class on each line: separated by tabs where there are tabs; by the rules
            of csv where there are commas (a class with a comma stands in quotes); else by the first blank, so that a
            class may be of several words. A header may say which columns these are; without one they are the first
            two, and further ones may hold only numbers.

    Raises:
        UserError: missing, or something else; a line without name or class; an image with two classes.
    """
    try:
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.name in (_TRUTH, _META)]
            return _devkit({file.name: file.read_bytes() for file in files}, path)
        if path.name.endswith((".tar.gz", ".tgz", ".tar")):
            return _devkit(_members(path), path)
        return _table(path.read_text(encoding="utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot read labels (it is not UTF-8 text)") from error
    except (OSError, tarfile.TarError) as error:
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


def bare_name(name: str) -> str:
    """An image's path without `./` and its extension."""
    path = PurePosixPath(name)
    return str(path.with_suffix("") if re.fullmatch(_IMAGE, path.suffix, re.IGNORECASE) else path)


def _table(text: str, path: Path) -> dict[str, str]:
    rows = [(number, fields) for number, fields in _rows(text, path) if any(fields)]
    if not rows:
        raise UserError(f"{path}: names no images")
    header = _header(rows, path)
    name_column, class_column = header or (0, 1)
    width = len(rows[0][1])
    single = bool(header) and _word(rows[0][1][class_column]) == "predictionstring"  # "n01440764 1 2 3 4": with a box
    labels: dict[str, str] = {}
    for number, fields in rows[1:] if header else rows:
        place = f"{path}, line {number}"
        if len(fields) < 2 or not fields[name_column] or not fields[min(class_column, len(fields) - 1)]:
            raise UserError(f"{place}: {','.join(fields)[:40]!r} is not a file name and its class")
        if len(fields) != width:
            raise UserError(
                f"{place}: {len(fields)} columns, {width} in the first line; a comma in a name needs quotes"
            )
        if not header and not all(_is_number(field) for field in fields[2:]):
            raise UserError(
                f"{place}: {width} columns; the first line must say which are the file name and the class "
                "(filename,label,...)"
            )
        name = bare_name(fields[name_column])
        class_name = fields[class_column].split()[0] if single else fields[class_column]
        if re.search(r"[\x00-\x1f\x7f-\x9f]|^[\d.\s-]+\s[\d.\s-]+$", class_name) or class_name[0] == "/":
            raise UserError(f"{place}: {class_name[:40]!r} is not one class")
        if labels.setdefault(name, class_name) != class_name:
            raise UserError(f"{place}: {name} already has another class")
    return labels


def _rows(text: str, path: Path) -> list[_Row]:
    """The fields of each line, without blanks around them."""
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    filled = [line for _, line in lines if line]
    tabs = any("\t" in line for line in filled)
    named = all(re.match(rf"[^,]*?{_IMAGE}\s+[^\s,]", line, re.IGNORECASE) for line in filled)  # "x.jpg tench, Tinca"
    if not tabs and (named or not any("," in line for line in filled)):
        return [(n, list(m.groups()) if (m := _AFTER_NAME.fullmatch(line)) else [line]) for n, line in lines if line]
    reader = csv.reader(io.StringIO(text), delimiter="\t" if tabs else ",", skipinitialspace=True, strict=True)
    try:
        return [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def _header(rows: Sequence[_Row], path: Path) -> tuple[int, int] | None:
    """The columns of name and class, as the first line says; None where it is an image's."""
    words = [_word(field) for field in rows[0][1]]
    names = sorted((_NAME_HEADERS.index(word), i) for i, word in enumerate(words) if word in _NAME_HEADERS)
    classes = [i for i, word in enumerate(words) if word in _CLASS_HEADERS]
    if len(classes) > 1 and names:
        columns = ", ".join(rows[0][1][i] for i in classes)
        raise UserError(f"{path}: the columns {columns} could all be the class; keep one of them")
    if names and classes:
        return names[0][1], classes[0]
    images = [bool(re.search(rf"{_IMAGE}$", fields[0], re.IGNORECASE)) for _, fields in rows]
    if len(words) == 2 and (names or (len(images) > 1 and not images[0] and all(images[1:]))):
        return (names[0][1], 1 - names[0][1]) if names else (0, 1)
    return None


def _word(field: str) -> str:
    return re.sub(r"[\W_]+", "", field.lower())


def _is_number(field: str) -> bool:
    return re.fullmatch(r"-?[0-9]+(\.[0-9]*)?", field) is not None
