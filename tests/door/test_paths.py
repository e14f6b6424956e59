"""Paths and URLs with characters that mean something to YAML, a shell, a URL or a pattern name what they say."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file

from fulllora_dist.config.load import load_config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.storage import store, urls
from tests.door.conftest import ROOT
from tests.ranks import RankServer

TRAIN = ROOT / "fulllora_dist" / "train.py"
CONFIG = """
model:
  backbone: vit_tiny_patch16_224
  pretrained: false
  num_classes: 2
  image_size: 16
  model_kwargs: {patch_size: 4, embed_dim: 32, depth: 1, num_heads: 2}
adapter: {rank: 2}
threat: {eps: 8/255}
method: fgsm_rs
data: {train: shards, validation: shards, num_workers: 0}
optim: {batch_size: 8, epochs: 1}
run: {output_dir: runs/plain}
evaluation: {attacks: [clean], gradient_masking_samples: 0}
"""
ODD = ["run#3 50% é", "what?50%20", "[a]*{b,c}", "~x; $y"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of 16 images and run.yaml."""
    folder = tmp_path_factory.mktemp("paths")
    for i in range(16):
        path = folder / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    make_shards(folder / "images", folder / "shards", workers=1, progress=False)
    (folder / "run.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path, rank_server: RankServer) -> Path:
    """The run without anything odd."""
    done = rank_server.launch(TRAIN, "--config", "run.yaml", "tracking=none", cwd=folder).wait()
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "plain"


@pytest.mark.parametrize("odd", ODD)
def test_a_run_in_an_odd_folder_is_the_plain_run(folder: Path, plain: Path, rank_server: RankServer, odd: str) -> None:
    """By command line: shards, output, the default store and its artifacts are all in that folder and nowhere else."""
    place = folder / "odd" / odd
    shutil.copytree(folder / "shards", place / "shards")
    before = set(os.listdir(folder)), set(os.listdir(folder / "odd"))
    data = [f"data.train={place}/shards/", f"data.validation={place}/shards"]
    tracking = ["tracking.system_metrics_interval_s=null"] if "?" not in odd else ["tracking=none"]
    done = rank_server.launch(
        TRAIN, "--config", "run.yaml", *data, f"run.output_dir={place}/run", *tracking, cwd=folder
    ).wait()
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(run / "adapter" / "adapter.safetensors") for run in (place / "run", plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert before == (set(os.listdir(folder)), set(os.listdir(folder / "odd")))
    if "?" not in odd:
        client = MlflowClient(f"sqlite:///{place}/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("fulllora").experiment_id])
        assert run.info.status == "FINISHED"
        assert (place / "mlruns" / run.info.run_id / "artifacts" / "config.yaml").exists()
    again = load_config(str(place / "run" / "config.yaml"))
    assert again.data.train == f"{place}/shards/"


def test_a_question_mark_needs_a_store_of_its_own(folder: Path, refused: Callable[..., str]) -> None:
    for name in ("a?b", "50%20"):
        line = refused(TRAIN, "--config", "run.yaml", f"run.output_dir={name}/run", cwd=folder, keep=(folder,))
        assert line == (
            f"error: command line: run.output_dir: the MLflow store beside it, sqlite:///{folder}/{name}/mlflow.db, "
            "must not have ? or %XX in its path; set tracking.uri, tracking=none or another folder"
        )


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("~/data", "{home}/data"),
        ("/data/run#3", "/data/run#3"),
        ("/data/run #3", "/data/run #3"),
        ("/data/50%20", "/data/50%20"),
        ("%20", "%20"),
        ("*.d", "*.d"),
        ("&a", "&a"),
        ("!x", "!x"),
        ("@x", "@x"),
        ("a: b", "a: b"),
        ("a=b", "a=b"),
        ("- x", "- x"),
        ("s3://bucket/a?b", "s3://bucket/a?b"),
        ("s3://bucket/a#b%20c", "s3://bucket/a#b%20c"),
        ("données/é", "données/é"),
        ("a/", "a/"),
        ("./a b", "./a b"),
        ("0123", "0123"),
        ("'[a]'", "[a]"),
        ('"{a}"', "{a}"),
    ],
)
def test_a_path_is_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, path: str) -> None:
    """On the command line as it is, in a file in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = path.format(home=tmp_path) if path.startswith("{home}") else path
    (tmp_path / "run.yaml").write_text(CONFIG)
    assert load_config(str(tmp_path / "run.yaml"), [f"data.train={written}"]).data.train == path
    quoted = written if written[0] in "'\"" else json.dumps(written)
    (tmp_path / "quoted.yaml").write_text(f"base: run.yaml\ndata: {{train: {quoted}}}\n")
    assert load_config(str(tmp_path / "quoted.yaml")).data.train == path


@pytest.mark.parametrize("key", ["data.validation", "data.held_out", "data.cache_dir", "model.checkpoint_path",
                                 "adapter.init_from", "run.output_dir", "run.checkpoint_dir", "run.resume_from",
                                 "evaluation.ids", "tracking.uri"])  # fmt: skip
def test_the_home_folder_is_meant_by_a_tilde_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir("/")
    section, name = key.split(".")
    pretrained = ["model.pretrained=true"] if key == "model.checkpoint_path" else []
    config = load_config("~/run.yaml", [f"{key}=~/x", *pretrained])
    assert getattr(getattr(config, section), name) == f"{tmp_path}/x"


def test_python_takes_a_tilde_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert len(Index.load("~/shards")) == 16
    assert store.shards_in("~/shards") == sorted(str(path) for path in (folder / "shards").glob("*.tar")) != []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("shards/*.tar", "data.train: shards/*.tar: must be the folder of the shards or its index, not the shards"),
        ("shards-{000000..000127}.tar", "data.train: shards-{000000..000127}.tar: must be the folder of the shards"),
        ("s3://b/x-{0..9}.tar", "data.train: s3://b/x-{0..9}.tar: must be the folder of the shards"),
        ("https://h/x.tar?sig=s", "data.train: https://h/x.tar?***: must be the folder of the shards"),
        ("https://h/run#3", "data.train: https://h/run#3: '#' ends the path of such a URL; write it as %23"),
        ("file:///data/run#3", "data.train: file:///data/run#3: '#' ends the path of such a URL; write it as %23"),
        ("file:///data/a?b", "data.train: file:///data/a?b: must be file:///PATH with '?' written as %3F"),
        ("file://data/a", "data.train: file://data/a: must be file:///PATH"),
        ("'  '", "data.train: must be a path or URL, got '  '"),
    ],
)
def test_what_would_be_another_place_is_refused(
    folder: Path, refused: Callable[..., str], value: str, words: str
) -> None:
    line = refused(TRAIN, "--config", "run.yaml", f"data.train={value}", "tracking=none", cwd=folder, keep=(folder,))
    assert words in line, line
    if "://" in value or "*" in value:
        with pytest.raises(UserError) as caught:
            Index.load(value)
        assert words.removeprefix("data.train: ") in str(caught.value)


def test_braces_and_patterns_that_are_names(tmp_path: Path) -> None:
    """What is there under its own name is no pattern; elsewhere patterns list."""
    for name in ("a[1]", "a1", "{b,c}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x-0.tar").touch()
        (tmp_path / name / "y.txt").touch()
    for name in ("a[1]", "a1", "{b,c}"):
        assert store.shards_in(str(tmp_path / name)) == [str(tmp_path / name / "x-0.tar")]
        assert store.expand([str(tmp_path / name)]) == [str(tmp_path / name / "x-0.tar")]
    assert store.expand([f"{tmp_path}/a?/*.tar"]) == [str(tmp_path / "a1" / "x-0.tar")]


@pytest.mark.parametrize("name", ["a b.tar", "a#1.tar", "50%.tar", "a%20b.tar", "what?.tar", "é.tar"])
def test_a_name_on_a_web_server_is_that_file(name: str) -> None:
    from urllib.parse import unquote, urlsplit

    for folder in ("https://h/p", "https://h/p/?sig=a%2Fb"):
        parts = urlsplit(urls.join(folder, name))
        assert (unquote(parts.path), parts.fragment) == (f"/p/{name}", "")
        assert parts.query == urlsplit(folder).query


def test_a_file_url_is_its_path() -> None:
    assert urls.local_path("file:///data/run%233/a%3Fb") == "/data/run#3/a?b"
    assert urls.local_path("file://localhost/data/50%2520") == "/data/50%20"
    assert urls.local_path("/data/run%233") == "/data/run%233"
