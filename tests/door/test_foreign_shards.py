"""Shards that others have written: webdataset's own reader says which samples they hold, or a line why not."""

import bz2
import gzip
import io
import json
import subprocess
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import base_plus_ext

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.reader import ShardReader
from fulllora_dist.data.shards.indexing import index_shards
from fulllora_dist.data.shards.leftovers import leftover
from fulllora_dist.data.shards.scan import scan_stream
from tests.ranks import RankServer

TOOL = "tools/index_shards.py"
ROOT = Path(__file__).parents[2]
Members = Sequence[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def image(number: int = 0, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (number * 37 % 256, number * 91 % 256, number)).save(buffer, kind)
    return buffer.getvalue()


def tar_bytes(members: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.size = len(data)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def shard(tmp_path: Path) -> Callable[[Members], Path]:
    def write(members: Members) -> Path:
        path = tmp_path / "set" / "set-000000.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tar_bytes(members))
        return path

    return write


def index(path: Path, **more) -> dict:
    return index_shards([str(path)], progress=False, **more)


def samples(folder: Path) -> list[tuple[str, bytes, str]]:
    """(key, image, class) by what training reads."""
    loaded = Index.load(folder)
    reader = ShardReader(loaded)
    return [(loaded.key(i), reader.read(i), loaded.classes[loaded.labels[i]]) for i in range(len(loaded))]


def by_webdataset(path: Path, field: str, label: str = "cls") -> list[tuple[str, bytes, str]]:
    stream = webdataset.WebDataset(str(path), shardshuffle=False)
    return [(sample["__key__"], sample[field], sample[label].decode().strip()) for sample in stream]


def refusal(path: Path, **more) -> str:
    with pytest.raises(UserError) as caught:
        index(path, **more)
    return str(caught.value)


# Keys


DOTTED = [
    ("a/s0.input.jpg", image(1)), ("a/s0.mask.png", image(2, "PNG")), ("a/s0.cls", b"0\n"),
    ("a.b/s1.INPUT.JPG", image(3)), ("a.b/s1.cls", b"1"),
    ("s2.cls", b"2"), ("s2.txt", b"a caption"), ("s2.input.jpg", image(4)), ("s2.target.jpg", image(5)),
]  # fmt: skip


def test_dotted_keys_are_webdatasets(shard, rank_server: RankServer) -> None:
    path = shard(DOTTED)
    theirs = by_webdataset(path, "input.jpg")
    assert [key for key, *_ in theirs] == ["a/s0", "a.b/s1", "s2"]
    index(path, image_field="input.jpg")
    assert samples(path.parent) == theirs
    done = rank_server.launch(ROOT / TOOL, path, "--image-field", "input.jpg", "--workers", "1").wait()
    assert (done.returncode, samples(path.parent)) == (0, theirs), done.stderr


RULE = "; a key ends at the first dot of a file name"


@pytest.mark.parametrize(
    ("members", "line"),
    [
        (
            DOTTED,
            "sample a/s0 at offset 0 must have one image (jpg, jpeg, png, webp), has 0: its members are input.jpg, "
            f"mask.png, cls{RULE}; --image-field input.jpg takes that one",
        ),
        (
            [("22.05.jpg", image()), ("22.05.cls", b"1")],
            "sample 22 at offset 0 must have one image (jpg, jpeg, png, webp), has 0: its members are 05.jpg, 05.cls"
            f"{RULE}; --image-field 05.jpg takes that one",
        ),
        (
            [("v1.jpg", image()), ("v1.0.cls", b"1")],
            f"sample v1 at offset 0 has no label: neither .cls nor .json; its members are jpg, 0.cls{RULE}",
        ),
        (
            [("k.jpg", image()), ("k.png", image()), ("k.cls", b"1")],
            "sample k at offset 0 must have one image (jpg, jpeg, png, webp), has 2: its members are jpg, png, cls; "
            "--image-field jpg takes that one",
        ),
        (
            [("k.bmp", image()), ("k.txt", b"x"), ("k.cls", b"1")],
            "sample k at offset 0 must have one image (jpg, jpeg, png, webp), has 0: its members are bmp, txt, cls",
        ),
    ],
)
def test_samples_without_one_image_or_label_say_what_they_have(shard, refused, members: Members, line: str) -> None:
    path = shard(members)
    with tarfile.open(path) as tar:
        place = {member.name: member.offset_data for member in tar.getmembers()}
    first = min(place[name] for name in place if not name.endswith((".bmp", ".txt")))
    line = f"{path}: {line.replace('offset 0', f'offset {first}')}"
    assert refusal(path) == line
    assert refused(TOOL, path, "--workers", "1", keep=(path.parent,)) == f"error: {line}"


def test_one_of_two_images_is_taken_by_name(shard) -> None:
    path = shard([("k.jpg", image(1)), ("k.PNG", image(2, "PNG")), ("k.cls", b"1")])
    index(path, image_field="png")
    assert samples(path.parent) == [("k", image(2, "PNG"), "1")] == by_webdataset(path, "png")
    assert refusal(path, image_field="txt") == (
        "image_field must end in jpg, jpeg, png, webp (as jpg or input.jpg), got 'txt'"
    )


@pytest.mark.parametrize("name", ["k.jpg", "k.JPG", "k.jpeg", "k.JPEG", "k.png", "k.Png", "k.webp", "k.WEBP"])
def test_extensions_of_images_in_any_case(shard, name: str) -> None:
    path = shard([(name, image()), ("k.CLS", b"0")])
    index(path)
    assert samples(path.parent) == by_webdataset(path, name[2:].lower())


@given(st.lists(st.text("ab./_", min_size=1, max_size=9), min_size=1, max_size=5, unique=True))
@settings(max_examples=300, deadline=None)
def test_keys_end_where_webdataset_ends_them(names: list[str]) -> None:
    """For whatever names: the same keys, or a refusal."""
    names = [f"{name}.jpg" for name in names if not name.startswith("/") and ".." not in name.split("/")]
    theirs = [base_plus_ext(name) for name in names]
    expected = [key for name, (key, ext) in zip(names, theirs, strict=True) if ext == "jpg" and leftover(name) is None]
    members = [(n, d) for name in names for n, d in ((name, b"j"), (name.removesuffix("jpg") + "cls", b"0"))]
    try:
        found = scan_stream(io.BytesIO(tar_bytes(members)), "s.tar").keys()
    except UserError:
        dotted = any(ext not in (None, "jpg") for _, ext in theirs)
        apart = len({key for key, _ in theirs}) < len(theirs)
        assert dotted or apart or any(name.endswith("/.jpg") or "//" in name for name in names)
    else:
        assert found == expected


# What stands between the samples


TOOLS = [
    ("d/", b""), (".DS_Store", b"x"), ("._a.jpg", b"x"), ("README.md", b"x"), ("LICENSE", b"x"),
    ("PaxHeaders.1/a.jpg", b"x"), ("__MACOSX/d/._a.jpg", b"x"), (".ipynb_checkpoints/a.jpg", b"x"),
    ("d/._a.jpg", b"x"), ("d/Thumbs.db", b"x"), ("@eaDir/a.jpg", b"x"), ("classes.txt", b"x"),
]  # fmt: skip


@pytest.mark.parametrize("place", ["before", "between", "inside", "after"])
def test_files_of_tools_are_passed_over_and_counted(shard, rank_server: RankServer, place: str) -> None:
    a, b = (
        [("d/a.jpg", image(1)), ("d/a.cls", b"0")],
        [("d/b.jpg", image(2)), ("d/b.txt", b"caption"), ("d/b.cls", b"1")],
    )
    path = shard(
        {
            "before": [*TOOLS, *a, *b],
            "between": [*a, *TOOLS, *b],
            "inside": [a[0], *TOOLS, a[1], *b],
            "after": [*a, *b, *TOOLS],
        }[place]
    )
    done = rank_server.launch(ROOT / TOOL, path.parent, "--workers", "1").wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["passed over 11 members that belong to no sample"]
    expected = [("d/a", image(1), "0"), ("d/b", image(2), "1")]
    assert samples(path.parent) == expected
    assert index(path)["skipped_members"] == 11
    if place != "inside":
        wds = webdataset.WebDataset(str(path), shardshuffle=False)
        whole = [s for s in wds if "cls" in s and "jpg" in s]
        assert [(s["__key__"], s["jpg"], s["cls"].decode()) for s in whole] == expected


def test_a_shard_of_other_members_alone_is_refused(shard, refused) -> None:
    path = shard(TOOLS)
    line = f"{path}: no samples, only 11 other members"
    assert refusal(path) == line
    assert (
        refused(TOOL, path, "--output", path.parent / "new", "--workers", "1", keep=(path.parent,)) == f"error: {line}"
    )


APART = [
    pytest.param([("a.jpg", 1), ("b.jpg", 2), ("a.cls", 0), ("b.cls", 1)], "a", id="all images first"),
    pytest.param([("a.cls", 0), ("b.cls", 1), ("b.jpg", 2), ("a.jpg", 1)], "a", id="one inside the other"),
    pytest.param([("a.jpg", 1), ("a.cls", 0), ("b.jpg", 2), ("b.cls", 1), ("a.json", 3)], "a", id="one too late"),
    pytest.param([("b.json", 3), ("a.jpg", 1), ("a.cls", 0), ("b.jpg", 2), ("b.cls", 1)], "b", id="one too early"),
]


@pytest.mark.parametrize(("order", "key"), APART)
def test_members_apart_are_refused_and_the_remedy_works(shard, refused, tmp_path: Path, order, key: str) -> None:
    contents = {"jpg": image, "cls": lambda n: b"%d" % n, "json": lambda n: b'{"x": 1}'}
    path = shard([(name, contents[name[2:]](number)) for name, number in order])
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    (first, late) = (
        m.offset_data
        for m, before in zip(members, [None, *members], strict=False)
        if m.name[0] == key and (before is None or before.name[0] != key)
    )
    line = (
        f"{path}: the members of sample {key} are not adjacent (offsets {first} and {late}), readers take them for "
        "two samples; unpack the shard and sort it: tar --sort=name -cf SHARD -C FOLDER ."
    )
    assert refused(TOOL, path, "--workers", "1", keep=(path.parent,)) == f"error: {line}"
    assert refusal(path) == line
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    command = line.rpartition(": ")[2].replace("SHARD", str(path)).replace("FOLDER", str(tmp_path / "folder"))
    subprocess.run(command.split(), check=True)
    index(path)
    assert samples(path.parent) == [("./a", image(1), "0"), ("./b", image(2), "1")] == by_webdataset(path, "jpg")


# Labels

NAMES = ["great white shark", "7", "owl", "été"]


def test_labels_may_be_names_of_classes(shard, rank_server: RankServer, tmp_path: Path) -> None:
    path = shard(
        [
            ("a.jpg", image(1)), ("a.cls", b"great white shark\n"), ("b.jpg", image(2)), ("b.cls", "été".encode()),
            ("c.jpg", image(3)), ("c.json", b'{"label": " owl "}'), ("d.jpg", image(4)), ("d.json", b'{"label": 2}'),
            ("e.jpg", image(5)), ("e.cls", b"\xef\xbb\xbf0\r\n"), ("f.jpg", image(6)), ("f.json", b'{"label": "3"}'),
        ]
    )  # fmt: skip
    expected = [NAMES[i] for i in (0, 3, 2, 2, 0, 3)]
    index(path, classes=NAMES)
    assert [name for *_, name in samples(path.parent)] == expected
    (tmp_path / "names.txt").write_bytes(("\ufeff" + "\r\n".join(NAMES) + "\r\n\r\n").encode())
    (path.parent / "index.safetensors").unlink()
    done = rank_server.launch(ROOT / TOOL, path, "--classes", tmp_path / "names.txt").wait()
    assert done.returncode == 0, done.stderr
    assert [name for *_, name in samples(path.parent)] == expected


INDEX = "which is not a class index"
LABELS = {
    "a name": (("cls", b"owl"), None, f"the label 'owl', {INDEX}; --classes FILE gives class names in label order"),
    "an unknown name": (("cls", b"eel"), NAMES, f"the label 'eel', {INDEX}, nor a class name"),
    "a name that is an index": (("cls", b"7"), ["7 of 9", *"abcdef7"], None),
    "a name of another index": (("cls", b"7"), NAMES, "label 7, which is an index and also the name of class 1"),
    "negative": (("cls", b"-1"), None, f"the label '-1', {INDEX}; --classes FILE gives class names in label order"),
    "real": (("cls", b"1.0"), None, f"the label '1.0', {INDEX}; --classes FILE gives class names in label order"),
    "a repr of bytes": (("cls", b"b'7'"), NAMES, f"the label \"b'7'\", {INDEX}, nor a class name"),
    "empty": (("cls", b" \n"), None, f"the label '', {INDEX}; --classes FILE gives class names in label order"),
    "json, bool": (("json", b'{"label": true}'), ["true", "false"], f"the label true, {INDEX}"),
    "json, real": (("json", b'{"label": 1.0}'), ["0.0", "1.0"], f"the label 1.0, {INDEX}"),
    "json, list": (("json", b'{"label": [3]}'), None, f"the label [3], {INDEX}"),
    "json, negative": (("json", b'{"label": -1}'), NAMES, f"the label '-1', {INDEX}, nor a class name"),
    "beyond the classes": (("cls", b"4"), NAMES, "label 4; there are 4 classes"),
    "wild": (("cls", b"999999999"), None, "label 999999999; it must be below 1000000"),
    "wilder": (("cls", b"9" * 900_000), None, f"label {'9' * 40}; it must be below 1000000"),
    "wild in json": (("json", b'{"label": 1000000}'), None, "label 1000000; it must be below 1000000"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_no_class_are_refused_at_once(shard, case: str, unchanged) -> None:
    (extension, data), names, line = LABELS[case]
    path = shard([("a.jpg", image()), (f"a.{extension}", data)])
    if line is None:
        index(path, classes=names)
        assert samples(path.parent) == [("a", image(), "7")]
        return
    tracemalloc.start()
    start = time.process_time()
    with unchanged(path.parent):
        found = refusal(path, classes=names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == f"{path}: sample a at offset 512 has {line}"
    assert peak < 16 << 20
    assert time.process_time() - start < 2


def test_the_largest_label_is_indexed(shard) -> None:
    path = shard([("a.jpg", image()), ("a.cls", b"999999")])
    assert index(path)["empty_classes"] == 999_999
    assert samples(path.parent)[0][2] == "999999"


@pytest.mark.parametrize("classes", ["999999999", "0"])
def test_a_wild_number_of_classes_is_refused(shard, refused, classes: str) -> None:
    path = shard([("a.jpg", image()), ("a.cls", b"0")])
    line = f"classes must be between 1 and 1000000, got {classes}"
    assert refused(TOOL, path, "--classes", classes, keep=(path.parent,)) == f"error: {line}"
    assert refusal(path, classes=int(classes)) == line


def test_a_wild_label_by_command(shard, refused) -> None:
    path = shard([("a.jpg", image()), ("a.cls", b"999999999")])
    assert path.stat().st_size < 11_000
    assert refused(TOOL, path, "--workers", "1", keep=(path.parent,)) == (
        f"error: {path}: sample a at offset 512 has label 999999999; it must be below 1000000"
    )


# Members that are no images, tars that are none


def test_empty_and_huge_images_are_refused(shard, tmp_path: Path) -> None:
    path = shard([("a.jpg", b""), ("a.cls", b"0")])
    assert refusal(path) == f"{path}: member 'a.jpg' at offset 0 has 0 bytes; an image has 1 to 1073741824"
    info = tarfile.TarInfo("a.jpg")
    info.size = (1 << 30) + 1
    with open(path, "wb") as file:
        file.write(info.tobuf())
        file.truncate(2 << 30)  # takes no disk
    assert refusal(path) == f"{path}: member 'a.jpg' at offset 0 has {info.size} bytes; an image has 1 to 1073741824"
    path.unlink()


GOOD = [("a.jpg", image()), ("a.cls", b"0")]


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (gzip.compress, "compressed with gzip; samples are addressed in a plain tar: decompress it"),
        (bz2.compress, "compressed with bzip2; samples are addressed in a plain tar: decompress it"),
        (lambda data: data[:1024], "member 'a.jpg' at offset 0 is truncated: its data ends beyond the 1024 bytes"),
        (lambda data: data[: len(data) - 10240 + 1536], None),
    ],
)
def test_tars_that_are_compressed_or_cut_are_refused(shard, refused, spoil, line: str | None) -> None:
    path = shard([("a.cls", b"0"), *GOOD] if line is None else GOOD)
    if line is None:  # cut between two members, where tarfile sees no mistake
        with tarfile.open(path) as tar:
            end = tar.getmembers()[1].offset
        path.write_bytes(path.read_bytes()[:end])
        line = f"no end marker at offset {end}: the shard was cut between two members"
    else:
        path.write_bytes(spoil(path.read_bytes()))
    assert refusal(path).startswith(f"{path}: {line}")
    assert refused(TOOL, path, "--workers", "1", keep=(path.parent,)).startswith(f"error: {path}: {line}")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(shard, kind: bytes) -> None:
    path = shard(GOOD)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = kind, "a.jpg"
        place = tar.offset
        tar.addfile(link)
    assert refusal(path) == f"{path}: member 'b.jpg' at offset {place} is not a plain file"


def test_the_command_says_the_same_in_json(shard, rank_server: RankServer) -> None:
    path = shard([*GOOD, *TOOLS])
    done = rank_server.launch(ROOT / TOOL, path, "--classes", "3", "--json").wait()
    result = json.loads(done.stdout)
    assert (result["samples"], result["skipped_members"], result["empty_classes"]) == (1, 11, 2)
