"""An unknown setting: the line names the setting that was meant, or where it is, and never another one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import fulllora_dist as fd
from fulllora_dist.config.describe import describe_settings
from fulllora_dist.config.load import load_config
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.suggest import MEANT, suggestion
from fulllora_dist.launching.resources import resources
from tests.door.conftest import ROOT
from tests.smallest import SMALLEST


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(SMALLEST)
    return tmp_path / "run.yaml"


MEANS = {
    "optim.learning_rate=1": "did you mean lr?",
    "optim.lr_rate=1": "did you mean lr?",
    "optim.learning-rate=1": "did you mean lr?",
    "optim.learning_rte=1": "did you mean lr?",
    "optim.min_learning_rate=0": "did you mean min_lr?",
    "optim.LR=1": "did you mean lr?",
    "optim.n_epochs=1": "did you mean epochs?",
    "optim.wd=0": "did you mean weight_decay?",
    "optim.max_grad_norm=1": "did you mean grad_clip?",
    "optim.batchsize=8": "did you mean batch_size?",
    "optim.wieght_decay=0": "did you mean weight_decay?",
    "threat.epsilon=0.1": "did you mean eps?",
    "data.workers=2": "did you mean num_workers?",
    "data.val=x": "did you mean validation?",
    "data.batch_size=8": "it is optim.batch_size or evaluation.batch_size",
    "model.lr=1": "it is optim.lr",
    "model.learning_rate=1": "it is optim.lr",
    "learning_rate=1": "it is optim.lr",
    "batch_size=8": "it is optim.batch_size or evaluation.batch_size",
    "eps=4/255": "it is threat.eps or evaluation.eps",
    "run.epochs=3": "it is optim.epochs",
    "run.out=x": "did you mean output_dir?",
    "run.ouptut=x": "did you mean output_dir?",
    "optmi.lr=1": "did you mean optim?",
    "adapter.lora_rank=3": "did you mean rank?",
    "adapter.r=3": "did you mean rank?",
    "adapter.lora_alpha=3": "did you mean alpha?",
    "distributed.grad_accum=2": "did you mean gradient_accumulation_steps?",
    "distributed.gradient_checkpointing=all": "did you mean activation_checkpointing?",
    "model.name=x": "did you mean backbone?",
    "model.img_size=32": "did you mean image_size?",
    "tracking.experiment=x": "did you mean experiment_name?",
    "method.num_steps=3": "did you mean steps?",
    "method.alpha=0.1": "did you mean step_size?",
    "method.stepz=3": "did you mean steps?",
    "method.eps=0.1": "it is threat.eps or evaluation.eps",
    "method.replays=4": "it is a setting of free; pgd takes steps, step_size, attention_drop, "
    "perturbation_mask, mask_patch, clean_fraction, random_start",
    "method=free method.steps=3": "it is a setting of mart, pgd, trades; free takes replays, step_size",
    "method=free method.num_steps=3": "it is a setting of mart, pgd, trades; free takes replays, step_size",
    "method=free method.alpha=0.1": "did you mean step_size?",
    "method=n_fgsm method.steps=3": "it is a setting of mart, pgd, trades; n_fgsm takes step, ",
    "guard={rollback_method: {name: free, steps: 3}}": "it is a setting of mart, pgd, trades; free takes replays",
    "phases=[{fraction: 1, method: {name: free, steps: 3}}]": "it is a setting of mart, pgd, trades; free takes",
    "phases=[{share: 1}]": "known: fraction, image_size, method, eps",
    "optim.colour=red": "known: lr, min_lr, warmup_ratio, betas, weight_decay, grad_clip, ema_decay, batch_size",
}


@pytest.mark.parametrize("overrides", MEANS)
def test_the_setting_that_was_meant(path: Path, overrides: str) -> None:
    arguments = [overrides] if "{" in overrides else overrides.split()
    with pytest.raises(UserError) as caught:
        load_config(str(path), arguments)
    line = str(caught.value)
    assert line.startswith("command line: unknown setting "), line
    assert line.split("; ", 1)[1].startswith(MEANS[overrides]), line


@pytest.mark.parametrize("override", ["optim.learning_rate=1", "data.workers=2", "method.alpha=0.1", "model.lr=1"])
def test_by_command_line(path: Path, refused: Callable[..., str], override: str) -> None:
    script = ROOT / "fulllora_dist" / "train.py"
    line = refused(script, "--config", path, override, cwd=path.parent, keep=(path.parent,))
    name = override.partition("=")[0]
    assert line == f"error: command line: unknown setting {name}; {MEANS[override]}"


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("lora_rank", "did you mean rank?"),
        ("img_size", "did you mean image_size?"),
        ("n_classes", "did you mean num_classes?"),
        ("dtype", "did you mean precision?"),
        ("trainable_fractoin", "did you mean trainable_fraction?"),
        ("checkpoint", "did you mean checkpoint_path?"),
    ],
)
def test_python_says_the_same_as_the_config(path: Path, key: str, answer: str) -> None:
    with pytest.raises(UserError) as caught:
        fd.create_model("vit_tiny_patch16_224", pretrained=False, **{key: 3})
    assert str(caught.value) == f"unknown setting {key}; {answer}"
    section = "adapter" if "rank" in key or "fract" in key else "model"
    with pytest.raises(UserError) as caught:
        load_config(str(path), [f"{section}.{key}=3"])
    assert str(caught.value) == f"command line: unknown setting {section}.{key}; {answer}"


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("partitoin", "did you mean partition?"),
        ("cpus-per-task", "did you mean cpus_per_task?"),
        ("gpus_per_nod", "did you mean gpus_per_node?"),
        ("colour", "known: nodes, gpus_per_node, "),
    ],
)
def test_profiles_too(key: str, answer: str) -> None:
    with pytest.raises(UserError) as caught:
        resources({key: 1}, {})
    assert str(caught.value).startswith(f"--profile: {key} is not a setting; {answer}")


def test_every_synonym_is_of_a_setting_that_there_is() -> None:
    described = describe_settings()
    sections = {"optim", "data"}
    for word, ours in MEANT.items():
        for name in ours:
            assert name in sections or f".{name} (" in described, (word, name)


def test_a_right_name_elsewhere_is_no_mistyped_other_one() -> None:
    assert suggestion("steps", ["step_size"], {"steps": "it is method.steps"}) == "it is method.steps"
    assert suggestion("steps", ["step_size", "replays"]) == "known: step_size, replays"
    assert suggestion("learning_rate", ["min_lr", "betas"]) == "known: min_lr, betas"
    assert json.dumps(suggestion("x", [])) == '"known: "'
