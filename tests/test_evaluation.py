"""The evaluator against a plain loop, one rank against two, and the command line."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.data.decode import EvalTransform
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.write import make_shards
from fulllora_dist.distributed.ranks import Ranks
from fulllora_dist.errors import UserError
from fulllora_dist.evaluation import EvalAttack, Evaluator, evaluate, table, write_evaluation
from fulllora_dist.rng import sample_rng
from tests.tiny import ARCHITECTURE, CLASSES, SIDE, stir, tiny

ROOT = Path(__file__).parents[1]
CLASS_SIZES = {"ant": 12, "bee": 9, "cat": 7, "dog": 5}
EPS = 2 / 255
ONE = Ranks(0, 1, torch.device("cpu"), control=None)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 noisy copies of four prototypes."""
    root, folder = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, count in CLASS_SIZES.items():
        (root / name).mkdir()
        prototype = rng.integers(60, 196, (SIDE, SIDE, 3))
        for i in range(count):
            noisy = prototype + rng.normal(0, 60, prototype.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    make_shards(root, folder, samples_per_shard=10, progress=False)
    return folder


def whole(shards: Path, n: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """All pictures in [0, 1], labels and ids as one batch."""
    transform = EvalTransform(size=SIDE, crop_pct=1.0)
    (batch,) = EvalStream(shards, batch_size=n or sum(CLASS_SIZES.values()), transform=transform, n=n)
    return batch.pixels(), batch.labels, batch.ids


@pytest.fixture(scope="module")
def model(shards: Path) -> fd.AdaptedModel:
    """A tiny ViT whose head separates the classes, so that attacks have something to break."""
    model = tiny(finetune="head", mean=(0.5,) * 3, std=(0.5,) * 3)
    x, y, _ = whole(shards)
    with torch.no_grad():
        features = model.backbone.forward_head(model.backbone.forward_features((x - 0.5) / 0.5), pre_logits=True)
        solution = torch.linalg.lstsq(features, 4 * F.one_hot(y, CLASSES).float(), driver="gelsd").solution
        model.backbone.head.weight.copy_(solution.t())
        model.backbone.head.bias.zero_()
    return model


def plain_loop(model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, name: str, steps: int, restarts: int) -> list[bool]:
    """PGD of Madry et al. for one picture after the other: whether each is still right under every restart."""
    correct = []
    for i in range(len(x)):
        own, right = x[i : i + 1], True
        for restart in range(restarts):
            start = sample_rng(7, f"eval/{name}/start/{restart}", 0, ids[i : i + 1]).uniform(own.shape[1:])
            adv = (own + (2 * start - 1) * EPS).clamp(0, 1)
            for _ in range(steps):
                adv.requires_grad_()
                logits = model(adv)[0]
                others = torch.cat([logits[: y[i]], logits[y[i] + 1 :]])
                loss = others.max() - logits[y[i]] if name.startswith("cw") else -F.log_softmax(logits, 0)[y[i]]
                (gradient,) = torch.autograd.grad(loss, adv)
                moved = adv.detach() + min(2.5 * EPS / steps, EPS) * gradient.sign()
                adv = torch.minimum(torch.maximum(moved, own - EPS), own + EPS).clamp(0, 1)
            right &= bool(model(adv).argmax() == y[i])
        correct.append(right)
    return correct


@pytest.mark.parametrize(("name", "steps", "restarts"), [("clean", 0, 0), ("pgd4", 4, 1), ("cw4", 4, 1), ("pgd2x3", 2, 3)])
def test_equals_a_plain_loop(shards: Path, model: fd.AdaptedModel, name: str, steps: int, restarts: int) -> None:
    x, y, ids = whole(shards)
    if name == "clean":
        expected = (model(x).argmax(dim=1) == y).tolist()
    else:
        expected = plain_loop(model, x, y, ids, name, steps, restarts)
        assert 0 < sum(expected) < len(expected), "this radius shows nothing"
    stream = EvalStream(shards, batch_size=7, transform=EvalTransform(size=SIDE, crop_pct=1.0))
    model.train()
    result = Evaluator([name], EPS, ONE, seed=7).run(model, stream)
    assert model.training
    model.eval()
    assert result["ids"] == ids.tolist()
    score = result["attacks"][name]
    assert score["correct"] == [int(right) for right in expected]
    assert score["accuracy"] == sum(expected) / len(expected)
    by_class = {c: [int(np.array(expected)[y == k].sum()), int((y == k).sum())] for k, c in enumerate(CLASS_SIZES)}
    assert score["per_class"] == by_class


def test_restarts_and_loss_matter(shards: Path, model: fd.AdaptedModel) -> None:
    """The plain loop would prove little if all attacks had the same result."""
    attacks = fd.evaluate(model, stream(shards), attacks=("pgd4", "cw4", "pgd2", "pgd2x3"), eps=EPS, seed=7)["attacks"]
    correct = {name: score["correct"] for name, score in attacks.items()}
    assert correct["pgd4"] != correct["cw4"]
    assert sum(correct["pgd2x3"]) < sum(correct["pgd2"])


def stream(shards: Path, n: int | None = None, **ranks: int) -> EvalStream:
    return EvalStream(shards, batch_size=4, transform=EvalTransform(size=SIDE, crop_pct=1.0), n=n, **ranks)


def test_cw_moves_along_the_margin() -> None:
    """On a linear model one step from the picture goes along the sign of w_runner-up - w_own."""
    torch.manual_seed(0)
    layer = nn.Linear(3 * 2 * 2, 5)
    x, y = torch.full((6, 3, 2, 2), 0.5), torch.tensor([0, 1, 2, 3, 4, 0])
    flat = nn.Sequential(nn.Flatten(), layer)
    ids = torch.arange(6)
    moved = EvalAttack.parse("cw1")(flat, x, y, eps=0.1, seed=0, ids=ids) - x
    start = (2 * sample_rng(0, "eval/cw1/start/0", 0, ids).uniform((3, 2, 2)) - 1) * 0.1
    for i in range(6):
        logits = flat(x[i : i + 1] + start[i])[0].detach()
        logits[y[i]] = -math.inf
        direction = (layer.weight[logits.argmax()] - layer.weight[y[i]]).sign().view(3, 2, 2)
        expected = (start[i] + 0.1 * direction).clamp(-0.1, 0.1)  # 2.5 eps / 1 is capped at eps
        torch.testing.assert_close(moved[i], expected)


@pytest.mark.parametrize("n", [12, 14, 33])
def test_n_is_balanced_and_wilson_is_the_formula(shards: Path, model: fd.AdaptedModel, n: int) -> None:
    results = evaluate(model, stream(shards, n), attacks=("pgd2",), eps="8/255")
    score = results["attacks"]["pgd2"]
    assert results["n"] == n == len(set(results["ids"])) == len(score["correct"])
    counts = [count for _, count in score["per_class"].values()]
    assert sum(counts) == n
    assert all(count >= min(n // 4, size) for count, size in zip(counts, CLASS_SIZES.values(), strict=True))
    p, z = sum(score["correct"]) / n, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (score["low"], score["high"]) == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_eps_zero_is_clean(shards: Path, model: fd.AdaptedModel) -> None:
    attacks = evaluate(model, stream(shards), attacks=("clean", "pgd3", "cw3x2"), eps=0)["attacks"]
    assert attacks["pgd3"] == attacks["cw3x2"] == attacks["clean"]


def test_a_sample_counted_twice_or_never_is_noticed(shards: Path, model: fd.AdaptedModel) -> None:
    whole_stream = stream(shards)
    for batches in ([*whole_stream, next(iter(whole_stream))], list(whole_stream)[1:]):
        broken = SimpleNamespace(ids=whole_stream.ids, index=whole_stream.index)
        broken_stream = type("Broken", (), {"__len__": lambda _: 1, "__iter__": lambda _, b=batches: iter(b)})()
        vars(broken_stream).update(vars(broken))
        with pytest.raises(AssertionError, match="exactly once"):
            evaluate(model, broken_stream, attacks=("clean",))


@pytest.mark.parametrize("name", ["fgsm", "pgd", "pgd0", "pgd020", "cw5x0", "PGD20", "clean2", "autoattack"])
def test_unknown_attacks_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"evaluation.attacks: .* known: clean, pgdK and cwK"):
        EvalAttack.parse(name)


def test_classes_must_fit_the_model(shards: Path) -> None:
    other = tiny(num_classes=7)
    with pytest.raises(UserError, match=r"4 classes, the model 7 .*model.num_classes=4"):
        evaluate(other, shards, attacks=("clean",))


def test_table_and_file(shards: Path, model: fd.AdaptedModel, tmp_path: Path) -> None:
    results = evaluate(model, shards, attacks=("clean", "pgd2"), eps=EPS)
    write_evaluation(results, tmp_path / "new" / "evaluation.json")
    assert json.loads((tmp_path / "new" / "evaluation.json").read_text()) == results
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["evaluation.json"]
    lines = table(results).splitlines()
    assert "n = 33, linf eps = 2/255, fp32" in lines[0]
    clean = results["attacks"]["clean"]
    assert any(line.split()[:2] == ["clean", f"{100 * clean['accuracy']:.2f}"] for line in lines)
    right, count = clean["per_class"]["dog"]
    assert any(line.split()[:3] == ["dog", str(count), f"{100 * right / count:.1f}"] for line in lines)


# ---- the command line


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def experiment(shards: Path, model: fd.AdaptedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.yaml, backbone.safetensors and adapter/ of a stirred adapter."""
    folder = tmp_path_factory.mktemp("experiment")
    save_file(model.backbone.state_dict(), folder / "backbone.safetensors")
    settings = {
        "backbone": "vit_tiny_patch16_224.augreg_in21k",
        "checkpoint": str(folder / "backbone.safetensors"),
        "num_classes": CLASSES,
        "image_size": SIDE,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "architecture": ARCHITECTURE,
    }
    name = settings["backbone"]
    adapted = fd.create_model(name, **{k: v for k, v in settings.items() if k != "backbone"}, rank=2)
    fd.save_adapter(stir(adapted), str(folder / "adapter"))
    config = {
        "model": settings,
        "threat": {"eps": "2/255"},
        "method": "pgd",
        "data": {"train": str(folder / "not-there"), "validation": str(shards), "crop_pct": 1.0, "workers": 0},
        "run": {"output": str(folder / "run"), "seed": 7},
        "evaluation": {"attacks": ["clean", "pgd4"], "batch_size": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def command_line(world: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """evaluate.py from the sources, from another folder than theirs; under the launcher for more than one rank."""
    launcher = [sys.executable]
    if world > 1:
        port = str(free_port())
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(world), "--master_port", port]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    script = str(ROOT / "fulllora_dist" / "evaluate.py")
    command = [*launcher, script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT / "tests", timeout=120)


def test_two_ranks_equal_one_and_python(experiment: Path, shards: Path) -> None:
    """33 pictures in batches of 4 on 2 ranks: the last batch is short and one rank's last is padding throughout."""
    config, adapter = str(experiment / "config.yaml"), str(experiment / "adapter")
    found = {}
    for world in (1, 2):
        output = experiment / f"on{world}.json"
        done = command_line(world, "--config", config, "--adapter", adapter, "--output", str(output))
        assert done.returncode == 0, done.stderr
        assert "pgd4" in done.stdout
        found[world] = json.loads(output.read_text())
    assert found[1] == found[2]
    here = evaluate(fd.load(adapter), stream(shards), attacks=("clean", "pgd4"), eps=EPS, seed=7)
    assert found[1] == {**here, "adapter": adapter}
    bare = evaluate(fd.load(adapter).requires_grad_(False), stream(shards), attacks=("clean",), eps=EPS, seed=7)
    assert bare["attacks"]["clean"] == here["attacks"]["clean"]


def test_without_adapter_it_is_the_backbone(experiment: Path, shards: Path, model: fd.AdaptedModel) -> None:
    output = experiment / "bare.json"
    arguments = ["--attacks", "cw3", "--n", "13", "--eps", "12/255", "--output", str(output), "evaluation.batch_size=5"]
    done = command_line(1, "--config", str(experiment / "config.yaml"), *arguments)
    assert done.returncode == 0, done.stderr
    here = evaluate(model, stream(shards, 13), attacks=("cw3",), eps=12 / 255, seed=7)
    assert json.loads(output.read_text()) == {**here, "backbone": "vit_tiny_patch16_224.augreg_in21k"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attacks", "clean,fgsm"], "evaluation.attacks: 'fgsm'"),
        (["--eps", "4"], "threat.eps"),
        (["--n", "34"], "has 33 samples"),
        (["--adapter", "models:/robust@champion"], "--adapter: models:/robust@champion"),
        (["--adapter", "nowhere"], "--adapter: nowhere"),
        (["data.validation=nowhere"], "data.validation: nowhere"),
        (["model.num_classes=7"], "4 classes, the model 7"),
    ],
)
def test_bad_input_is_one_line(experiment: Path, arguments: list[str], message: str) -> None:
    done = command_line(1, "--config", str(experiment / "config.yaml"), *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert message in done.stderr
