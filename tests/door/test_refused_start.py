"""A start that is refused: one line, soon, and neither a folder, nor a config.yaml, nor an MLflow run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fulllora_dist.config.load import load_config
from fulllora_dist.core.errors import UserError
from fulllora_dist.training.run import train
from tests.door.runs import TRAIN, make_config, make_shards_of
from tests.ranks import RankServer

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = [
    ("optim.batch_size=64", "optim.batch_size: batch size 64 exceeds the 48 samples of the data"),
    ("model.num_classes=4", "data.train has 3 classes, but the model has 4 outputs; set model.num_classes=3 for a"),
    (
        "model.class_indices=[0,1] model.num_classes=null model.pretrained=true",
        "data.train has 3 classes, but the model has 2 outputs; set",
    ),
    ("data.train=gone", "data.train: gone/index.safetensors: no index there; fulllora shards writes one"),
    ("evaluation.attacks=[pgdd]", "evaluation.attacks: unknown attack 'pgdd'; known: clean, fgsm"),
    ("evaluation.eps=[400/255]", "evaluation.eps: 1.56863 is outside [0, 1], the range of a pixel"),
    (
        "method=pgdd",
        "command line: method: name: unknown method 'pgdd'; known: fgsm_rs, free, mart, n_fgsm, pgd, standard",
    ),
    ("evaluation.num_samples=49", "evaluation.num_samples must be between 1 and the 48 samples of data.validation"),
]
ON_META = [
    ("model.backbone=vit_tinny_patch16_224", "model.backbone: timm has no 'vit_tinny_patch16_224'; nearest: vit_tiny"),
    ("model.num_classes=null", "data.train has 3 classes, but the model has 1000 outputs; set model.num_classes=3"),
    ("model.model_kwargs.depth=two", "model: timm cannot build vit_tiny_patch16_224 with"),
    ("adapter.rank=null adapter.trainable_fraction=1e-9", "adapter.trainable_fraction: must be at least 0.0931 for"),
]
LATER = [
    ("deepspeed.zero_optimization.foo=3", "deepspeed: 1 validation error for DeepSpeedZeroConfig foo Extra inputs"),
    (
        "model.backbone=vit_tiny_patch16_224.augreg_in21k model.pretrained=true "
        "model.checkpoint_path={folder}/other.safetensors",
        "model.checkpoint_path: {folder}/other.safetensors does not fit the backbone (",
    ),
    ("adapter.init_from={folder}", "{folder}"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_config(tmp_path_factory.mktemp("refused"))
    import torch

    save_file({"x": torch.zeros(1)}, path.parent / "other.safetensors")
    return path


def command(config: Path, output: Path, *settings: str) -> list[str]:
    tracking = f"tracking.uri=sqlite:///{output.parent}/mlflow.db"
    return ["--config", str(config), f"run.output_dir={output}", "tracking.enabled=true", tracking, *settings]


@pytest.mark.parametrize(("settings", "line"), [*WITHOUT_TORCH, *ON_META, *LATER])
def test_a_mistake_is_one_line_and_leaves_nothing(
    refused: Callable[..., str], config: Path, tmp_path: Path, settings: str, line: str
) -> None:
    given = settings.format(folder=config.parent).split(" ")
    said = refused(TRAIN, *command(config, tmp_path / "out", *given), keep=(tmp_path,), cwd=config.parent)
    assert line.format(config=config, folder=config.parent) in said
    assert said.startswith("error: ")


@pytest.mark.parametrize("case", [WITHOUT_TORCH[0], ON_META[1], LATER[0]])
def test_of_two_ranks_one_speaks(
    rank_server: RankServer, unchanged: Callable, config: Path, tmp_path: Path, case: tuple[str, str]
) -> None:
    with unchanged(tmp_path):
        done = rank_server.launch(TRAIN, *command(config, tmp_path / "out", case[0]), ranks=2, cwd=config.parent).wait()
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {case[1]}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("case", [ON_META[1], LATER[0]])
def test_from_python_it_is_a_user_error(
    unchanged: Callable, config: Path, tmp_path: Path, case: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    _, path, *settings = command(config, tmp_path / "out", case[0])
    with unchanged(tmp_path), pytest.raises(UserError) as refused:
        train(load_config(path, settings))
    assert str(refused.value).startswith(case[1])


def cpu_seconds(*arguments: str, cwd: Path) -> tuple[float, str, set[str]]:
    """CPU time of a refused `python train.py`, what it says, and which of the slow packages it imported."""
    measure = (
        "import atexit, os, runpy, sys\n"
        "exit_at_once = os._exit\n"
        "def end(code):\n"
        "    slow = {'torch', 'timm', 'deepspeed', 'mlflow'} & set(sys.modules)\n"
        "    print(sum(os.times()[:2]), *slow, flush=True)\n"
        "    exit_at_once(code)\n"
        "os._exit = end\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", measure, TRAIN, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    seconds, *slow = done.stdout.split()
    return float(seconds), done.stderr, set(slow)


def cpu_seconds_of_imports() -> float:
    """Of torch and timm alone, as fast as this machine and its bytecode caches are."""
    measure = "import os, torch, timm; print(sum(os.times()[:2]))"
    return float(subprocess.run([sys.executable, "-c", measure], capture_output=True, text=True, check=True).stdout)


def test_config_and_files_are_refused_without_torch(config: Path, tmp_path: Path) -> None:
    for settings, line in (WITHOUT_TORCH[1], WITHOUT_TORCH[4]):
        seconds, said, slow = cpu_seconds(*command(config, tmp_path / "out", settings), cwd=config.parent)
        assert line in said
        assert not slow
        assert seconds < 2


def test_a_model_is_refused_without_deepspeed_and_mlflow(config: Path, tmp_path: Path) -> None:
    """An ordinary ViT-B with the wrong number of classes, whose weights are not even looked for."""
    real = ["model={backbone: vit_base_patch16_224.augreg2_in21k_ft_in1k}", "model.pretrained=true",
            "model.num_classes=null", "model.image_size=null"]  # fmt: skip
    path = tmp_path / "base.yaml"
    text = "".join(line for line in config.read_text().splitlines(True) if not line.startswith("  model_kwargs"))
    path.write_text(text)
    seconds, said, slow = cpu_seconds(*command(path, tmp_path / "out", *real), cwd=config.parent)
    assert said.startswith("error: data.train has 3 classes, but the model has 1000 outputs; set model.num_classes=3")
    assert said.count("\n") == 1
    assert slow == {"torch", "timm"}
    assert seconds < 2 * cpu_seconds_of_imports()  # most of it
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base.yaml"]


# -- an old folder -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_run(rank_server: RankServer, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in a folder with its MLflow store."""
    output = tmp_path_factory.mktemp("old") / "out"
    done = rank_server.launch(TRAIN, *command(config, output, "run.checkpoint_every=8"), cwd=config.parent).wait()
    assert done.returncode == 0, done.stderr
    return output


def test_other_data_on_an_old_folder_does_not_change_its_record(
    refused: Callable[..., str], config: Path, old_run: Path, tmp_path: Path
) -> None:
    other = make_shards_of(tmp_path, seed=1)
    both = [f"data.train={other}", f"data.validation={other}"]
    said = refused(TRAIN, *command(config, old_run, *both), keep=(old_run.parent,), cwd=config.parent)
    began = json.loads(max((old_run / "checkpoints").glob("*/checkpoint.json")).read_text())["stream"]["index_hash"]
    assert f"data.train: {other} is not the data that the run in {old_run} began with (index " in said
    assert f", not {began[:12]}); use the same data to resume, or another run.output_dir" in said


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("optim.lr=0.5", "run.output_dir: {output} holds a run with optim.lr=0.001, got 0.5"),
        ("run.seed=7", "run.output_dir: {output} holds a run with run.seed=0, got 7"),
        ("method=pgd", "run.output_dir: {output} holds a run with method"),
        ("optim.batch_size=64", "optim.batch_size: batch size 64 exceeds the 48 samples of the data"),
    ],
)
def test_other_settings_on_an_old_folder_do_not_either(
    refused: Callable[..., str], config: Path, old_run: Path, settings: str, line: str
) -> None:
    said = refused(TRAIN, *command(config, old_run, settings), keep=(old_run.parent,), cwd=config.parent)
    assert line.format(output=old_run) in said


def test_damaged_checkpoints_do_not_either(
    refused: Callable[..., str], config: Path, old_run: Path, tmp_path: Path
) -> None:
    """That is known only when all of them is read, and still before anything is written."""
    folder = shutil.copytree(old_run.parent, tmp_path / "copy")
    for description in (folder / "out" / "checkpoints").glob("*/checkpoint.json"):
        saved = json.loads(description.read_text())
        description.write_text(json.dumps(saved | {"backbone_sha256": "0" * 64}))
    said = refused(TRAIN, *command(config, folder / "out"), keep=(folder,), cwd=config.parent)
    assert "run.output_dir: none of the 2 checkpoints of" in said
