import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fulllora_dist.data.index import Index
from fulllora_dist.errors import UserError


def write_tar(path: Path, samples: list[tuple[str, int]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, label in samples:
            for name, data in ((f"{key}.jpg", key.encode()), (f"{key}.cls", b"%d" % label)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def same(a: Index, b: Index) -> bool:
    return (a.classes, a.shards, a.hash) == (b.classes, b.shards, b.hash) and all(
        np.array_equal(a.columns[name], b.columns[name]) for name in a.columns
    )


def test_a_saved_index_is_the_one_that_a_fresh_pass_makes(shards: Path) -> None:
    loaded = Index.load(shards)
    assert same(loaded, Index.build(shards, ["ant", "bee", "cat"]))
    assert (len(loaded), loaded.classes, loaded.labels.dtype) == (32, ("ant", "bee", "cat"), np.int64)
    assert Index.build(shards).classes == ("0", "1", "2")


def test_the_hash_pins_samples_and_not_their_packing(tmp_path: Path) -> None:
    def built(name: str, *parts: list[tuple[str, int]]) -> str:
        (tmp_path / name).mkdir()
        for i, part in enumerate(parts):
            write_tar(tmp_path / name / f"{i}.tar", part)
        return Index.build(tmp_path / name, ["x", "y"]).hash

    one, two, three = ("a", 0), ("b", 1), ("c", 0)
    packed = built("one", [one, two, three])
    assert built("two", [one], [two, three]) == packed
    others = [built("order", [two, one, three]), built("label", [one, ("b", 0), three]), built("fewer", [one, two])]
    assert len({packed, *others}) == 4


def test_refusals_over_several_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.tar shards"):
        Index.build(tmp_path)
    write_tar(tmp_path / "a.tar", [("k", 0), ("l", 1)])
    with pytest.raises(UserError, match=r"a\.tar: sample l at offset \d+ has label 1; there are 1 classes"):
        Index.build(tmp_path, ["only"])
    write_tar(tmp_path / "b.tar", [("m", 0), ("k", 0)])
    with pytest.raises(UserError, match=r"key k occurs twice: in a\.tar and b\.tar"):
        Index.build(tmp_path)


def test_a_missing_index_or_another_format_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.npz: no index there"):
        Index.load(tmp_path)
    with np.load(shards / "index.npz") as arrays:
        fields = dict(arrays)
    meta = {**json.loads(fields["meta"].tobytes()), "version": 99}
    fields["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(tmp_path / "index.npz", **fields)
    with pytest.raises(UserError, match="index format 99"):
        Index.load(tmp_path)


def test_rows_that_the_hash_does_not_fit_are_refused(shards: Path, tmp_path: Path) -> None:
    with np.load(shards / "index.npz") as arrays:
        fields = dict(arrays)
    fields["label"] = fields["label"][::-1]
    np.savez(tmp_path / "index.npz", **fields)
    with pytest.raises(UserError, match="hash does not fit its rows"):
        Index.load(tmp_path)


def test_an_index_that_points_outside_its_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    index = Index.load(shards)
    offset = index.columns["offset"].copy()
    offset[5] = index.shards[0].bytes - 1
    replace(index, folder=tmp_path, columns={**index.columns, "offset": offset}).save()
    with pytest.raises(UserError, match="points outside its shards"):
        Index.load(tmp_path)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_refused_or_changes_nothing(shards: Path, tmp_path: Path, place: float, bit: int) -> None:
    data = bytearray((shards / "index.npz").read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    (tmp_path / "index.npz").write_bytes(data)
    try:
        damaged = Index.load(tmp_path)
    except UserError:
        return
    assert same(damaged, Index.load(shards))


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_cut_index_is_refused(shards: Path, tmp_path: Path, keep: float) -> None:
    shutil.copy(shards / "index.npz", tmp_path)
    data = (tmp_path / "index.npz").read_bytes()
    (tmp_path / "index.npz").write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(UserError, match="damaged"):
        Index.load(tmp_path)
