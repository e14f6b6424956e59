"""The same adapter and shards give the same verdicts from a notebook, on the command line, in training and in the
registry: what is not asked for is what the adapter was trained with, and the report says what that was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mlflow.models import Model
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

import fulllora_dist as fd
from fulllora_dist.commands import adapter_actions, adapters
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.evaluation.summary import table
from fulllora_dist.evaluation.trained import eval_transform
from fulllora_dist.registry.flavor import save_model
from tests.ranks import RankServer
from tests.tiny import ARCHITECTURE, SIDE, stir, tiny

ROOT = Path(__file__).parents[2]
NAMES = ["ant", "bee", "cat", "dog"]
OWN = {"crop_pct": 0.6, "interpolation": "bilinear"}  # the backbone's are 0.9 and bicubic
RECORD = {
    "threat": {"norm": "linf", "eps": 3 / 255},
    "seed": 5,
    "data": {"name": "zoo", "classes": NAMES, **OWN},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of 24 x 40 pixels, in which each crop is another image: 20 in class folders."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in NAMES:
        (root / name).mkdir()
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(pictures, folder, progress=False)
    return str(folder)


@pytest.fixture(scope="module")
def experiment(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.yaml, which says nothing of crops, and adapter/ with RECORD, unrecorded/ without."""
    folder = tmp_path_factory.mktemp("experiment")
    save_file(tiny(finetune="head").backbone.state_dict(), folder / "backbone.safetensors")
    settings = {
        "checkpoint_path": str(folder / "backbone.safetensors"),
        "num_classes": len(NAMES),
        "image_size": SIDE,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "model_kwargs": ARCHITECTURE,
    }
    backbone = "vit_tiny_patch16_224.augreg_in21k"
    adapted = stir(fd.create_model(backbone, **settings, rank=2))
    fd.save_adapter(adapted, str(folder / "adapter"), training=RECORD)
    fd.save_adapter(adapted, str(folder / "unrecorded"))
    config = {
        "model": settings | {"backbone": backbone},
        "adapter": {"rank": 2},
        "threat": {"eps": "3/255"},
        "method": {"name": "pgd", "steps": 1},
        "optim": {"batch_size": 10, "epochs": 1},
        "data": {"train": shards, "validation": shards, "num_workers": 0},
        "run": {"output_dir": str(folder / "run"), "seed": 5},
        "evaluation": {"attacks": ["clean", "pgd2", "apgd-ce"], "gradient_masking_samples": 0},
        "tracking": {"enabled": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


ATTACKS = ("clean", "pgd2", "apgd-ce")


def by_torchvision(model: torch.nn.Module, shards: str, pictures: Path, crop: float, mode: str) -> list[int]:
    """The classes of all images in the order of the index: Resize, CenterCrop and a forward pass."""
    steps = Compose([Resize(int(SIDE / crop), InterpolationMode(mode)), CenterCrop(SIDE), PILToTensor()])
    index = EvalStream(shards, batch_size=1, transform=EvalTransform(size=SIDE)).index
    images = [steps(Image.open(pictures / f"{index.key(i)}.png")) for i in range(len(index))]
    with torch.no_grad():
        return model(torch.stack(images).float() / 255).argmax(dim=1).tolist()


def _labels(shards: str) -> list[int]:
    return EvalStream(shards, batch_size=1, transform=EvalTransform(size=SIDE)).index.labels.tolist()


@pytest.fixture
def evaluate_py(rank_server: RankServer, experiment: Path, tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """evaluate_py(*arguments) -> what it prints, and its evaluation.json."""

    def launch(*arguments: str) -> tuple[str, dict[str, Any]]:
        output = tmp_path / "evaluation.json"
        common = ["--config", str(experiment / "config.yaml"), "--output", str(output)]
        done = rank_server.launch(ROOT / "fulllora_dist/evaluate.py", *common, *arguments).wait()
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(output.read_text())

    return launch


def test_a_notebook_and_the_command_line_report_the_same(
    evaluate_py: Callable[..., Any], experiment: Path, shards: str, pictures: Path
) -> None:
    """Every key of the report, and every image's verdict."""
    adapter = str(experiment / "adapter")
    printed, report = evaluate_py("--adapter", adapter, "evaluation.gradient_masking_samples=3")
    model = fd.load(adapter)
    here = fd.evaluate(model, shards, attacks=ATTACKS, gradient_masking_samples=3)
    assert report == json.loads(json.dumps(here)) | {"adapter": adapter}
    assert printed == table(here) + "\n"
    predicted = by_torchvision(model, shards, pictures, 0.6, "bilinear")
    right = [int(label == own) for label, own in zip(predicted, _labels(shards), strict=True)]
    assert here["attacks"]["clean"]["correct"] == right
    assert predicted != by_torchvision(model, shards, pictures, 0.9, "bicubic"), "the backbone's crop shows the same"
    own = {"size": SIDE, "crop_mode": "center", **OWN}
    assert here["pictures"] == own | {"batch_size": 64}
    assert here["own_pictures"] == own
    assert f"images: {SIDE} pixels, crop 0.6, bilinear, center" in printed.splitlines()


@pytest.mark.parametrize("arguments", [["--num-samples", "14"], ["--num-samples", "7", "evaluation.batch_size=3"]])
def test_of_some_images_too(
    evaluate_py: Callable[..., Any], experiment: Path, shards: str, arguments: list[str]
) -> None:
    adapter = str(experiment / "adapter")
    _, report = evaluate_py("--adapter", adapter, *arguments)
    size = 3 if len(arguments) == 3 else 64
    here = fd.evaluate(fd.load(adapter), shards, attacks=ATTACKS, num_samples=int(arguments[1]), batch_size=size)
    assert report == json.loads(json.dumps(here)) | {"adapter": adapter}


def test_an_adapter_without_a_record_has_the_backbone_s_crop(
    evaluate_py: Callable[..., Any], experiment: Path, shards: str, pictures: Path
) -> None:
    adapter = str(experiment / "unrecorded")
    _, report = evaluate_py("--adapter", adapter)
    model = fd.load(adapter)
    here = fd.evaluate(model, shards, attacks=ATTACKS, eps="3/255", seed=5)
    assert report == json.loads(json.dumps(here)) | {"adapter": adapter}
    assert {key: here["pictures"][key] for key in OWN} == {"crop_pct": 0.9, "interpolation": "bicubic"}
    predicted = by_torchvision(model, shards, pictures, 0.9, "bicubic")
    right = [int(label == own) for label, own in zip(predicted, _labels(shards), strict=True)]
    assert here["attacks"]["clean"]["correct"] == right


def test_a_crop_that_is_asked_for_is_said_beside_the_adapter_s_own(
    evaluate_py: Callable[..., Any], experiment: Path, shards: str
) -> None:
    printed, report = evaluate_py("--adapter", str(experiment / "adapter"), "data.crop_pct=1.0", "--attacks", "clean")
    line = f"images: {SIDE} pixels, crop 1, bilinear, center; the model's own: crop 0.6"
    assert line in printed.splitlines()
    model = fd.load(str(experiment / "adapter"))
    stream = EvalStream(shards, batch_size=64, transform=eval_transform(model, crop_pct=1.0))
    here = fd.evaluate(model, stream, attacks=("clean",))
    assert here["attacks"] == report["attacks"]
    assert line in table(here).splitlines()
    assert (report["pictures"]["crop_pct"], report["own_pictures"]["crop_pct"]) == (1.0, 0.6)


def test_a_run_ends_with_the_figures_of_a_notebook(rank_server: RankServer, experiment: Path, shards: str) -> None:
    """Its evaluation.json, and fd.evaluate of its adapter/ with nothing said."""
    settings = [f"data.{key}={value}" for key, value in OWN.items()]
    command = [ROOT / "fulllora_dist/train.py", "--config", experiment / "config.yaml", *settings]
    done = rank_server.launch(*command).wait()
    assert done.returncode == 0, done.stderr
    adapter = str(experiment / "run" / "adapter")
    report = json.loads((experiment / "run" / "evaluation.json").read_text())
    here = fd.evaluate(fd.load(adapter), shards, attacks=ATTACKS)
    assert report == json.loads(json.dumps(here)) | {"adapter": adapter}
    assert report["pictures"] == {"size": SIDE, "crop_mode": "center", "batch_size": 64, **OWN}
    assert report["classes"] == NAMES


def test_predictions_are_of_the_same_crop(experiment: Path, shards: str, pictures: Path, tmp_path: Path) -> None:
    output, adapter = tmp_path / "out.jsonl", str(experiment / "adapter")
    arguments = ["predict", adapter, shards, "--output", str(output)]
    _, result, _ = adapter_actions.predict_command(adapters._parser().parse_args(arguments))
    labels = [json.loads(line)["label"] for line in output.read_text().splitlines()]
    assert labels == by_torchvision(fd.load(adapter), shards, pictures, 0.6, "bilinear")
    assert result["own_pictures"] == {"size": SIDE, "crop_mode": "center", **OWN}


def test_an_mlflow_model_says_what_pixels_it_wants(experiment: Path, tmp_path: Path) -> None:
    save_model(str(experiment / "adapter"), str(tmp_path / "model"))
    metadata = Model.load(str(tmp_path / "model")).metadata
    assert metadata["pictures"] == {"size": SIDE, "crop_mode": "center", **OWN}
    assert metadata["classes"] == NAMES
    again = fd.load(str(tmp_path / "model"))
    assert eval_transform(again) == eval_transform(fd.load(str(experiment / "adapter")))


def test_a_second_saving_keeps_the_crop(experiment: Path, tmp_path: Path) -> None:
    fd.save_adapter(fd.load(str(experiment / "adapter")), str(tmp_path / "again"))
    assert eval_transform(fd.load(str(tmp_path / "again"))) == EvalTransform(size=SIDE, **OWN)


# ---- the ball and the seed


def _adapter(folder: Path, **record: Any) -> fd.AdaptedModel:
    fd.save_adapter(tiny(), str(folder / "adapter"), training=record)
    return fd.load(str(folder / "adapter"))


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [
        (("linf", 8 / 255), {}, ("linf", 8 / 255)),
        (("linf", 8 / 255), {"eps": "2/255"}, ("linf", 2 / 255)),
        (("linf", 8 / 255), {"norm": "linf"}, ("linf", 8 / 255)),
        (("linf", 8 / 255), {"norm": "l2", "eps": 0.5}, ("l2", 0.5)),
        (("l2", 0.7), {}, ("l2", 0.7)),
        (("l2", 0.7), {"norm": "l2"}, ("l2", 0.7)),
        (("l2", 0.7), {"norm": "linf"}, ("linf", 4 / 255)),
        (None, {}, ("linf", 4 / 255)),
    ],
)
def test_the_ball_is_that_of_the_training(
    tmp_path: Path, shards: str, trained: tuple[str, float] | None, asked: dict[str, Any], expected: tuple[str, float]
) -> None:
    record = {} if trained is None else {"threat": {"norm": trained[0], "eps": trained[1]}}
    report = fd.evaluate(_adapter(tmp_path, **record), shards, attacks=("clean",), **asked)
    assert (report["norm"], report["eps"]) == expected


@pytest.mark.parametrize(
    ("trained", "asked", "line"),
    [
        (
            "l2",
            {"eps": "8/255"},
            "norm: the adapter was trained for l2; give norm, as eps=8/255 has no meaning without",
        ),
        ("linf", {"norm": "l2"}, "eps: norm l2 has no default; give a length in pixels of [0, 1], e.g. 0.5"),
    ],
)
def test_a_ball_that_could_be_either_is_refused(
    tmp_path: Path, shards: str, trained: str, asked: dict[str, Any], line: str
) -> None:
    model = _adapter(tmp_path, threat={"norm": trained, "eps": 0.1})
    with pytest.raises(UserError) as caught:
        fd.evaluate(model, shards, attacks=("clean",), **asked)
    assert str(caught.value) == line


@pytest.mark.parametrize(("trained", "asked", "expected"), [(5, {}, 5), (5, {"seed": 0}, 0), (None, {}, 0)])
def test_the_seed_is_that_of_the_run(
    tmp_path: Path, shards: str, trained: int | None, asked: dict[str, int], expected: int
) -> None:
    record = {} if trained is None else {"seed": trained}
    assert fd.evaluate(_adapter(tmp_path, **record), shards, attacks=("clean",), **asked)["seed"] == expected
