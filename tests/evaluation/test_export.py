"""Programs of others take a model as it is, and find our numbers."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from eval_cases import EPS, stream

import fulllora_dist as fd
from fulllora_dist.attacks.threat import Linf
from fulllora_dist.evaluation import EvalAttack
from tests.tiny import stir, tiny


@pytest.fixture(scope="module")
def torchattacks(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Without what it asks for: that is a `requests` of 2021, which it uses for downloads alone."""
    folder = str(tmp_path_factory.mktemp("torchattacks"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, "torchattacks==3.5.1"]
    subprocess.run(command, check=True, timeout=300)
    sys.path.append(folder)
    try:
        return importlib.import_module("torchattacks")
    finally:
        sys.path.remove(folder)


@pytest.mark.long
@pytest.mark.parametrize("name", ["fulllora", "full_at"])
def test_torchattacks(torchattacks: ModuleType, healthy: dict[str, fd.AdaptedModel], pictures: Path, name: str) -> None:
    model, batch = healthy[name], stream(pictures).read(stream(pictures).ids)
    x, y = batch.pixels(), batch.labels
    theirs = torchattacks.FGSM(model, eps=EPS)(x, y)
    ours = EvalAttack.parse("fgsm")(model, x, y, threat=Linf(EPS), seed=0, ids=batch.ids)
    assert (theirs - ours).abs().amax(dim=(1, 2, 3)).lt(1e-6).float().mean() > 0.98, "but for gradients near zero"
    theirs = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=10, random_start=False)(x, y)
    ours = fd.pgd(model, x, y, eps=EPS, steps=10, step_size=EPS / 4, random_start=False)
    with torch.no_grad():
        found = [(model(adversarial).argmax(dim=1) == y).float().mean().item() for adversarial in (theirs, ours)]
    assert found[0] == pytest.approx(found[1], abs=0.011)
    assert 0.05 < found[1] < 0.95


def test_a_loaded_model_is_a_plain_module_in_evaluation_mode(tmp_path: Path) -> None:
    """RobustBench and AutoAttack ask for that, and put neither normalisation nor softmax around it."""
    fd.save_adapter(stir(tiny(finetune="full")), str(tmp_path))
    model = fd.load(str(tmp_path))
    assert isinstance(model, torch.nn.Module)
    assert not model.training
    logits = model(torch.rand(2, 3, 16, 16))
    assert logits.shape == (2, 4)
    assert not torch.allclose(logits.sum(dim=1), torch.ones(2))
