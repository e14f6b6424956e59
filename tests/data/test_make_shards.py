import errno
import filecmp
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from scipy.io import savemat

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.shards import indexing
from fulllora_dist.data.shards import write as shard_writer
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.data.shards.scan import scan_file
from tests.ranks import RankServer

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"


def make(source: Path, destination: Path, **settings) -> dict:
    return make_shards(source, destination, **{"samples_per_shard": 7, "progress": False, **settings})


def source_files(folder: Path) -> Counter:
    return Counter((path.parent.name, path.read_bytes()) for path in folder.glob("*/*"))


def shard_files(folder: Path, classes: list[str]) -> Counter:
    """(class, bytes) of every sample, through tarfile alone."""
    found: Counter = Counter()
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        for name, data in files.items():
            key, _, extension = name.rpartition(".")
            if extension != "cls":
                assert extension == ("png" if data.startswith(b"\x89PNG") else "jpg")
                found[classes[int(files[key + ".cls"])], data] += 1
    return found


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def test_shards_hold_the_source_byte_for_byte_and_mix_classes(image_folder, shards) -> None:
    assert shard_files(shards, ["ant", "bee", "cat"]) == source_files(image_folder)
    index = Index.load(shards)
    assert [shard.samples for shard in index.shards] == [7, 7, 7, 7, 4]
    assert all(len(set(index.labels[index.columns["shard"] == i])) > 1 for i in range(5))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_same_images_same_bytes(image_folder, shards, tmp_path, kind: str) -> None:
    source = image_folder
    if kind == "tar":
        source = tmp_path / "source.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(image_folder, "./train")
    make(source, tmp_path / "again", workers=2 if kind == "folder" else 1)
    assert_same_files(tmp_path / "again", shards)


def test_a_restarted_run_makes_only_what_is_missing(image_folder, shards, tmp_path) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    (tmp_path / "index.safetensors").unlink()
    (tmp_path / "train-000001.tar").unlink()
    left = tmp_path / ".train-000001.tar.1-aa.tmp"
    left.write_bytes(b"what a killed run leaves" * 1000)
    os.utime(left, (0, 0))
    before = {path.name: path.stat().st_ino for path in tmp_path.glob("*.tar")}
    make(image_folder, tmp_path)
    assert_same_files(tmp_path, shards)
    assert before.items() <= {path.name: path.stat().st_ino for path in tmp_path.glob("*.tar")}.items()


def test_a_restarted_run_reads_no_finished_shard_again(image_folder, shards, tmp_path, own_cache, monkeypatch) -> None:
    write_samples, scanned = shard_writer._write_samples, []

    def cut_short(job, file):
        if job.name == "train-000003.tar":
            raise KeyboardInterrupt
        return write_samples(job, file)

    monkeypatch.setattr(shard_writer, "_write_samples", cut_short)
    with pytest.raises(KeyboardInterrupt):
        make(image_folder, tmp_path)
    monkeypatch.setattr(shard_writer, "_write_samples", write_samples)

    def noted(path: Path, *rest):
        scanned.append(path.name)
        return scan_file(path, *rest)

    for module in (shard_writer, indexing):
        monkeypatch.setattr(module, "scan_file", noted)
    make(image_folder, tmp_path)
    assert len(scanned) == 2
    assert all("train-00000" in name and name[-4:] == ".tmp" for name in scanned), "the new ones, before their names"
    assert_same_files(tmp_path, shards)
    assert not list((own_cache / "scans").iterdir())


def test_a_destination_with_something_else_is_refused(image_folder, shards, tmp_path) -> None:
    for settings in (
        {"limit": 20},
        {"samples_per_shard": 8},
        {"split_name": "val"},
        {"classes": ["bee", "ant", "cat"]},
    ):
        shutil.copytree(shards, tmp_path / "d", dirs_exist_ok=True)
        with pytest.raises(UserError, match="holds shards of another source or other options"):
            make(image_folder, tmp_path / "d", **settings)
    (tmp_path / "d" / "source.json").unlink()
    with pytest.raises(UserError, match="holds shards of another source"):
        make(image_folder, tmp_path / "d")
    shutil.copytree(shards, tmp_path / "e")
    shutil.copy(shards / "train-000000.tar", tmp_path / "e" / "train-000001.tar")
    with pytest.raises(UserError, match=r"train-000001\.tar: its keys are not those of the source"):
        make(image_folder, tmp_path / "e")


def test_holdout_takes_its_share_of_each_class_and_nothing_twice(image_folder, tmp_path) -> None:
    result = make(image_folder, tmp_path / "a", holdout=0.25, holdout_destination=tmp_path / "b")
    kept, held = (shard_files(tmp_path / name, ["ant", "bee", "cat"]) for name in "ab")
    assert kept + held == source_files(image_folder)
    assert Counter(name for name, _ in held).keys() == {"ant", "bee", "cat"}
    assert 4 <= held.total() <= 12
    assert [split["name"] for split in result["splits"]] == ["train", "train-holdout"]
    again = make(image_folder, tmp_path / "c", holdout=2, holdout_destination=tmp_path / "d", limit=20)
    fewer = shard_files(tmp_path / "d", ["ant", "bee", "cat"])
    assert Counter(name for name, _ in fewer) == {"ant": 2, "bee": 2, "cat": 2}
    assert again["splits"][1]["samples"] == 6
    assert Index.load(tmp_path / "b").hash == result["splits"][1]["index_hash"]


def held_out(folder: Path) -> set[str]:
    index = Index.load(folder)
    return {index.key(i) for i in range(len(index))}


def test_a_share_that_is_held_out_depends_on_each_key_alone(image_folder, tmp_path) -> None:
    """Twice the images and a class more: nothing that was there changes sides."""
    make(image_folder, tmp_path / "a", holdout=0.25, holdout_destination=tmp_path / "b")
    shutil.copytree(image_folder, tmp_path / "more")
    shutil.copytree(image_folder / "ant", tmp_path / "more" / "dog")
    for path in image_folder.glob("*/*"):
        shutil.copy(path, tmp_path / "more" / path.parent.name / f"new{path.name}")
    make(tmp_path / "more", tmp_path / "c", holdout=0.25, holdout_destination=tmp_path / "d")
    before, after = held_out(tmp_path / "b"), held_out(tmp_path / "d")
    assert before < after
    assert not after & held_out(tmp_path / "a")
    assert {key.partition("/")[0] for key in before} == {"ant", "bee", "cat"}


def test_a_small_class_gives_one_and_keeps_one(image_folder, tmp_path) -> None:
    for share, held in ((1e-9, 1), (0.999999, 7)):
        folders = tmp_path / f"kept{share}", tmp_path / f"held{share}"
        make(image_folder, folders[0], classes=["cat"], holdout=share, holdout_destination=folders[1])
        assert [len(held_out(folder)) for folder in folders] == [8 - held, held]


def test_a_number_that_is_held_out_is_displaced_by_new_images_alone(image_folder, tmp_path) -> None:
    make(image_folder, tmp_path / "a", holdout=3, holdout_destination=tmp_path / "b")
    shutil.copytree(image_folder, tmp_path / "more")
    shutil.copytree(image_folder / "ant", tmp_path / "more" / "dog")
    shutil.copy(image_folder / "bee" / "003.JPEG", tmp_path / "more" / "bee" / "new.JPEG")
    make(tmp_path / "more", tmp_path / "c", holdout=3, holdout_destination=tmp_path / "d")
    before, after = held_out(tmp_path / "b"), held_out(tmp_path / "d")
    assert {key for key in after if not key.startswith(("bee", "dog"))} == {k for k in before if k[:3] != "bee"}
    assert len(before & after) >= 8


def devkit(folder: Path, order: list[str], truth: list[str]) -> Path:
    """A development kit as ImageNet's: IDs in an order of their own, inner nodes of WordNet among them."""
    kind = [("ILSVRC2012_ID", int), ("WNID", object), ("words", object), ("gloss", object), ("num_children", int)]
    synsets = np.array([(i, name, "w", "g", 0) for i, name in enumerate([*order, "inner"], start=1)], dtype=kind)
    (folder / "data").mkdir(parents=True)
    savemat(folder / "data" / "meta.mat", {"synsets": synsets})
    lines = "".join(f"{order.index(name) + 1}\n" for name in truth)
    (folder / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    return folder


@pytest.fixture
def imagenet(image_folder, tmp_path) -> tuple[Path, Path, Path, Path]:
    """A tar of one tar a class; a tar of validation images; its development kit; Kaggle's table."""
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        for folder in sorted(image_folder.iterdir()):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for path in sorted(folder.iterdir()):
                    inner.add(path, f"{folder.name}_{path.name}")
            info = tarfile.TarInfo(f"{folder.name}.tar")
            info.size = buffer.tell()
            buffer.seek(0)
            outer.addfile(info, buffer)
    images = sorted(path for path in image_folder.glob("*/*") if path.suffix == ".JPEG")[::2]
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, len(images) + 1)]
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for name, path in zip(names, images, strict=True):
            tar.add(path, f"./{name}.JPEG")
    truth = [path.parent.name for path in images]
    table = tmp_path / "LOC_val_solution.csv"
    rows = [f"{name},{label} 1 2 3 4 {label} 5 6 7 8" for name, label in zip(names, truth, strict=True)]
    table.write_text("ImageId,PredictionString\n" + "\n".join(reversed(rows)) + "\n")
    return (
        tmp_path / "train.tar",
        tmp_path / "val.tar",
        devkit(tmp_path / "devkit", ["cat", "ant", "bee"], truth),
        table,
    )


def test_imagenets_tar_of_tars(image_folder, imagenet, tmp_path) -> None:
    make(imagenet[0], tmp_path / "d", workers=2)
    assert shard_files(tmp_path / "d", ["ant", "bee", "cat"]) == source_files(image_folder)
    assert Index.load(tmp_path / "d").key(0).split("/")[1].startswith(Index.load(tmp_path / "d").key(0).split("/")[0])


@pytest.mark.parametrize("kind", ["devkit folder", "devkit tar", "table"])
def test_imagenets_validation_part(image_folder, imagenet, tmp_path, kind: str) -> None:
    _, source, labels, table = imagenet
    if kind == "devkit tar":
        with tarfile.open(tmp_path / "devkit.tar.gz", "w:gz") as tar:
            tar.add(labels, "ILSVRC2012_devkit_t12")
        labels = tmp_path / "devkit.tar.gz"
    make(source, tmp_path / "d", labels=table if kind == "table" else labels, split_name="val")
    found = shard_files(tmp_path / "d", ["ant", "bee", "cat"])
    assert found.total() == len(sorted(image_folder.glob("*/*.JPEG"))[::2])
    assert not found - source_files(image_folder)  # every image has the class of the folder that it came from
    assert (tmp_path / "d" / "classes.txt").read_text() == "ant\nbee\ncat\n"


def test_labels_that_do_not_fit_are_refused(imagenet, tmp_path) -> None:
    _, source, labels, table = imagenet
    (labels / "data" / "ILSVRC2012_validation_ground_truth.txt").unlink()
    with pytest.raises(UserError, match=r"truth\.txt"):
        make(source, tmp_path / "d", labels=labels)
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match="the labels file has no class for ILSVRC2012_val_00000001"):
        make(source, tmp_path / "d", labels=table)
    table.write_text("one_column_only\n")
    with pytest.raises(UserError, match="line 1: 'one_column_only' is not a file name and its class"):
        make(source, tmp_path / "d", labels=table)
    with pytest.raises(UserError, match="cannot read labels"):
        make(source, tmp_path / "d", labels=tmp_path / "nowhere.txt")


def test_a_cut_inner_tar_is_refused(imagenet, tmp_path) -> None:
    with tarfile.open(imagenet[0]) as outer, tarfile.open(tmp_path / "cut.tar", "w") as cut:
        member = outer.getmembers()[0]
        data = outer.extractfile(member).read()[:5120]
        member.size = len(data)
        cut.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match=r"cut\.tar: ant\.tar: .*(truncated|no end marker)"):
        make(tmp_path / "cut.tar", tmp_path / "d")


def test_a_shard_that_is_not_what_was_to_be_written_gets_no_name(image_folder, tmp_path, monkeypatch) -> None:
    write = webdataset.ShardWriter.write

    def rotten(self, sample: dict) -> None:
        if sample["__key__"].endswith("003"):
            sample = {name: data[:-1] + b"?" if name == "jpg" else data for name, data in sample.items()}
        write(self, sample)

    monkeypatch.setattr(webdataset.ShardWriter, "write", rotten)
    with pytest.raises(UserError, match=r"train-00000\d\.tar: its crc32s are not those of the source"):
        make(image_folder, tmp_path)
    rotten_keys = {"ant/003", "bee/003", "cat/003"}
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert not rotten_keys & {name.partition(".")[0] for name in tar.getnames()}
    assert not (tmp_path / "index.safetensors").exists()


def test_a_link_in_a_source_tar_is_no_lost_image(image_folder, tmp_path) -> None:
    with tarfile.open(tmp_path / "source.tar", "w") as tar:
        tar.add(image_folder, "train")
        link = tarfile.TarInfo("train/ant/linked.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "train/ant/002.JPEG"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"'train/ant/linked\.jpg' is a link"):
        make(tmp_path / "source.tar", tmp_path / "d")


def test_a_link_in_an_inner_tar_is_none_either(image_folder, tmp_path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as inner:
        inner.add(image_folder / "ant" / "002.JPEG", "002.JPEG")
        link = tarfile.TarInfo("linked.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "002.JPEG"
        inner.addfile(link)
    with tarfile.open(tmp_path / "source.tar", "w") as outer:
        info = tarfile.TarInfo("ant.tar")
        info.size = buffer.tell()
        buffer.seek(0)
        outer.addfile(info, buffer)
    with pytest.raises(UserError, match=r"source\.tar: ant\.tar: member 'linked\.jpg' is a link"):
        make(tmp_path / "source.tar", tmp_path / "d")


def test_what_cannot_be_read_is_not_left_out(image_folder, tmp_path, monkeypatch) -> None:
    """A class folder, a link to nowhere, a tar."""
    source = tmp_path / "source"
    shutil.copytree(image_folder, source)
    (source / "cat" / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match=r"cat/lost\.jpg: cannot be read \(No such file"):
        make(source, tmp_path / "d")
    (source / "cat" / "lost.jpg").unlink()
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("bee"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(UserError, match=r"source/bee: cannot be read \(Permission denied\); fix its permissions"):
        make(source, tmp_path / "d")
    with tarfile.open(tmp_path / "source.tar", "w") as tar:
        tar.add(image_folder / "ant", "ant")

    def fail(*_) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fulllora_dist.data.shards.source.walk_tar", fail)
    with pytest.raises(UserError, match=r"source\.tar: cannot be read \(Input/output error\)"):
        make(tmp_path / "source.tar", tmp_path / "d")


def test_webps_are_images_too(image_folder, tmp_path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "webp" / name).mkdir(parents=True)
        for path in sorted((image_folder / name).iterdir())[:4]:
            Image.open(path).convert("RGB").save(tmp_path / "webp" / name / f"{path.stem}.webp")
    make(tmp_path / "webp", tmp_path / "a")
    assert {Index.load(tmp_path / "a").sample(i).ext for i in range(8)} == {"webp"}
    make(tmp_path / "webp", tmp_path / "b", image_size=10)
    assert {Index.load(tmp_path / "b").sample(i).ext for i in range(8)} == {"jpg"}


def test_shards_are_what_webdataset_reads(shards) -> None:
    stream = webdataset.WebDataset(sorted(map(str, shards.glob("*.tar"))), shardshuffle=False)
    read = [(sample["__key__"], int(sample["cls"])) for sample in stream]
    index = Index.load(shards)
    assert read == [(index.key(i), int(index.labels[i])) for i in range(32)]


def test_classes_choose_and_order_and_limit_balances(image_folder, tmp_path) -> None:
    make(image_folder, tmp_path, classes=["cat", "ant"], limit=9)
    index = Index.load(tmp_path)
    assert index.classes == ("cat", "ant")
    assert np.bincount(index.labels).tolist() == [5, 4]
    assert not shard_files(tmp_path, ["cat", "ant"]) - source_files(image_folder)


def test_what_is_skipped_is_what_a_limit_takes(image_folder, tmp_path) -> None:
    """Together they are all images, none of them twice; and so with a limit of the second part."""
    whole = ["ant", "bee", "cat"]
    make(image_folder, tmp_path / "first", limit=20)
    make(image_folder, tmp_path / "rest", skip=20)
    make(image_folder, tmp_path / "next", skip=20, limit=6)
    first, rest, some = (shard_files(tmp_path / name, whole) for name in ("first", "rest", "next"))
    assert not first & rest
    assert first | rest == source_files(image_folder)
    assert some < rest
    assert len(some) == 6


def test_image_size_re_encodes(image_folder, tmp_path) -> None:
    make(image_folder, tmp_path, image_size=10)
    sizes = set()
    for _, data in shard_files(tmp_path, ["ant", "bee", "cat"]):
        sizes.add(Image.open(io.BytesIO(data)).size)
    assert sizes == {(10, 10)}


def _truncate_a_image(folder: Path) -> None:
    path = folder / "bee" / "003.JPEG"
    path.write_bytes(path.read_bytes()[:-200])


def _add(name: str):
    def add(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "bee" / "003.JPEG", folder / name)

    return add


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(_truncate_a_image, r"bee/003\.JPEG: not a readable JPEG", id="unreadable"),
        pytest.param(
            _add("bee/004.jpeg"), r"bee/004\.(png|jpeg) and bee/004\..* would both be sample bee/004", id="key"
        ),
        pytest.param(_add("bee/more/9.jpg"), r"class folders side by side .* found \., bee", id="nested"),
    ],
)
def test_a_bad_source_is_refused_by_name_and_leaves_no_index(image_folder, tmp_path, spoil, message: str) -> None:
    shutil.copytree(image_folder, tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        make(tmp_path / "source", tmp_path / "d")
    assert not (tmp_path / "d" / "index.safetensors").exists()
    assert not list((tmp_path / "d").glob(".*.tmp"))


def test_a_cut_source_tar_is_refused(image_folder, tmp_path) -> None:
    with tarfile.open(tmp_path / "source.tar", "w") as tar:
        tar.add(image_folder, "train")
    with tarfile.open(tmp_path / "source.tar") as tar:
        last = tar.getmembers()[20].offset
    os.truncate(tmp_path / "source.tar", last)
    with pytest.raises(UserError, match=f"no end marker at offset {last}"):
        make(tmp_path / "source.tar", tmp_path / "d")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split_name": "a/b"}, "split name"),
        ({"workers": 0}, "workers must be >= 1, got 0"),
        ({"holdout": 0.1}, r"holdout 0.1 needs a folder for .*: holdout_destination \(--holdout-dst\)"),
        ({"holdout_destination": "x"}, r"\(--holdout-dst\) needs .*: holdout \(--holdout\)"),
        (
            {"holdout": 1.5, "holdout_destination": "x"},
            "holdout must be a share below 1 or a number of images, got 1.5",
        ),
        ({"holdout": 8, "holdout_destination": "x"}, "holdout 8: class cat has only 8 images"),
        ({"classes": ["ant", "dog"]}, "no images of dog"),
        ({"classes": ["ant", "ant"]}, "named twice"),
        ({"limit": 99}, "limit must be between 3 .* got 99"),
        ({"skip": 99}, "skip must be between 0 and .* got 99"),
        ({"skip": -1}, "skip must be between 0 and .* got -1"),
    ],
)
def test_bad_settings_are_refused(image_folder, tmp_path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(image_folder, tmp_path / "d", **settings)


def test_the_command(rank_server: RankServer, image_folder, shards, tmp_path) -> None:
    command = [TOOL, image_folder, tmp_path / "d", "--samples-per-shard", "7"]
    done = rank_server.launch(*command, "--workers", "2", "--json").wait()
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["splits"][0]["samples"] == 32
    assert "32/32" in done.stderr
    assert_same_files(tmp_path / "d", shards)
    done = rank_server.launch(*command, "--limit", "12", "--workers", "1").wait()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
