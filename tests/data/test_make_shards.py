import filecmp
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fulllora_dist.data.index import Index
from fulllora_dist.data.write import make_shards
from fulllora_dist.errors import UserError

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
def test_same_pictures_same_bytes(image_folder, shards, tmp_path, kind: str) -> None:
    source = image_folder
    if kind == "tar":
        source = tmp_path / "source.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(image_folder, "./train")
    make(source, tmp_path / "again", workers=2 if kind == "folder" else 1)
    assert_same_files(tmp_path / "again", shards)


def test_a_restarted_run_makes_only_what_is_missing(image_folder, shards, tmp_path) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    (tmp_path / "index.npz").unlink()
    (tmp_path / "train-000001.tar").unlink()
    (tmp_path / ".train-000001.tar.tmp").write_bytes(b"what a killed run leaves" * 1000)
    before = {path.name: path.stat().st_ino for path in tmp_path.glob("*.tar")}
    make(image_folder, tmp_path)
    assert_same_files(tmp_path, shards)
    assert before.items() <= {path.name: path.stat().st_ino for path in tmp_path.glob("*.tar")}.items()


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
    assert Counter(name for name, _ in held) == {"ant": 4, "bee": 2, "cat": 2}
    assert [split["name"] for split in result["splits"]] == ["train", "train-holdout"]
    assert Index.load(tmp_path / "b").hash == result["splits"][1]["index_hash"]


def test_classes_choose_and_order_and_limit_balances(image_folder, tmp_path) -> None:
    make(image_folder, tmp_path, classes=["cat", "ant"], limit=9)
    index = Index.load(tmp_path)
    assert index.classes == ("cat", "ant")
    assert np.bincount(index.labels).tolist() == [5, 4]
    assert not shard_files(tmp_path, ["cat", "ant"]) - source_files(image_folder)


def test_image_size_encodes_anew(image_folder, tmp_path) -> None:
    make(image_folder, tmp_path, image_size=10)
    sizes = set()
    for _, data in shard_files(tmp_path, ["ant", "bee", "cat"]):
        sizes.add(Image.open(io.BytesIO(data)).size)
    assert sizes == {(10, 10)}


def _truncate_a_picture(folder: Path) -> None:
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
        pytest.param(_truncate_a_picture, r"bee/003\.JPEG: no readable JPEG or PNG", id="unreadable"),
        pytest.param(
            _add("bee/004.jpeg"), r"bee/004\.(png|jpeg) and bee/004\..* would both be sample bee/004", id="key"
        ),
        pytest.param(_add("bee/more/9.jpg"), "class folders side by side; found ., bee", id="nested"),
    ],
)
def test_a_bad_source_is_refused_by_name_and_leaves_no_index(image_folder, tmp_path, spoil, message: str) -> None:
    shutil.copytree(image_folder, tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        make(tmp_path / "source", tmp_path / "d")
    assert not (tmp_path / "d" / "index.npz").exists()
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
        ({"workers": 0}, "workers 0"),
        ({"holdout": 0.1}, "holdout 0.1: .* destination of its own"),
        ({"classes": ["ant", "dog"]}, "no pictures of dog"),
        ({"classes": ["ant", "ant"]}, "named twice"),
        ({"limit": 99}, "limit 99: between 3"),
    ],
)
def test_bad_settings_are_refused(image_folder, tmp_path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(image_folder, tmp_path / "d", **settings)


def test_the_command(image_folder, shards, tmp_path) -> None:
    command = [sys.executable, str(TOOL), str(image_folder), str(tmp_path / "d"), "--samples-per-shard", "7"]
    done = subprocess.run([*command, "--workers", "2", "--json"], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["splits"][0]["samples"] == 32
    assert "32/32" in done.stderr
    assert_same_files(tmp_path / "d", shards)
    done = subprocess.run([*command, "--limit", "12", "--workers", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
