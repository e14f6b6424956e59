"""tools/adapters.py as people and programs call it."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fulllora_dist as fd
from fulllora_dist.commands import adapters
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.models.adapter_diff import layer_differences
from fulllora_dist.models.adapter_file import read_adapter
from fulllora_dist.registry.mlflow_client import StoreError
from fulllora_dist.registry.predict import predict
from tests.ranks import RankServer
from tests.registry.conftest import TRAINING, evaluation, right
from tests.tiny import SIDE, stir, tiny

ROOT = Path(__file__).parents[2]
CLASSES = TRAINING["data"]["classes"]


def call(uri: str, *arguments: str) -> tuple[str, dict[str, Any], int]:
    """The command in this process: (text, JSON, exit code)."""
    args = adapters._parser().parse_args([*arguments, "--uri", uri])
    text, result, code = adapters._action(args.command)(args)
    json.dumps(result)
    return text, result, code


def test_from_publishing_to_rolling_back(sqlite: str, adapter: Callable[..., str], tmp_path: Path) -> None:
    folders = [adapter(seed=0), adapter(seed=1, rank=2)]
    for folder, n in zip(folders, (120, 150), strict=True):
        file = tmp_path / "evaluation.json"
        file.write_text(json.dumps(evaluation(right(n))))
        text, _, code = call(sqlite, "publish", folder, "--evaluation", str(file), "--name", "bees")
        assert code == 0
    assert text == "published: models:/bees/2"
    assert call(sqlite, "promote", "bees/1")[2] == 0
    text, result, code = call(sqlite, "promote", "bees/2", "--dry-run")
    assert (code, result["passed"]) == (0, True)
    text, result, code = call(sqlite, "promote", "bees/2", "--clean-floor", "1", "--margin", "0")
    assert (code, result["outcome"], result["champion"], result["previous"]) == (0, "promoted", 2, 1)
    assert text.splitlines()[0] == "models:/bees/2 is @champion now, @previous is 1"
    assert "  pgd20: +15.00 points to the champion (paired 95 %: +10.00 to +20.61)" in text.splitlines()
    text, result, code = call(sqlite, "promote", "bees@previous")
    assert (code, result["outcome"]) == (1, "refused")
    assert "  against it: pgd20: -15.00 points to the champion" in text

    text, result, _ = call(sqlite, "list")
    assert text.splitlines()[1].split() == [
        "bees",
        "2",
        "2",
        "100.0",
        "(98.1",
        "to",
        "100.0)",
        "75.0",
        "(68.6",
        "to",
        "80.5)",
        "pgd20",
    ]
    text, result, _ = call(sqlite, "list", "bees")
    assert [version["aliases"] for version in result["versions"]] == [("previous",), ("champion",)]
    assert "@champion" in text.splitlines()[2]
    text, result, _ = call(sqlite, "show", "bees@champion")
    assert result["address"] == "models:/bees/2"
    assert result["tags"]["adapter_sha256"] in text

    text, result, _ = call(sqlite, "diff", "bees/1", "bees/2")
    assert {"name": "adapter.rank", "a": 3, "b": 2} in result["settings"]
    (robust,) = [row for row in result["accuracy"]["rows"] if row["attack"] == "pgd20"]
    assert (robust["difference"], robust["only_b"]) == (pytest.approx(0.15), 30)
    assert "adapter.rank" in text

    pulled = tmp_path / "pulled"
    call(sqlite, "pull", "bees@champion", str(pulled))
    assert {"adapter.json", "adapter.safetensors", "evaluation.json", "README.md"} == set(os.listdir(pulled))
    assert (pulled / "adapter.safetensors").read_bytes() == Path(folders[1], "adapter.safetensors").read_bytes()
    assert json.loads((pulled / "evaluation.json").read_text()) == evaluation(right(150))
    with pytest.raises(UserError, match="pulled is not empty; choose another folder"):
        call(sqlite, "pull", "bees@champion", str(pulled))
    text, result, _ = call(sqlite, "rollback", "bees", "--reason", "slow")
    assert result == {"champion": 1, "left": 2}


def test_the_command_line(rank_server: RankServer, sqlite: str) -> None:
    """Exit codes, one line for a mistake, one JSON object."""
    tool, environment = ROOT / "tools" / "adapters.py", os.environ | {"MLFLOW_TRACKING_URI": sqlite}
    wrong = rank_server.launch(tool, "show", "no@champion", env=environment).wait()
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: there is no registered model no; there are: ")
    assert "Traceback" not in wrong.stderr
    fine = rank_server.launch(tool, "list", "--json", env=environment).wait()
    assert fine.returncode == 0, fine.stderr
    assert json.loads(fine.stdout).keys() == {"models"}


def test_layers_by_what_they_do() -> None:
    """Against the matrix that each branch applies to the normalised input."""
    a, b = stir(tiny(rank=3), 0), stir(tiny(rank=2, components=("q", "fc1")), 1)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("a", a), ("b", b)):
            fd.save_adapter(model, f"{folder}/{name}")
        rows = layer_differences(read_adapter(f"{folder}/a"), read_adapter(f"{folder}/b"))
    by_layer = {row["layer"]: row for row in rows}

    def matrix(model: fd.AdaptedModel, path: str) -> torch.Tensor:
        branch = model.backbone.get_submodule(path)
        return (branch.scale * branch.B @ (branch.A * branch.norm.weight)).detach()

    for layer in ("blocks.0.mlp.fc1.lnlora", "blocks.1.attn.qkv.lnlora.q"):
        first, second = matrix(a, layer), matrix(b, layer)
        row = by_layer[layer]
        assert row["a"] == pytest.approx(float(first.norm()), rel=1e-4)
        assert row["b"] == pytest.approx(float(second.norm()), rel=1e-4)
        assert row["difference"] == pytest.approx(float((second - first).norm()), rel=1e-4)
    assert by_layer["blocks.0.mlp.fc2.lnlora"]["b"] is None
    head = by_layer["head.weight"]
    assert head["difference"] == pytest.approx(
        float((b.backbone.head.weight - a.backbone.head.weight).norm()), rel=1e-4
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """23 images in class folders, one of them damaged."""
    rng = np.random.default_rng(0)
    for i in range(23):
        folder = tmp_path / "photos" / CLASSES[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE + i, SIDE + 3, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return tmp_path / "photos"


def expected(model: fd.AdaptedModel, file: Path) -> tuple[int, float]:
    """One image alone."""
    pixels = EvalTransform(size=SIDE, crop_pct=1.0)(file.read_bytes())
    with torch.no_grad():
        scores = model(pixels[None].float() / 255).softmax(dim=1)[0]
    return int(scores.argmax()), float(scores.max())


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_predictions_resume_where_they_were(photos: Path, tmp_path: Path, suffix: str) -> None:
    model, output = stir(tiny()), tmp_path / f"out.{suffix}"
    (photos / "ant" / "00.png").write_bytes(b"\x89PNG broken")
    transform = EvalTransform(size=SIDE, crop_pct=1.0)
    settings: dict[str, Any] = {"batch_size": 5, "progress": False, "adapter": "c0ffee"}
    counts = predict(model, str(photos), str(output), transform, CLASSES, **settings)
    assert counts == {"pictures": 23, "predicted": 23, "unreadable": 1}
    whole = output.read_bytes()
    if suffix == "jsonl":
        rows = {row["picture"]: row for row in map(json.loads, whole.decode().splitlines())}
        assert "not a readable JPEG, PNG or WebP" in rows["ant/00.png"]["error"]
        for name, row in rows.items():
            if "error" not in row:
                label, probability = expected(model, photos / name)
                assert (row["label"], row["class"]) == (label, CLASSES[label])
                assert row["probability"] == pytest.approx(probability, abs=2e-6)
    cut = whole[: len(whole) // 2]  # in the midst of a line
    output.write_bytes(cut)
    counts = predict(model, str(photos), str(output), transform, CLASSES, **settings)
    assert 0 < counts["predicted"] < 23
    assert sorted(output.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert predict(model, str(photos), str(output), transform, CLASSES, **settings)["predicted"] == 0
    with pytest.raises(UserError, match="holds predictions of the adapter c0ffee, this one is decade; choose another"):
        predict(model, str(photos), str(output), transform, CLASSES, **settings | {"adapter": "decade"})
    for begun in (whole[:10], whole[:1], b""):
        output.write_bytes(begun)
        assert predict(model, str(photos), str(output), transform, CLASSES, **settings)["predicted"] == 23
        lines = output.read_bytes().splitlines()
        assert [line[:20] for line in lines] == [line[:20] for line in whole.splitlines()], "whole lines, in order"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.jsonl", b"my notes"),
        ("notes.csv", b"my notes"),
        ("other.jsonl", b'{"picture": "a", "score": 3}\n{"pic'),
        ("other.csv", b"picture,score\na,3\nb"),
        ("short.csv", b"picture,class,label,probability,error,adapter\na,3\n"),
        ("list.jsonl", b"[1]\n"),
        ("latin.jsonl", b"\xe9\xe8\n\xff"),
        ("latin.csv", b"\xe9\xe8\n\xff"),
        ("nul.csv", b"\0\0\n"),
    ],
)
def test_predictions_over_another_file_are_refused(photos: Path, tmp_path: Path, name: str, content: bytes) -> None:
    output = tmp_path / name
    output.write_bytes(content)
    with pytest.raises(UserError, match=f"--output: .*{name} does not hold predictions") as caught:
        predict(tiny(), str(photos), str(output), EvalTransform(size=SIDE, crop_pct=1.0), CLASSES, progress=False)
    assert "\n" not in str(caught.value)
    assert output.read_bytes() == content


def test_predictions_that_cannot_be_written_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file").touch()
    for output in ("folder.jsonl", "file/out.jsonl"):
        with pytest.raises(UserError, match=f"--output: .*{output} cannot be written"):
            predict(tiny(), str(photos), str(tmp_path / output), EvalTransform(size=SIDE, crop_pct=1.0), CLASSES)


def test_predictions_for_shards(sqlite: str, adapter: Callable[..., str], photos: Path, tmp_path: Path) -> None:
    """The same as for the images that they were made of, and through the registry."""
    make_shards(photos, tmp_path / "shards", samples_per_shard=7, progress=False)
    training = TRAINING | {"data": TRAINING["data"] | {"crop_pct": 1.0}}
    folder = adapter(seed=0, training=training)
    call(sqlite, "publish", folder, "--name", "shown")
    for source, output in (("photos", "a.jsonl"), ("shards", "b.jsonl")):
        _, result, code = call(
            sqlite,
            "predict",
            "shown/1",
            str(tmp_path / source),
            "--output",
            str(tmp_path / output),
            "--batch-size",
            "4",
        )
        assert (code, result["predicted"]) == (0, 23)
    a, b = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("a.jsonl", "b.jsonl")
    )
    by_name = {row["picture"].removesuffix(".png"): row for row in a}
    for row in b:
        assert (row["label"], row["class"]) == (by_name[row["picture"]]["label"], by_name[row["picture"]]["class"])
    label, _ = expected(fd.load(folder), photos / "bee" / "01.png")
    assert by_name["bee/01"]["label"] == label
    with pytest.raises(UserError, match=r"--output must end in .jsonl or .csv, got .*out\.txt"):
        call(sqlite, "predict", folder, str(photos), "--output", str(tmp_path / "out.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no images"):
        call(sqlite, "predict", folder, str(tmp_path / "empty"), "--output", str(tmp_path / "c.csv"))


def test_an_error_of_the_store_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(StoreError("MLflow at x: gone", "IO")))
    assert (type(error), str(error), error.error_code) == (StoreError, "MLflow at x: gone", "IO")
