"""Image folders and labels files as people have them: which label an image gets, and what is refused."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torchvision.datasets import ImageFolder

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.shards import check
from fulllora_dist.data.shards.classes import order_classes, read_classes
from fulllora_dist.data.shards.make import make_shards
from tests.ranks import RankServer

TOOL = "tools/make_shards.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def jpeg(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (number * 37 % 256, number * 91 % 256, number)).save(buffer, "JPEG")
    return buffer.getvalue()


def folder(root: Path, *names: str) -> Path:
    """Images of these names, each of another colour; a name with a slash at its end is an empty folder."""
    for number, name in enumerate(names):
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(jpeg(number))
    return root


def packed(root: Path, tar: Path) -> Path:
    with tarfile.open(tar, "w") as file:
        file.add(root, ".")
    return tar


def make(source: Path, destination: Path, **more) -> dict:
    return make_shards(source, destination, progress=False, **more)


def labels_in(destination: Path) -> dict[bytes, int]:
    """Image bytes -> label, by tarfile alone."""
    found = {}
    for path in destination.glob("*.tar"):
        with tarfile.open(path) as tar:
            files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
        for name, data in files.items():
            if name.endswith(".jpg"):
                found[data] = int(files[name.removesuffix(".jpg") + ".cls"])
    return found


def classes_in(destination: Path, source: Path) -> dict[str, str]:
    """Name of the source file -> class, by tarfile and classes.txt alone."""
    names = (destination / "classes.txt").read_text().splitlines()
    labels = labels_in(destination)
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*.jpg") if path.is_file()}
    return {name: names[labels[data]] for name, data in files.items() if data in labels}


# Class order


@pytest.mark.parametrize("form", ["{}", "{:03d}", "{:02d}"])
def test_numbered_folders_have_the_labels_of_timms_reader(tmp_path: Path, rank_server: RankServer, form: str) -> None:
    source = folder(tmp_path / "images", *(f"{form.format(i)}/x.jpg" for i in range(12)))
    theirs = {Path(path).read_bytes(): label for path, label in ReaderImageFolder(str(source)).samples}
    assert sorted(theirs.values()) == list(range(12))
    assert make(source, tmp_path / "a")["notes"] == ["class names are numbers: labels are in numeric order"]
    assert labels_in(tmp_path / "a") == theirs
    done = rank_server.launch(ROOT / TOOL, source, tmp_path / "b", "--workers", "1").wait()
    assert done.stdout.splitlines()[-1] == "class names are numbers: labels are in numeric order"
    assert labels_in(tmp_path / "b") == theirs


def test_numbers_in_a_labels_file_are_the_labels(tmp_path: Path) -> None:
    source = folder(tmp_path / "images", *(f"x{i}.jpg" for i in range(12)))
    (tmp_path / "val.txt").write_text("".join(f"x{i}.jpg {i}\n" for i in range(12)))
    make(source, tmp_path / "out", labels=tmp_path / "val.txt")
    assert labels_in(tmp_path / "out") == {(source / f"x{i}.jpg").read_bytes(): i for i in range(12)}


OTHERWISE = (
    "labels are in text order, capitals first, as torchvision's ImageFolder has them; timm's folder reader would "
    "number the classes otherwise (label {} is {!r} here, {!r} there): --classes gives another order"
)
ALIKE = "classes {} differ only in case or accents' encoding"


@pytest.mark.parametrize(
    ("names", "notes"),
    [
        (["ant", "bee", "cat"], []),
        (["class1", "class2", "class10"], [OTHERWISE.format(1, "class10", "class2")]),
        (["ant", "Bee", "cat"], [OTHERWISE.format(0, "Bee", "ant")]),
        (["v0.5", "v1.5", "v10.5", "v2.5"], [OTHERWISE.format(2, "v10.5", "v2.5")]),
        (["1", "2", "other"], []),
        (["n01440764", "n01443537", "n02102040"], []),
        (["Cat", "cat", "dog"], [ALIKE.format("'Cat' and 'cat'")]),
    ],
)
def test_other_names_have_the_labels_of_torchvision_and_timms_order_is_told(
    tmp_path: Path, names: list[str], notes: list[str]
) -> None:
    source = folder(tmp_path / "images", *(f"{name}/x.jpg" for name in names))
    assert make(source, tmp_path / "out")["notes"] == notes
    theirs = ImageFolder(str(source))
    assert labels_in(tmp_path / "out") == {Path(path).read_bytes(): label for path, label in theirs.samples}
    timm = {Path(path).read_bytes(): label for path, label in ReaderImageFolder(str(source)).samples}
    if "Cat" not in names:  # timm's order of these follows the hashes of their names
        assert (labels_in(tmp_path / "out") != timm) == bool(notes)


@given(st.sets(st.text("aB1 0é_", min_size=1, max_size=4), min_size=2, max_size=6))
@settings(max_examples=300, deadline=None)
def test_timms_order_is_told_whenever_it_differs(names: set[str]) -> None:
    if sum(name.isdecimal() for name in names) > 1 or len({name.lower() for name in names}) < len(names):
        return
    ours, notes = order_classes(names, names, None)
    theirs = sorted(ours, key=natural_key)
    label = next((i for i, name in enumerate(ours) if theirs[i] != name), None)
    assert notes == ([] if label is None else [OTHERWISE.format(label, ours[label], theirs[label])])


NOT_FROM_0 = (
    "class names are numbers, but not those from 0 to {} ({}): --classes {} takes the numbers as labels, --classes "
    "{},... or a file of names gives another order"
)


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["1", "2", "10"], NOT_FROM_0.format(2, "1, 2, 10", 11, "1,2,10")),
        (["0", "2", "3"], NOT_FROM_0.format(2, "0, 2, 3", 4, "0,2,3")),
        (["-1", "0", "1"], NOT_FROM_0.format(2, "-1, 0, 1", 2, "-1,0,1")),
        (
            ["0", "1", "2", "10", "other"],
            "some class names are numbers (0, 1, 10, 2), others are not (other), so neither numeric nor text order is "
            "right; remove those, or give --classes",
        ),
        (
            ["0.0", "1.0", "10.0", "2.0"],
            "class names are numbers, but not whole ones (0.0, 1.0, 10.0, 2.0); --classes gives their order, as labels "
            "they must be whole",
        ),
        (["00", "0", "1"], "classes '0' and '00' are the same number; rename one, or give --classes"),
    ],
)
def test_numbers_that_cannot_be_the_labels_are_refused(
    tmp_path: Path, refused: Callable[..., str], names: list[str], line: str
) -> None:
    source = folder(tmp_path / "images", *(f"{name}/x.jpg" for name in names))
    assert refused(TOOL, source, tmp_path / "out", "--workers", "1", keep=(tmp_path,)) == f"error: {line}"
    with pytest.raises(UserError) as caught:
        make(source, tmp_path / "out")
    assert str(caught.value) == line


def test_a_number_of_classes_takes_numbers_as_labels(tmp_path: Path, rank_server: RankServer) -> None:
    source = folder(tmp_path / "images", "02/x.jpg", "10/x.jpg", "7/x.jpg")
    done = rank_server.launch(ROOT / TOOL, source, tmp_path / "out", "--classes", "12", "--json").wait()
    assert json.loads(done.stdout)["notes"] == [
        "labels are the numbers that name the classes",
        "classes without images: 0, 1, 3, 4, 5 and 4 more",
    ]
    assert labels_in(tmp_path / "out") == {(source / f"{n}/x.jpg").read_bytes(): int(n) for n in ("02", "10", "7")}
    assert (tmp_path / "out" / "classes.txt").read_text().splitlines()[2] == "02"
    for classes, line in (
        (8, "classes=8: class names must be numbers from 0 to 7, got 10"),
        (0, "classes must be between 1 and 1000000, got 0"),
        (999_999_999, "classes must be between 1 and 1000000, got 999999999"),
    ):
        with pytest.raises(UserError) as caught:
            make(source, tmp_path / "other", classes=classes)
        assert str(caught.value) == line


CLASS_FILES = {
    "plain": (b"bee\nant\n", ["bee", "ant"]),
    "windows": (b"\xef\xbb\xbfbee\r\nant\r\n", ["bee", "ant"]),
    "blank lines at the end": (b"bee\nant\n\n \n", ["bee", "ant"]),
    "words": ("great white shark\ngreat grey owl\nété\n".encode(), ["great white shark", "great grey owl", "été"]),
    "wordnet": (
        b"n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n",
        ["n01440764", "n01443537"],
    ),
    "wordnet with a tab": (b"n01440764\ttench\nn01443537\tgoldfish\n", ["n01440764", "n01443537"]),
    "blank line between": (b"bee\n\nant\n", "classes: number 1 is ''; each label needs a name of its own"),
    "twice": (b"bee\nant\nbee\n", "classes: number 2 is 'bee'; each label needs a name of its own"),
    "empty": (b"\n", "classes: number 0 is ''; each label needs a name of its own"),
    "json": (b'{"0": ["n01440764", "tench"]}', "FILE is JSON; it must have one class name per line, in label order"),
    "utf-16": ("bee\nant\n".encode("utf-16"), "FILE cannot be read as UTF-8 text with one class name per line"),
}


@pytest.mark.parametrize("case", CLASS_FILES)
def test_files_of_class_names(tmp_path: Path, case: str) -> None:
    data, expected = CLASS_FILES[case]
    (tmp_path / "names.txt").write_bytes(data)
    if isinstance(expected, list):
        assert read_classes(tmp_path / "names.txt") == expected
        return
    with pytest.raises(UserError) as caught:
        read_classes(tmp_path / "names.txt")
    assert str(caught.value) == expected.replace("FILE", f"--classes: {tmp_path / 'names.txt'}")


def test_classes_from_a_file_and_of_no_name(
    tmp_path: Path, rank_server: RankServer, refused: Callable[..., str]
) -> None:
    source = folder(tmp_path / "images", "ant/x.jpg", "bee/x.jpg", "cat/x.jpg")
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\r\nant\r\n")
    done = rank_server.launch(ROOT / TOOL, source, tmp_path / "out", "--classes", tmp_path / "names.txt").wait()
    assert done.stdout.splitlines()[-1] == "left out 1 images of classes that --classes does not name"
    assert classes_in(tmp_path / "out", source) == {"ant/x.jpg": "ant", "cat/x.jpg": "cat"}
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\nant\n"
    line = refused(TOOL, source, tmp_path / "b", "--classes", "ant,dog,eel", keep=(tmp_path,))
    assert line == "error: classes: the source has no images of dog, eel"


# Labels files

TABLES: Mapping[str, tuple[str, dict[str, str]]] = {
    "csv, words": ("x1.jpg,great white shark\nx2.jpg,great owl\n", {"x1": "great white shark", "x2": "great owl"}),
    "csv, quotes": (
        'x1.jpg,"tench, Tinca tinca"\nx2.jpg, "a ""q"" b"\n',
        {"x1": "tench, Tinca tinca", "x2": 'a "q" b'},
    ),
    "csv, header": ("filename,label\nx1.jpg,shark\nx2.jpg,owl\n", {"x1": "shark", "x2": "owl"}),
    "csv, header in another order": (
        "Label,split,File Name\ngreat shark,val,x1.jpg\nowl,val,x2.jpg\n",
        {"x1": "great shark", "x2": "owl"},
    ),
    "csv, header of unknown words": ("foto,klasse\nx1.jpg,shark\nx2.jpg,owl\n", {"x1": "shark", "x2": "owl"}),
    "csv, names alone": ("id,breed\nx1,shark\nx2,owl\n", {"x1": "shark", "x2": "owl"}),
    "csv, boxes": ("x1.jpg,shark,1,2,3.5,4\nx2.jpg,owl,1,2,3,4\n", {"x1": "shark", "x2": "owl"}),
    "windows": ("\ufeffx1.jpg,great shark\r\nx2.jpg,owl\r\n\r\n", {"x1": "great shark", "x2": "owl"}),
    "tabs": ("x1.jpg\tgreat, white shark\nx2.jpg\tgrey owl\n", {"x1": "great, white shark", "x2": "grey owl"}),
    "tabs, boxes": ("x1.JPEG\tn03444034\t0\t32\nx2.JPEG\tn04067472\t52\t55\n", {"x1": "n03444034", "x2": "n04067472"}),
    "blanks": ("x1.jpg great white shark\nx2.jpg  owl\n", {"x1": "great white shark", "x2": "owl"}),
    "blanks, commas": ("x1.jpg tench, Tinca\nx2.jpg owl, grey\n", {"x1": "tench, Tinca", "x2": "owl, grey"}),
    "blanks, names alone": ("x1 great shark\nx2 boeing 747\n", {"x1": "great shark", "x2": "boeing 747"}),
    "blanks in names": ("my shark 1.jpg great shark\nx2.jpg owl\n", {"my shark 1": "great shark", "x2": "owl"}),
    "folders": ("./val/x1.jpg shark\nval/x2.jpg owl\n", {"val/x1": "shark", "val/x2": "owl"}),
    "same stem in two folders": ("a/x.jpg,shark\nb/x.jpg,owl\n", {"a/x": "shark", "b/x": "owl"}),
    "one image twice": ("x1.jpg owl\nx2.jpg owl\nx1.jpg owl\n", {"x1": "owl", "x2": "owl"}),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_labels_files(tmp_path: Path, case: str) -> None:
    text, expected = TABLES[case]
    source = folder(tmp_path / "images", *(f"{name}.jpg" for name in expected))
    (tmp_path / "labels.csv").write_bytes(text.encode())
    make(source, tmp_path / "out", labels=tmp_path / "labels.csv")
    assert classes_in(tmp_path / "out", source) == {f"{name}.jpg": label for name, label in expected.items()}


REFUSED_TABLES = {
    "no quotes": (
        "x1.jpg,tench, Tinca tinca\nx2.jpg,owl\n",
        "FILE, line 1: 3 columns; the first line must say which are the file name and the class (filename,label,...)",
    ),
    "no quotes later": (
        "x1.jpg,owl\nx2.jpg,tench, Tinca tinca\n",
        "FILE, line 2: 3 columns, 2 in the first line; a comma in a name needs quotes",
    ),
    "open quote": ('x1.jpg,"tench\nx2.jpg,owl\n', "FILE, line 2: unexpected end of data"),
    "two class columns": (
        "filename,label,class_name\nx1.jpg,0,tench\n",
        "FILE: the columns label, class_name could all be the class; keep one of them",
    ),
    "no class": ("x1.jpg,\nx2.jpg,owl\n", "FILE, line 1: 'x1.jpg,' is not a file name and its class"),
    "two classes": ("x1.jpg owl\nx2.jpg owl\nx1.jpg shark\n", "FILE, line 3: x1 already has another class"),
    "several numbers": ("x1.jpg 3 4\nx2.jpg 1 0\n", "FILE, line 1: '3 4' is not one class"),
    "semicolons": ("x1.jpg;owl\nx2.jpg;shark\n", "FILE, line 1: 'x1.jpg;owl' is not a file name and its class"),
    "empty": ("\n", "FILE: names no images"),
    "an image without label": ("x1.jpg owl\n", "the labels file has no class for x2"),
    "labels of another folder": ("val/y/x1.jpg a\nx2.jpg b\ntrain/x2.jpg a\n", None),
    "a class without images": (
        "x1.jpg a\nx2.jpg c\nx3.jpg b\n",
        "classes without images: b; remove them, or give --classes: all classes in label order (one that is named "
        "there is kept)",
    ),
}


@pytest.mark.parametrize("case", REFUSED_TABLES)
def test_labels_files_that_are_refused(tmp_path: Path, refused: Callable[..., str], case: str) -> None:
    text, line = REFUSED_TABLES[case]
    source = folder(tmp_path / "images", "x1.jpg", "x2.jpg")
    labels = tmp_path / "labels.csv"
    labels.write_text(text)
    if line is None:  # the name as it is written decides
        result = make(source, tmp_path / "out", labels=labels)
        assert classes_in(tmp_path / "out", source) == {"x1.jpg": "a", "x2.jpg": "b"}
        assert result["notes"] == ["1 names in the labels file have no image in the source"]
        return
    with pytest.raises(UserError) as caught:
        make(source, tmp_path / "out", labels=labels)
    assert str(caught.value) == line.replace("FILE", str(labels))
    assert refused(TOOL, source, tmp_path / "out", "--labels", labels, keep=(tmp_path,)) == f"error: {caught.value}"


def test_labels_of_the_same_name_elsewhere_are_not_taken(tmp_path: Path) -> None:
    source = folder(tmp_path / "images", "a/x.jpg", "b/y.jpg")
    (tmp_path / "labels.txt").write_text("c/x.jpg owl\nb/y.jpg shark\n")
    with pytest.raises(UserError, match=r"^the labels file has no class for a/x$"):
        make(source, tmp_path / "out", labels=tmp_path / "labels.txt")
    (tmp_path / "labels.txt").write_text("images/a/x.jpg owl\nimages/b/y.jpg shark\n")
    make(source, tmp_path / "out", labels=tmp_path / "labels.txt")
    assert classes_in(tmp_path / "out", source) == {"a/x.jpg": "owl", "b/y.jpg": "shark"}


def test_labels_without_images_are_counted(tmp_path: Path) -> None:
    source = folder(tmp_path / "images", "x1.jpg", "x2.jpg")
    (tmp_path / "labels.txt").write_text("".join(f"x{i}.jpg {'ab'[i % 2]}\n" for i in range(9)))
    result = make(source, tmp_path / "out", labels=tmp_path / "labels.txt")
    assert result["notes"] == ["7 names in the labels file have no image in the source"]


# Folders of tools, empty folders, nested folders

TOOLS = (
    ".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", ".Trash", "lost+found", "$RECYCLE.BIN", "PaxHeaders.7",
    "#recycle",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_hidden_and_tool_folders_are_passed_over_and_counted(
    tmp_path: Path, rank_server: RankServer, kind: str
) -> None:
    source = folder(
        tmp_path / "images",
        *("a/1.jpg", "b/2.jpg", "a/._1.jpg", "a/Thumbs.db", "b/.DS_Store", "b/@eaDir/2.jpg/thumb.jpg"),
        *(f"{name}/1-checkpoint.jpg" for name in TOOLS),
    )
    packed_ = packed(source, tmp_path / "images.tar") if kind == "tar" else source
    done = rank_server.launch(ROOT / TOOL, packed_, tmp_path / "out", "--workers", "1").wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [
        "skipped 3 files that are not images",
        "passed over 10 hidden or tool folders: #recycle, $RECYCLE.BIN, .Trash, .git, .ipynb_checkpoints, ...",
    ]
    assert classes_in(tmp_path / "out", source) == {"a/1.jpg": "a", "b/2.jpg": "b"}
    assert (tmp_path / "out" / "classes.txt").read_text() == "a\nb\n"


EMPTY = (
    "classes without images: {}; remove them, or give --classes: all classes in label order (one that is named there "
    "is kept)"
)


@pytest.mark.parametrize("kind", ["folder", "tar", "tar of tars"])
@pytest.mark.parametrize("empty", [("b/",), ("b/x.bmp",), ("b/.DS_Store",), ("b/", "d/notes.txt")])
def test_a_class_without_images_is_refused_or_kept(
    tmp_path: Path, refused: Callable[..., str], unchanged, kind: str, empty: tuple[str, ...]
) -> None:
    source = folder(tmp_path / "images", "a/1.jpg", "c/2.jpg", *empty)
    tar = source
    if kind == "tar":
        tar = packed(source, tmp_path / "images.tar")
    elif kind == "tar of tars":
        tar = tmp_path / "images.tar"
        with tarfile.open(tar, "w") as outer:
            for inner in sorted(source.iterdir()):
                outer.add(packed(inner, tmp_path / "inner.tar"), f"{inner.name}.tar")
    line = EMPTY.format(", ".join(dict.fromkeys(name.partition("/")[0] for name in empty)))
    with unchanged(tmp_path), pytest.raises(UserError) as caught:
        make(tar, tmp_path / "out")
    assert str(caught.value) == line
    if kind == "folder":
        assert refused(TOOL, tar, tmp_path / "out", keep=(tmp_path,)) == f"error: {line}"
    make(tar, tmp_path / "two", classes=["a", "c"])
    assert sorted(labels_in(tmp_path / "two").values()) == [0, 1]
    kept = make(tar, tmp_path / "three", classes=["a", "b", "c"])
    assert labels_in(tmp_path / "three") == {jpeg(0): 0, jpeg(1): 2}
    assert kept["notes"] == ["classes without images: b"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("a/1.jpg", "b/more/2.jpg"), "., b"),
        (("train/a/1.jpg", "val/a/2.jpg"), "train, val"),
        (("1.jpg", "a/2.jpg"), "."),
        (("pets/cat/1.jpg", "pets/dog/2.jpg", "birds/owl/3.jpg"), "birds, pets"),
    ],
)
def test_nested_folders_are_refused(
    tmp_path: Path, refused: Callable[..., str], names: tuple[str, ...], found: str
) -> None:
    source = folder(tmp_path / "images", *names)
    assert refused(TOOL, source, tmp_path / "out", keep=(tmp_path,)) == (
        f"error: {source}: images must lie in class folders side by side (or --labels names their classes); "
        f"found {found}"
    )


# Damaged images


def damaged(root: Path) -> Path:
    """Three good ones of five in `b`, two of three in `a`."""
    folder(root, "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", "b/3.jpg")
    (root / "a" / "cut.jpg").write_bytes(jpeg()[:-40])
    (root / "b" / "empty.jpg").write_bytes(b"")
    (root / "b" / "page.jpg").write_bytes(b"<html>404</html>")
    return root


REASONS = (
    "a/cut.jpg: not a readable JPEG, PNG or WebP (Truncated File Read); "
    "b/empty.jpg: not a readable JPEG, PNG or WebP (empty); "
    "b/page.jpg: not a readable JPEG, PNG or WebP (its header is damaged)"
)


@pytest.mark.parametrize("allowed", [0, 2])
def test_all_damaged_images_are_named_and_nothing_is_written(
    tmp_path: Path, refused: Callable[..., str], allowed: int
) -> None:
    source = damaged(tmp_path / "images")
    line = (
        f"3 of 8 images are unreadable, which exceeds max_bad_samples={allowed} (--max-bad-samples 3 leaves them out): "
        f"{REASONS}"
    )
    options = ("--workers", "1", "--max-bad-samples", str(allowed))
    assert refused(TOOL, source, tmp_path / "out", *options, keep=(tmp_path,)) == f"error: {line}"
    with pytest.raises(UserError) as caught:
        make(source, tmp_path / "out", max_bad_samples=allowed)
    assert str(caught.value) == line


def test_damaged_images_are_left_out_on_request(tmp_path: Path, rank_server: RankServer, monkeypatch) -> None:
    source = damaged(tmp_path / "images")
    good = {path.read_bytes(): "ab".index(path.parent.name) for path in source.glob("*/[0-9].jpg")}
    options = ("--workers", "2", "--max-bad-samples", "3")
    done = rank_server.launch(ROOT / TOOL, source, tmp_path / "out", *options).wait()
    assert done.stdout.splitlines()[1] == "left out 3 unreadable images: a/cut.jpg, b/empty.jpg, b/page.jpg"
    assert labels_in(tmp_path / "out") == good
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    (tmp_path / "out" / "index.safetensors").unlink()
    (tmp_path / "out" / "train-000000.tar").unlink()
    monkeypatch.setattr(check, "decode", None)  # a resumed run does not decode again
    make(source, tmp_path / "out", max_bad_samples=3)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    with pytest.raises(UserError, match="which exceeds max_bad_samples=1"):
        make(source, tmp_path / "out", max_bad_samples=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


def test_held_out_images_are_readable_ones(tmp_path: Path) -> None:
    source = damaged(tmp_path / "images")
    result = make(
        source, tmp_path / "out", max_bad_samples=9, holdout=1, holdout_destination=tmp_path / "held", image_size=8
    )
    assert [split["samples"] for split in result["splits"]] == [3, 2]
    assert result["unreadable"] == ["a/cut.jpg", "b/empty.jpg", "b/page.jpg"]


def test_a_class_of_damaged_images_alone_is_refused(tmp_path: Path, unchanged) -> None:
    source = damaged(tmp_path / "images")
    (source / "a" / "1.jpg").unlink()
    (source / "a" / "2.jpg").unlink()
    with unchanged(tmp_path), pytest.raises(UserError) as caught:
        make(source, tmp_path / "out", max_bad_samples=9)
    assert str(caught.value) == "all images of class a are unreadable: a/cut.jpg, b/empty.jpg, b/page.jpg"
    with pytest.raises(UserError, match=r"^max_bad_samples must be >= 0, got -1$"):
        make(source, tmp_path / "out", max_bad_samples=-1)


@pytest.mark.parametrize("where", ["is a file", "in a file", "held out in a file"])
def test_a_destination_that_cannot_be_is_refused_before_images_are_read(
    tmp_path: Path, refused: Callable[..., str], where: str
) -> None:
    source = folder(tmp_path / "images", "a/1.jpg", "a/2.jpg")
    (tmp_path / "file").write_bytes(b"")
    bad = tmp_path / "file" if where == "is a file" else tmp_path / "file" / "out"
    more = ("--holdout", "1", "--holdout-dst", bad) if where == "held out in a file" else ()
    good = tmp_path / "out" if more else bad
    assert refused(TOOL, source, good, *more, keep=(tmp_path,)) == (
        f"error: {bad}: cannot be created or written to ({tmp_path / 'file'} is no folder that can be)"
    )


def test_a_second_destination_with_something_else_leaves_the_first_as_it_was(tmp_path: Path, unchanged) -> None:
    source = folder(tmp_path / "images", "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")
    make(source, tmp_path / "held")
    with unchanged(tmp_path), pytest.raises(UserError, match="held: holds shards of another source or other options"):
        make(source, tmp_path / "out", holdout=1, holdout_destination=tmp_path / "held")


@pytest.mark.parametrize("name", ["a/x\ny.jpg", "a\x1b[2J/x.jpg", "a/\udcff.jpg", "\udcff/x.jpg"])
def test_names_that_no_shard_can_hold_are_refused_before_anything_is_written(
    tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    source = folder(tmp_path / "images", "b/1.jpg", name)
    assert refused(TOOL, source, tmp_path / "out", keep=(tmp_path,)) == (
        f"error: {source}: {name!r}: a name must be UTF-8 without control characters; rename it"
    )
