"""Programs of others take a model as it is, and find our numbers."""

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from eval_cases import EPS, stream, train
from PIL import Image

import fulllora_dist as fd
from fulllora_dist.attacks.threat import Linf
from fulllora_dist.commands.evaluate import check_inputs, read_arguments
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.function import evaluate
from fulllora_dist.models.robustbench import export_robustbench, network
from tests.tiny import SIDE, stir, tiny


def _install(folder: Path, *packages: str) -> str:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
    subprocess.run(command, check=True, timeout=300)
    return str(folder)


@pytest.fixture(scope="module")
def torchattacks(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Without what it asks for: that is a `requests` of 2021, which it uses for downloads alone."""
    folder = _install(tmp_path_factory.mktemp("torchattacks"), "torchattacks==3.5.1")
    sys.path.append(folder)
    try:
        return importlib.import_module("torchattacks")
    finally:
        sys.path.remove(folder)


@pytest.mark.long
@pytest.mark.parametrize("name", ["fulllora", "full_at"])
def test_torchattacks(torchattacks: ModuleType, healthy: dict[str, fd.AdaptedModel], images: Path, name: str) -> None:
    model, batch = healthy[name], stream(images).read(stream(images).ids)
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


ROBUSTBENCH = ("robustbench==1.1.1", "geotorch", "torchdiffeq", "gdown", "beautifulsoup4", "soupsieve", "setuptools<81")
"""Not with its timm 1.0.9: it runs with ours."""
# Release 1.1.1 asks PyPI for pyautoattack, and calls it as the autoattack of GitHub, which is the same code: under this
# name, and with other names of arguments and results.
BENCHMARK = """
import json, sys
import pyautoattack, pyautoattack.state

class AutoAttack(pyautoattack.AutoAttack):
    def __init__(self, *args, log_path, **settings):
        super().__init__(*args, **settings)

    def run_standard_evaluation(self, x, y, bs, state_path):
        return super().run_standard_evaluation(x, y, batch_size=bs)[0]

pyautoattack.AutoAttack = AutoAttack
sys.modules |= {"autoattack": pyautoattack, "autoattack.state": pyautoattack.state}
import torch
from robustbench.eval import benchmark
from robustbench.model_zoo import model_dicts
from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
from robustbench.utils import load_model
from torchvision.transforms import ToTensor
import fulllora_dist as fd
adapter, data, n, eps = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
zoo = sys.path[0] + "/models/imagenet/Linf"
sys.path.append(zoo)
import Mine2026FullLoRA
model_dicts[BenchmarkDataset.imagenet][ThreatModel.Linf]["Mine2026FullLoRA"] = Mine2026FullLoRA.ENTRY
model = load_model("Mine2026FullLoRA", model_dir=sys.path[0] + "/models", dataset="imagenet", threat_model="Linf")
x = torch.rand(4, 3, 16, 16)
with torch.no_grad():
    torch.testing.assert_close(model(x), fd.load(adapter)(x))
settings = {"dataset": "imagenet", "threat_model": "Linf", "preprocessing": ToTensor(), "data_dir": data}
print(json.dumps(benchmark(model, n_examples=n, eps=eps, batch_size=n, **settings)))
"""


LISTED = 48
STRONG = 1.2 * EPS  # at which the model below is correct on some of them


def _imagenet(folder: Path, listed: list[str]) -> None:
    """ImageNet's folders with the first images of the list, and one in each: noise that its class has in common."""
    rng = np.random.default_rng(0)
    one_each = {name.split("/")[0]: name for name in listed}
    prototypes = {wnid: rng.integers(40, 216, (SIDE, SIDE, 3)) for wnid in sorted(one_each)}
    for name in {*listed[:LISTED], *one_each.values()}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noisy = prototypes[name.split("/")[0]] + rng.normal(0, 10, (SIDE, SIDE, 3))
        # PNG whatever its name says, so that both read the same pixels
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name, format="PNG")


@pytest.mark.long
def test_robustbench(tmp_path: Path) -> None:
    """`benchmark` reads its own list of ImageNet's images and the folder that they are in."""
    installed = _install(tmp_path / "robustbench", *ROBUSTBENCH)
    listed = (Path(installed) / "robustbench/helper_files/imagenet_test_image_ids.txt").read_text().splitlines()
    _imagenet(tmp_path / "val", listed)
    make_shards(tmp_path / "val", tmp_path / "shards", progress=False)
    (tmp_path / "ids.txt").write_text("\n".join(listed[:LISTED]))
    images = EvalStream(
        tmp_path / "shards",
        batch_size=LISTED,
        transform=EvalTransform(size=SIDE, crop_pct=1.0),
        subset=Subset(ids=str(tmp_path / "ids.txt")),
    )
    (batch,) = images
    classes = len(images.index.classes)  # three of ImageNet's have no image in the list
    model = tiny(num_classes=classes, mean=(0.5,) * 3, std=(0.25,) * 3, finetune="full", seed=0)
    train(model, (batch.pixels(), batch.labels), 300, 3, 3e-3)
    fd.save_adapter(model, str(tmp_path / "adapter"))
    export_robustbench(fd.load(str(tmp_path / "adapter")), tmp_path / "models/imagenet/Linf", "Mine2026FullLoRA")
    ours = evaluate(model.eval(), images, attacks=("clean", "autoattack"), eps=STRONG)["attacks"]

    (tmp_path / "benchmark.py").write_text(BENCHMARK)
    arguments = [tmp_path / "adapter", tmp_path, str(LISTED), str(STRONG)]
    path = os.pathsep.join([installed, str(Path(fd.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", tmp_path / "benchmark.py", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=600,
    )
    clean, robust = json.loads(done.stdout.splitlines()[-1])
    assert clean == pytest.approx(ours["clean"]["accuracy"], abs=1e-6)
    assert robust == pytest.approx(ours["autoattack"]["accuracy"], abs=2 / LISTED + 1e-6)
    assert 0.1 < robust < clean - 0.1


@pytest.mark.parametrize(
    "settings", [{}, {"finetune": "lora", "head": "trained"}, {"finetune": "full"}, {"family": "swin"}], ids=str
)
def test_the_exported_network_is_the_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Built from what the file for RobustBench says alone, with the weights beside it."""
    model = stir(tiny(**{"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), **settings}, seed=3)).eval()
    weights, loader = export_robustbench(model, tmp_path / "Linf", "Mine2026FullLoRA")
    assert len(loader.read_text().split("ENTRY")[1].splitlines()) < 10
    said: dict[str, Any] = {}
    for node in ast.parse(loader.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and node.targets[0].id != "ENTRY":  # type: ignore[attr-defined]
            said[node.targets[0].id] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
    built = network(said["BACKBONE"], said["ADAPTER"])
    built.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
    mean, std = (torch.tensor(said["BACKBONE"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(built((x - mean) / std), model(x))
    with pytest.raises(UserError, match=r"Mine2026FullLoRA.pt exists; give another name or folder"):
        export_robustbench(model, tmp_path / "Linf", "Mine2026FullLoRA")
    for name in ("Standard_ViT", "a/b", ""):
        with pytest.raises(UserError, match="name must be letters, digits"):
            export_robustbench(model, tmp_path / "other", name)
    assert not (tmp_path / "other").exists()


def test_the_preset_is_what_robustbench_asks_for(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: {backbone: none}\ndata: {train: none}\nrun: {output_dir: none}\noptim: {epochs: 1}\n"
        "threat: {norm: l2, eps: 3}\nmethod: {name: pgd}\nevaluation: {num_samples: 3, eps: [1], norms: [l1=9]}\n"
    )
    given = ["--config", str(file), "--preset", "robustbench"]
    _, config = read_arguments([*given, "--ids", "list.txt"])
    assert (config.threat.norm, config.threat.eps) == ("linf", 4 / 255)
    found = config.evaluation
    assert (found.attacks, found.ids) == (("clean", "autoattack"), "list.txt")
    assert (found.eps, found.norms, found.num_samples, found.first) == ((), (), None, None)
    for argument, value in (("--eps", "8/255"), ("--attacks", "pgd20"), ("--num-samples", "50")):
        with pytest.raises(UserError, match=f"{argument}: --preset robustbench has its own"):
            read_arguments([*given, argument, value])
    for override, words in (
        ("threat.eps=1/255", "threat.eps: --preset robustbench has its own"),
        ("evaluation.attacks=[clean]", "evaluation.attacks: --preset robustbench has its own"),
        ("evaluation.ids=list.txt", "evaluation.ids: with --preset robustbench give --ids"),
        ("threat={eps: 1/255}", "threat: --preset robustbench sets some of it"),
    ):
        with pytest.raises(UserError, match=words):
            read_arguments([*given, "--ids", "list.txt", override])
    _, config = read_arguments([*given, "--ids", "list.txt", "evaluation.batch_size=8"])
    assert config.evaluation.batch_size == 8
    if importlib.util.find_spec("robustbench") is None:
        with pytest.raises(UserError, match=r"not installed; give --ids imagenet_test_image_ids.txt"):
            read_arguments(given)


def test_the_preset_takes_robustbench_s_number_of_images_alone(images: Path, tmp_path: Path) -> None:
    listed = tmp_path / "few.txt"
    listed.write_text("0\n1\n2\n")
    config = Config.model_validate(
        {
            "model": {"backbone": "none"},
            "data": {"train": "none", "validation": str(images)},
            "run": {"output_dir": "none"},
            "optim": {"epochs": 1},
            "threat": {"eps": EPS},
            "method": {"name": "pgd"},
            "evaluation": {"ids": str(listed)},
        }
    )
    assert check_inputs(config, adapter=None) == str(images)
    with pytest.raises(UserError, match=r"^--ids: .*few.txt names 3 images; --preset robustbench needs .* 5,000 of"):
        check_inputs(config, adapter=None, preset="robustbench")


def test_a_loaded_model_is_a_plain_module_in_evaluation_mode(tmp_path: Path) -> None:
    """RobustBench and AutoAttack ask for that, and put neither normalisation nor softmax around it."""
    fd.save_adapter(stir(tiny(finetune="full")), str(tmp_path))
    model = fd.load(str(tmp_path))
    assert isinstance(model, torch.nn.Module)
    assert not model.training
    logits = model(torch.rand(2, 3, 16, 16))
    assert logits.shape == (2, 4)
    assert not torch.allclose(logits.sum(dim=1), torch.ones(2))


def _changed() -> fd.AdaptedModel:
    model = tiny()
    with torch.no_grad():
        model.backbone.norm.weight.add_(1)  # type: ignore[operator, union-attr]
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fd.adapt(tiny(finetune="head").backbone, rank=2), "is a module that adapt was given, which the file"),
        (lambda: tiny(precision="bf16"), "export_robustbench: precision: bf16 has rounded the blocks"),
        (_changed, "the values of norm.weight, which is frozen, changed after the model was created"),
    ],
)
def test_a_model_that_the_file_would_not_build_is_refused(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        export_robustbench(make(), tmp_path / "Linf", "Mine2026FullLoRA")
    assert not (tmp_path / "Linf").exists()
