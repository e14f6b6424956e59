"""Indexing what is there: on disk, over http, in a (mock) bucket; from Python and by the command."""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.shards.indexing import index_shards
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.storage import store
from tests.ranks import RankServer
from tests.services.fault_server import FaultServer
from tests.services.mock_s3 import MockS3, mock_s3

TOOLS = Path(__file__).parents[2] / "tools"
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def bucket() -> Iterator[MockS3]:
    with mock_s3() as s3:
        yield s3


@pytest.fixture
def s3(bucket: MockS3, monkeypatch: pytest.MonkeyPatch) -> MockS3:
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    bucket.log.clear()
    return bucket


def index(*shards: str, output: str | Path | None = None, **settings) -> dict:
    return index_shards(shards, None if output is None else str(output), progress=False, **settings)


def copied(shards: Path, folder: Path) -> Path:
    """The shards alone."""
    folder.mkdir(parents=True)
    for path in shards.glob("*.tar"):
        shutil.copy(path, folder)
    return folder


def test_local_shards_give_the_index_that_make_shards_gave(shards: Path, tmp_path: Path) -> None:
    folder = copied(shards, tmp_path / "d")
    result = index(str(folder), classes=CLASSES)
    assert (folder / "index.safetensors").read_bytes() == (shards / "index.safetensors").read_bytes()
    assert result == {
        "index": f"{folder}/index.safetensors", "samples": 32, "shards": 5, "classes": 3, "empty_classes": 0,
        "bytes": sum(path.stat().st_size for path in folder.glob("*.tar")), "reused_shards": 0, "skipped_members": 0,
        "index_hash": Index.load(shards).hash,
    }  # fmt: skip
    for spelling in ("train-{000000..000004}.tar", "train-00000[0-4].tar", "*.tar", "train-{000000,00000{1..4}}.tar"):
        os.remove(folder / "index.safetensors")
        index(f"{folder}/{spelling}", classes=3, workers=2)
        assert [shard.url for shard in Index.load(folder).shards] == [f"train-{i:06d}.tar" for i in range(5)]


def test_the_order_given_is_the_order_of_the_ids(shards: Path, tmp_path: Path) -> None:
    folder = copied(shards, tmp_path / "d")
    index(*(f"{folder}/train-{i:06d}.tar" for i in (3, 0)), output=tmp_path / "new" / "two.safetensors")
    two = Index.load(tmp_path / "new" / "two.safetensors")
    assert [shard.url for shard in two.shards] == [f"{folder}/train-000003.tar", f"{folder}/train-000000.tar"]
    whole = Index.load(shards)
    assert [two.key(i) for i in range(len(two))] == [whole.key(i) for i in [*range(21, 28), *range(7)]]


def test_shards_over_http(shards: Path, tmp_path: Path) -> None:
    def fault(request) -> str | None:
        return "503" if request.turn == 0 and request.name.endswith("2.tar") else None

    with FaultServer(copied(shards, tmp_path / "d"), fault) as server:
        index(f"{server.url}/train-{{000000..000004}}.tar", output=tmp_path, classes=CLASSES, workers=2)
        loaded, local = Index.load(tmp_path), Index.load(shards)
        assert loaded.hash == local.hash
        for i, shard in enumerate(loaded.shards):
            data = (shards / local.shards[i].url).read_bytes()
            assert loaded.shard_url(i) == f"{server.url}/train-{i:06d}.tar"
            assert (shard.sha256, shard.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
            assert shard.etag
        with pytest.raises(UserError, match=r"0\.tar\?\*\*\*: the index would hold what follows .* signatures too"):
            index(f"{server.url}/train-000000.tar?sig=swordfish", output=tmp_path)
        with pytest.raises(UserError, match="http has no listings"):
            index(f"{server.url}/*.tar", output=tmp_path)
        with pytest.raises(UserError, match=r"http\(s\) cannot be written to"):
            index(f"{server.url}/train-000000.tar")
        with pytest.raises(UserError, match=r"train-000009\.tar: does not exist"):
            index(f"{server.url}/train-000009.tar", output=tmp_path)


def test_shards_in_a_bucket(shards: Path, s3: MockS3, tmp_path: Path, own_cache: Path) -> None:
    url = s3.upload(copied(shards, tmp_path / "d"), "foreign/train")
    assert store.shards_in(url) == [f"{url}/train-{i:06d}.tar" for i in range(5)]
    for pattern in (url, f"{url}/*.tar", f"{url}/train-{{000000..000004}}.tar"):
        result = index(pattern, classes=CLASSES, workers=1)
        assert (result["index"], result["samples"]) == (f"{url}/index.safetensors", 32)
    loaded, local = Index.load(url), Index.load(shards)
    assert loaded.hash == local.hash
    assert [loaded.shard_url(i) for i in range(5)] == [f"{url}/train-{i:06d}.tar" for i in range(5)]
    for shard in loaded.shards:
        head = s3.client().head_object(Bucket="bucket", Key=f"foreign/train/{shard.url}")
        data = (shards / shard.url).read_bytes()
        assert (shard.etag, shard.bytes) == (head["ETag"], head["ContentLength"])
        assert shard.sha256 == hashlib.sha256(data).hexdigest()
        assert shard.etag.strip('"') == hashlib.md5(data).hexdigest()
    (fetched,) = (own_cache / "indexes").glob("*.safetensors")
    before = fetched.stat().st_ino
    assert Index.load(f"{url}/index.safetensors").hash == local.hash
    assert fetched.stat().st_ino == before
    index(f"{url}/train-000000.tar", classes=CLASSES)
    assert len(Index.load(url)) == 7  # a new index under the old name is fetched again


def test_each_byte_of_a_bucket_is_read_once(shards: Path, s3: MockS3, tmp_path: Path) -> None:
    url = s3.upload(copied(shards, tmp_path / "d"), "once")
    s3.log.clear()
    index(url, classes=CLASSES)
    for path in shards.glob("*.tar"):
        ranges = [(get.start, get.end) for get in s3.log if get.name == f"once/{path.name}"]
        assert sum(end - start for start, end in ranges) == path.stat().st_size


def test_credentials_that_do_not_fit_are_said_so(shards: Path, s3: MockS3, tmp_path: Path, monkeypatch) -> None:
    url = s3.upload(copied(shards, tmp_path / "d"), "closed")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    fsspec.filesystem("s3").clear_instance_cache()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"access denied.*check the credentials") as caught:
        index(f"{url}/train-000000.tar")
    assert "not-the-secret" not in str(caught.value)
    assert time.monotonic() - began < 30


def test_a_bucket_is_filled_by_make_shards(image_folder: Path, shards: Path, s3: MockS3) -> None:
    url = "s3://bucket/made/train"
    settings = {"samples_per_shard": 7, "progress": False}
    make_shards(image_folder, url, **settings)
    made, local = Index.load(url), Index.load(shards)
    assert made.hash == local.hash
    assert [shard.sha256 for shard in made.shards] == [shard.sha256 for shard in local.shards]
    client = s3.client()
    heads = [client.head_object(Bucket="bucket", Key=f"made/train/{shard.url}") for shard in made.shards]
    assert [shard.etag for shard in made.shards] == [head["ETag"] for head in heads]
    client.delete_object(Bucket="bucket", Key="made/train/train-000002.tar")
    client.delete_object(Bucket="bucket", Key="made/train/index.safetensors")
    make_shards(image_folder, url, **settings)
    after = [client.head_object(Bucket="bucket", Key=f"made/train/{shard.url}") for shard in made.shards]
    changed = [one["LastModified"] != other["LastModified"] for one, other in zip(heads, after, strict=True)]
    assert not any(changed[i] for i in (0, 1, 3, 4))
    assert Index.load(url).hash == local.hash
    with pytest.raises(UserError, match="holds shards of another source"):
        make_shards(image_folder, url, **{**settings, "samples_per_shard": 8})


def test_a_refusal_publishes_nothing_and_names_shard_and_offset(shards: Path, tmp_path: Path) -> None:
    folder = copied(shards, tmp_path / "d")
    broken = folder / "train-000003.tar"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"train-000003\.tar: .*offset \d+"):
        index(str(folder))
    assert not (folder / "index.safetensors").exists()
    broken.write_bytes(whole)
    result = index(str(folder))
    assert result["reused_shards"] >= 3
    with pytest.raises(UserError, match=r"label 2; there are 2 classes"):
        index(str(folder), classes=2)
    shutil.copy(broken, folder / "train-000009.tar")
    with pytest.raises(UserError, match=r"train-000009\.tar: sample .* the key is also that of .*train-000003\.tar"):
        index(str(folder))


def test_a_shard_that_was_replaced_is_read_again(shards: Path, tmp_path: Path) -> None:
    folder = copied(shards, tmp_path / "d")
    bad, good = folder / "train-000004.tar", folder / "train-000001.tar"
    whole = bad.read_bytes()
    bad.write_bytes(b"")
    with pytest.raises(UserError, match="train-000004"):
        index(str(folder))
    bad.write_bytes(whole)
    other = bytearray(good.read_bytes())
    place = other.index(b"\xff\xd8")
    other[place + 30] ^= 1
    good.write_bytes(other)
    assert index(str(folder))["reused_shards"] == 3
    assert Index.load(folder).shards[1].sha256 == hashlib.sha256(other).hexdigest()


def test_killed_at_any_time_it_resumes_without_rereading(rank_server: RankServer, shards: Path, tmp_path: Path) -> None:
    """Over http, each answer late: the server's log tells what was read."""
    with FaultServer(copied(shards, tmp_path / "d"), lambda request: "late") as server:
        server.late = 0.5
        command = [str(TOOLS / "index_shards.py"), f"{server.url}/train-{{000000..000004}}.tar"]
        command += ["--output", str(tmp_path / "out"), "--workers", "1", "--json"]
        (tmp_path / "out").mkdir()
        killed = rank_server.launch(*command)
        while len(server.log) < 3:
            assert killed.poll() is None
            time.sleep(0.02)
        killed.rank(0).kill()
        assert killed.wait().returncode == -signal.SIGKILL
        finished = {request.name for request, _ in server.log[:2]}
        assert len(finished) == 2
        assert not list((tmp_path / "out").iterdir())
        server.log.clear()
        done = rank_server.launch(*command).wait()
        assert done.returncode == 0, done.stderr
        read = [request.name for request, _ in server.log]
    assert sorted(read) == sorted({f"train-{i:06d}.tar" for i in range(5)} - finished)
    result = json.loads(done.stdout)
    assert (result["samples"], result["reused_shards"]) == (32, 2)
    assert "100%" in done.stderr


def test_shards_of_several_places_need_a_place_for_the_index(shards: Path, tmp_path: Path) -> None:
    folders = [copied(shards, tmp_path / name) for name in ("a", "b")]
    with pytest.raises(UserError, match="give --output for the index"):
        index(f"{folders[0]}/train-000000.tar", f"{folders[1]}/train-000001.tar")
    with pytest.raises(UserError, match=r"^shards: must name at least one, got none$"):
        index()
    with pytest.raises(UserError, match="named 2 times"):
        index(str(folders[0]), f"{folders[0]}/train-000000.tar")
    with pytest.raises(UserError, match="cannot point to local files"):
        index(str(folders[0]), output="s3://bucket/elsewhere")
    index(f"{folders[0]}/train-000000.tar", f"{folders[1]}/train-000001.tar", output=tmp_path)
    assert [shard.url for shard in Index.load(tmp_path).shards] == ["a/train-000000.tar", "b/train-000001.tar"]


def test_a_shard_has_the_same_name_in_the_index_however_its_path_is_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative or not, listed or spelt out; so that shards and index below one folder can move together."""
    folder = copied(shards, tmp_path / "set" / "what?")
    monkeypatch.chdir(tmp_path)
    spelt = "train-{000000..000004}.tar"
    for named, output in (
        ("set/what?", "set/what?/index.safetensors"),
        (f"set/what?/{spelt}", str(folder)),
        (f"{folder}/{spelt}", "set/../set/what?"),
    ):
        index(named, output=output)
        assert [shard.url for shard in Index.load(folder).shards] == [f"train-{i:06d}.tar" for i in range(5)]
        os.remove(folder / "index.safetensors")
    index(f"set/what?/{spelt}", output="set")
    assert Index.load("set").shards[0].url == "what?/train-000000.tar"
    monkeypatch.chdir(copied(shards, tmp_path / "elsewhere"))
    index(f"../set/what?/{spelt}", output="all.safetensors")
    assert Index.load("all.safetensors").shards[0].url == str(folder / "train-000000.tar")
    index("../set/what?/train-000000.tar", f"{folder}/train-000001.tar")
    assert [shard.url for shard in Index.load(folder).shards] == ["train-000000.tar", "train-000001.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pipe:cat x.tar", "must be a path or a URL of"),
        ("ftp://host/{0..3}.tar", "must be a path or a URL of"),
        ("{5..2.tar", "[Bb]race"),
        ("nowhere/*.tar", "no shards match"),
        ("nowhere.tar", r"nowhere\.tar: cannot be read"),
    ],
)
def test_bad_names_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        index(pattern)


def test_braces() -> None:
    assert store.expand(["http://h/{08..11}-{a,b}.tar"])[:3] == [
        "http://h/08-a.tar", "http://h/08-b.tar", "http://h/09-a.tar",
    ]  # fmt: skip


def test_the_command(rank_server: RankServer, shards: Path, tmp_path: Path) -> None:
    folder = copied(shards, tmp_path / "d")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    command = [TOOLS / "index_shards.py", folder, "--workers", "2"]
    done = rank_server.launch(*command, "--classes", tmp_path / "names.txt").wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder}/index.safetensors: 32 samples of 3 classes in 5 shards")
    assert Index.load(folder).classes == ("ant", "bee", "cat")
    for names, number in (("ant\n\nbee\ncat\n", "1 is ''"), ("ant\nbee\nant\n", "2 is 'ant'")):
        (tmp_path / "names.txt").write_text(names)
        done = rank_server.launch(*command, "--classes", tmp_path / "names.txt").wait()
        assert done.stderr == f"error: classes: number {number}; each label needs a name of its own\n"
    done = rank_server.launch(*command, "--classes", "2").wait()
    assert (done.returncode, done.stdout) == (2, "")
    assert "label 2; there are 2 classes" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
