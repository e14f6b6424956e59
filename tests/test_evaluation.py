"""The evaluator against a plain loop, one rank against two, and the command line."""

import copy
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.attacks.threat import Linf
from fulllora_dist.commands import evaluate as evaluate_command
from fulllora_dist.commands.evaluation import build_evaluated
from fulllora_dist.config.load import load_config
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.rng import sample_rng
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.distributed.comm import Comm, Counters
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.evaluator import Evaluator
from fulllora_dist.evaluation.function import evaluate
from fulllora_dist.evaluation.output import check_output
from fulllora_dist.evaluation.progress import Progress
from fulllora_dist.evaluation.report import write_evaluation
from fulllora_dist.evaluation.summary import table
from fulllora_dist.evaluation.work_items import first_items, part_items
from fulllora_dist.models.adapter_file import adapter_sha256
from fulllora_dist.registry.publish import publish
from fulllora_dist.registry.registry import Registry
from tests.ranks import RankServer
from tests.scripts import Launched
from tests.tiny import ARCHITECTURE, CLASSES, SIDE, stir, tiny

ROOT = Path(__file__).parents[1]
CLASS_SIZES = {"ant": 12, "bee": 9, "cat": 7, "dog": 5}
EPS = 4 / 255
ONE = Comm(0, 1, torch.device("cpu"), control=None)


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


def stream(shards: Path, n: int | None = None, **ranks: int) -> EvalStream:
    transform = EvalTransform(size=SIDE, crop_pct=1.0)
    return EvalStream(shards, batch_size=4, transform=transform, subset=Subset(n), **ranks)


def whole(shards: Path, n: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """All images in [0, 1], labels and ids as one batch."""
    transform = EvalTransform(size=SIDE, crop_pct=1.0)
    (batch,) = EvalStream(shards, batch_size=n or sum(CLASS_SIZES.values()), transform=transform, subset=Subset(n))
    return batch.pixels(), batch.labels, batch.ids


@pytest.fixture(scope="module")
def model(shards: Path) -> fd.AdaptedModel:
    """A tiny ViT whose head takes the nearest class mean, so that attacks have something to break."""
    model = tiny(finetune="head", mean=(0.5,) * 3, std=(0.5,) * 3)
    x, y, _ = whole(shards)
    with torch.no_grad():
        features = model.backbone.forward_head(model.backbone.forward_features((x - 0.5) / 0.5), pre_logits=True)
        means = torch.stack([features[y == label].mean(dim=0) for label in range(CLASSES)])
        model.backbone.head.weight.copy_(means)
        model.backbone.head.bias.copy_(-0.5 * means.square().sum(dim=1))
    return model


class Rough(nn.Module):
    """Nearest class mean plus waves shorter than eps: where PGD ends depends on where it starts. In float64, so that
    one image alone and a batch take the same way."""

    def __init__(self, shards: Path):
        super().__init__()
        x, y, _ = whole(shards)
        self.means = torch.stack([x[y == label].mean(dim=0) for label in range(CLASSES)]).flatten(1).double()
        generator = torch.Generator().manual_seed(0)
        self.waves = torch.randn(x[0].numel(), CLASSES, generator=generator, dtype=torch.float64)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.flatten(1).double()
        return -0.5 * torch.cdist(x, self.means).square() + 12 * torch.sin(0.3 * x @ self.waves)


@pytest.fixture(scope="module")
def rough(shards: Path) -> Rough:
    """A model on which start, restarts and loss matter."""
    return Rough(shards)


def plain_loop(model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, name: str, steps: int, restarts: int) -> list[bool]:
    """PGD of Madry et al. for one image after the other: whether each is still right under every restart."""
    correct = []
    for i in range(len(x)):
        own = x[i : i + 1]
        right = bool(model(own).argmax() == y[i])  # the image is in the ball, too
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


@pytest.mark.parametrize(
    ("name", "steps", "restarts"), [("clean", 0, 0), ("pgd4", 4, 1), ("cw4", 4, 1), ("pgd2x3", 2, 3)]
)
@pytest.mark.parametrize("kind", ["model", "rough"])
def test_equals_a_plain_loop(
    shards: Path, kind: str, name: str, steps: int, restarts: int, request: pytest.FixtureRequest
) -> None:
    predict, (x, y, ids) = request.getfixturevalue(kind), whole(shards)
    if name == "clean":
        expected = (predict(x).argmax(dim=1) == y).tolist()
    else:
        expected = plain_loop(predict, x, y, ids, name, steps, restarts)
    assert 0 < sum(expected) < len(expected), "this radius shows nothing"
    batches = EvalStream(shards, batch_size=7, transform=EvalTransform(size=SIDE, crop_pct=1.0))
    result = Evaluator([name], Linf(EPS), ONE, seed=7).run(predict, batches)
    assert result["ids"] == ids.tolist()
    score = result["attacks"][name]
    assert score["correct"] == [int(right) for right in expected]
    assert score["accuracy"] == sum(expected) / len(expected)
    by_class = {c: [int(np.array(expected)[y == k].sum()), int((y == k).sum())] for k, c in enumerate(CLASS_SIZES)}
    assert score["per_class"] == by_class


def test_the_rough_model_tells_attacks_apart(shards: Path, rough: Rough) -> None:
    """Start, restarts and loss all matter there, or its equality with the plain loop would prove little."""
    x, y, ids = whole(shards)
    found = {(name, k): plain_loop(rough, x, y, ids + k, name, 2, 1) for name in ("pgd2", "cw2") for k in (0, 200)}
    assert len({tuple(correct) for correct in found.values()}) == len(found)
    assert sum(plain_loop(rough, x, y, ids, "pgd2", 2, 3)) < sum(found["pgd2", 0])


def test_dropout_is_off_and_modes_come_back(shards: Path, model: fd.AdaptedModel) -> None:
    noisy = nn.Sequential(nn.Dropout(0.5), model).train()
    model.eval()
    modes = [module.training for module in noisy.modules()]
    found = [evaluate(m, stream(shards), attacks=("clean", "pgd2"), eps=EPS)["attacks"] for m in (noisy, model)]
    assert found[0] == found[1]
    assert [module.training for module in noisy.modules()] == modes


def test_cw_moves_along_the_margin() -> None:
    """On a linear model one step from the image goes along the sign of w_runner-up - w_own."""
    torch.manual_seed(0)
    layer = nn.Linear(3 * 2 * 2, 5)
    x, y = torch.full((6, 3, 2, 2), 0.5), torch.tensor([0, 1, 2, 3, 4, 0])
    flat = nn.Sequential(nn.Flatten(), layer)
    ids = torch.arange(6)
    moved = EvalAttack.parse("cw1")(flat, x, y, threat=Linf(0.1), seed=0, ids=ids) - x
    start = (2 * sample_rng(0, "eval/cw1/start/0", 0, ids).uniform((3, 2, 2)) - 1) * 0.1
    for i in range(6):
        logits = flat(x[i : i + 1] + start[i])[0].detach()
        logits[y[i]] = -math.inf
        direction = (layer.weight[logits.argmax()] - layer.weight[y[i]]).sign().view(3, 2, 2)
        expected = (start[i] + 0.1 * direction).clamp(-0.1, 0.1)  # 2.5 eps / 1 is capped at eps
        torch.testing.assert_close(moved[i], expected)


@pytest.mark.parametrize("n", [12, 14, 33])
def test_n_is_balanced_and_wilson_is_the_formula(shards: Path, model: fd.AdaptedModel, n: int) -> None:
    results = fd.evaluate(model, shards, attacks=("pgd2",), eps="4/255", num_samples=n, batch_size=5)
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


def test_what_is_in_no_weight_begins_anew_too(shards: Path, model: fd.AdaptedModel, tmp_path: Path) -> None:
    """Pieces that are left over from another normalisation are not taken."""
    evaluator = Evaluator(["clean", "pgd2"], Linf(EPS), ONE, progress=False)

    def fail(_: object) -> None:
        raise OSError("no space")

    with pytest.raises(UserError, match="the evaluation cannot be written"):
        evaluator.run(model, stream(shards), tmp_path, fail)
    assert list(tmp_path.rglob("rank-0.jsonl"))
    other = copy.deepcopy(model)
    other.mean += 0.3
    found, alone = evaluator.run(other, stream(shards), tmp_path), evaluator.run(other, stream(shards))
    assert found["attacks"] == alone["attacks"] != evaluator.run(model, stream(shards))["attacks"]


def test_a_sample_in_two_batches_is_refused(shards: Path, model: fd.AdaptedModel) -> None:
    twice = stream(shards)
    twice.batches = [*twice.batches, twice.batches[0][:1]]
    with pytest.raises(UserError, match="a sample is in two batches"):
        evaluate(model, twice, attacks=("clean",))


@pytest.mark.parametrize(
    "name", ["fsgm", "pgd", "pgd0", "pgd020", "cw5x0", "PGD20", "clean2", "auto-attack", "square+square", "square+pgd"]
)
def test_unknown_attacks_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"evaluation.attacks: .* known: clean, fgsm, autoattack, "):
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
    assert "n = 33, linf eps = 4/255, fp32" in lines[0]
    clean = results["attacks"]["clean"]
    assert any(line.split()[:2] == ["clean", f"{100 * clean['accuracy']:.2f}"] for line in lines)
    right, count = clean["per_class"]["dog"]
    assert any(line.split()[:3] == ["dog", str(count), f"{100 * right / count:.1f}"] for line in lines)


def test_a_folder_is_cropped_as_the_backbone_asks(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "in" / f"c{i}").mkdir(parents=True)
        noise = np.random.default_rng(i).integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "in" / f"c{i}" / "a.png")
    make_shards(tmp_path / "in", tmp_path / "shards", progress=False)
    model = tiny()
    model.info = replace(model.info, crop_mode="squash", crop_pct=1.0)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    evaluate(model, tmp_path / "shards", attacks=("clean",))
    wanted = EvalTransform(size=SIDE, crop_pct=1.0, crop_mode="squash", interpolation=model.info.interpolation)
    (batch,) = EvalStream(tmp_path / "shards", batch_size=4, transform=wanted)
    assert torch.equal(seen[-1][:4], batch.pixels())


# ---- the command line


@pytest.fixture(scope="module")
def experiment(shards: Path, model: fd.AdaptedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.yaml, backbone.safetensors and adapter/ of a stirred adapter."""
    folder = tmp_path_factory.mktemp("experiment")
    save_file(model.backbone.state_dict(), folder / "backbone.safetensors")
    settings = {
        "backbone": "vit_tiny_patch16_224.augreg_in21k",
        "checkpoint_path": str(folder / "backbone.safetensors"),
        "num_classes": CLASSES,
        "image_size": SIDE,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "model_kwargs": ARCHITECTURE,
    }
    name = settings["backbone"]
    adapted = fd.create_model(name, **{k: v for k, v in settings.items() if k != "backbone"}, rank=2)
    fd.save_adapter(stir(adapted), str(folder / "adapter"))
    config = {
        "model": settings,
        "threat": {"eps": "4/255"},
        "method": "pgd",
        "data": {"train": str(folder / "not-there"), "validation": str(shards), "crop_pct": 1.0, "num_workers": 0},
        "run": {"output_dir": str(folder / "run"), "seed": 7},
        "evaluation": {"attacks": ["clean", "pgd4"], "batch_size": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def start(rank_server: RankServer) -> Callable[..., Launched]:
    """evaluate.py from the sources, in another folder than theirs, as a launcher starts it."""
    return partial(rank_server.launch, ROOT / "fulllora_dist" / "evaluate.py", cwd=ROOT / "tests")


def test_two_ranks_equal_one(start: Callable[..., Launched], experiment: Path, shards: Path) -> None:
    """33 images in batches of 4 on 2 ranks: one rank's last batch is short, the other's is padding throughout."""
    adapter, output = str(experiment / "adapter"), experiment / "two.json"
    arguments = ["--config", str(experiment / "config.yaml"), "--adapter", adapter, "--output", str(output)]
    launched = start(*arguments, ranks=2)
    model = fd.load(adapter)
    expected = evaluate(model, stream(shards), attacks=("clean", "pgd4"), eps=EPS, seed=7, gradient_masking_samples=50)
    done = launched.wait()
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text()) == {**expected, "adapter": adapter, "adapter_sha256": adapter_sha256(model)}
    assert launched.stdout(0) == table(expected) + "\n"
    assert launched.stdout(1) == ""


def test_without_adapter_it_is_the_backbone(
    start: Callable[..., Launched], experiment: Path, shards: Path, model: fd.AdaptedModel
) -> None:
    output = experiment / "bare.json"
    arguments = ["--attacks", "cw3", "--num-samples", "13", "--norm", "l2", "--eps", "0.5", "--output", str(output)]
    arguments.append("evaluation.batch_size=5")
    done = start("--config", str(experiment / "config.yaml"), *arguments).wait()
    assert done.returncode == 0, done.stderr
    here = evaluate(
        model, stream(shards, 13), attacks=("cw3",), eps=0.5, norm="l2", seed=7, gradient_masking_samples=50
    )
    assert (here["norm"], here["eps"]) == ("l2", 0.5)
    assert here != {
        **evaluate(model, stream(shards, 13), attacks=("cw3",), eps=0.5, seed=7, gradient_masking_samples=50),
        "norm": "l2",
    }
    assert here["pictures"] == {"size": SIDE, "crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "center"} | {
        "batch_size": 4
    }
    made = here["pictures"] | {"batch_size": 5}
    bare = {"backbone": "vit_tiny_patch16_224.augreg_in21k", "adapter_sha256": None}
    assert json.loads(output.read_text()) == {**here, **bare, "pictures": made}


def test_listed_images_at_several_eps_and_in_another_norm(
    start: Callable[..., Launched], experiment: Path, shards: Path
) -> None:
    (experiment / "ids.txt").write_text("31\n2\n17\n5\n")
    adapter, output = str(experiment / "adapter"), experiment / "listed.json"
    arguments = ["--adapter", adapter, "--ids", str(experiment / "ids.txt"), "--eps", "4/255,8/255", "--norms", "l1=9"]
    other = experiment / "other"
    fd.save_adapter(stir(fd.load(adapter), 1), str(other))
    names = f"clean,pgd4,transfer:{other}"
    arguments += ["--attacks", names, "--output", str(output)]
    done = start("--config", str(experiment / "config.yaml"), *arguments).wait()
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["ids"] == [2, 5, 17, 31]
    listed = EvalStream(
        shards,
        batch_size=4,
        transform=EvalTransform(size=SIDE, crop_pct=1.0),
        subset=Subset(ids=str(experiment / "ids.txt")),
    )
    loaded = fd.load(adapter)
    points = [{"eps": EPS, **found}, *found["more_eps"], *found["more_norms"]]
    for point in points:
        norm, eps = point.get("norm", "linf"), point["eps"]
        alone: Any = evaluate(loaded, listed, attacks=names.split(","), norm=norm, eps=eps, seed=7)
        assert point["worst_case"] == alone["worst_case"]
        for name in names.split(",")[1:]:
            assert point["attacks"][name] == alone["attacks"][name]
    assert [(point.get("norm", "linf"), point["eps"]) for point in points] == [
        ("linf", EPS),
        ("linf", 8 / 255),
        ("l1", 9),
    ]
    assert (experiment / "listed_eps.png").is_file()
    assert not (experiment / "listed.json.partial").exists()


NO_PACKAGE = "import importlib.util; print('found', importlib.util.find_spec('evaluate'))"


def test_a_script_does_not_stand_in_for_the_package_evaluate(rank_server: RankServer, tmp_path: Path) -> None:
    """Others import a package of that name; a script's own folder comes first on sys.path."""
    evaluate_py, train_py = (str(ROOT / "fulllora_dist" / name) for name in ("evaluate.py", "train.py"))
    command = [sys.executable, "-i", evaluate_py, "--help"]
    done = subprocess.run(command, input=NO_PACKAGE, capture_output=True, text=True, cwd=ROOT / "tests", timeout=180)
    assert "found None" in done.stdout, done.stderr[-500:]

    as_python_does = "import contextlib, runpy, sys\nsys.path[0], sys.argv = sys.argv[1], sys.argv[2:]\n"
    run = "with contextlib.suppress(SystemExit):\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    (tmp_path / "script.py").write_text(as_python_does + run + NO_PACKAGE)
    launched = rank_server.launch(
        tmp_path / "script.py", ROOT / "fulllora_dist", train_py, "--help", cwd=ROOT / "tests"
    )
    done = launched.wait()
    assert "usage: train.py" in done.stdout, done.stderr[-500:]
    assert done.stdout.endswith("found None\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attacks", "clean,fsgm"], r"evaluation.attacks: unknown attack 'fsgm'"),
        (["--eps", "4"], r"threat.eps: .*4/255"),
        (["--eps", "4/255,400/255"], r"evaluation.eps: .*"),
        (["--first", "40"], r"evaluation.first must be between 1 and the 33 samples of .*, got 40"),
        (
            ["--first", "4", "--num-samples", "4"],
            r"at most one of evaluation.num_samples, evaluation.first and evaluation.ids",
        ),
        (["--ids", "nowhere.txt"], r"evaluation.ids: nowhere.txt: cannot be read"),
        (["--norm", "l2"], r"threat.norm: .* not comparable; give --eps too"),
        (["threat.norm=l2"], r"threat.norm: .* not comparable; give --eps too"),
        (["--norm", "Linf"], r"threat.norm: .*'linf', 'l2' or 'l1' \(got 'Linf'\)"),
        (["threat.norm=L2"], r"threat.norm: .*'linf', 'l2' or 'l1' \(got 'L2'\)"),
        (["--ids", ""], r"--ids: must not have empty values, got ''"),
        (["--attacks", "clean,,pgd2"], r"--attacks: must not have empty values, got 'clean,,pgd2'"),
        (["--output", "config.yaml"], r"--output: config.yaml is not an evaluation.json; .* name another file"),
        (["--num-samples", "0"], r"evaluation.num_samples: .*greater than or equal to 1"),
        (["--adapter", "nowhere"], r"--adapter: nowhere has no adapter.json; give the folder adapter/ of a run"),
        (["--adapter", "."], r"--adapter: \. has no adapter.json; did you mean ./adapter\?"),
        (["--adapter", "bees@champion"], r"has no adapter.json; for MLflow's registry write models:/bees@champion$"),
        (["data.validation=nowhere"], r"data.validation: nowhere/index.safetensors: no index there"),
        (["data.validation=null"], r"data.validation is not set"),
        (["--output", "."], r"--output: \. is a folder; name a file, e\.g\. evaluation\.json"),
        (
            ["--output", "/proc/none/evaluation.json"],
            r"--output: cannot create /proc/none \(No such file",
        ),
    ],
)
def test_bad_input_is_refused_before_the_ranks_meet(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(experiment)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--config", str(experiment / "config.yaml"), *arguments])
    with pytest.raises(UserError, match=message):
        evaluate_command.main()
    assert not torch.distributed.is_initialized()


def test_ranks_that_look_for_a_missing_folder_at_once_leave_none(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as ranks:
        list(ranks.map(check_output, [tmp_path / "new" / "folder" / "evaluation.json"] * 400))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "model.backbone=vit_small_patch16_224",
            r"model.backbone: must be vit_tiny_patch.* for the adapter .*, got vit_small_patch16_224",
        ),
        (
            "model.backbone=vit_tiny_patch16_224.other",
            r"model.backbone: must be .* for the adapter .*, got vit_tiny_patch16_224.other",
        ),
        ("model.mean=[0.1,0.1,0.1]", r"model.mean: must be .* for the adapter .*, got \(0.1, 0.1, 0.1\)"),
        (
            "model.image_size=32",
            r"model.image_size: must be 16 for the adapter .*, got 32; use the config that it was tr",
        ),
        ("model.model_kwargs.depth=5", r"model.model_kwargs: must be .* for the adapter .*, got .*'depth': 5"),
        ("model.num_classes=7", r"model.num_classes: must be 4 for the adapter .*, got 7"),
    ],
)
def test_an_adapter_of_another_model_than_the_config_s_is_refused(experiment: Path, setting: str, message: str) -> None:
    """Also where the config names weights of another model, and before anything is counted or computed."""
    config = load_config(str(experiment / "config.yaml"), [setting, "model.checkpoint_path=gone.safetensors"])
    for check in (build_evaluated, evaluate_command.check_inputs):
        with pytest.raises(UserError, match=message):
            check(config, str(experiment / "adapter"))
    without_a_tag = load_config(str(experiment / "config.yaml"), ["model.backbone=vit_tiny_patch16_224"])
    assert isinstance(build_evaluated(without_a_tag, str(experiment / "adapter")), fd.AdaptedModel)


def test_another_norm_has_sizes_of_its_own(experiment: Path) -> None:
    """The config's own norm is no change; with another one the config's further eps mean nothing."""
    common = ["--config", str(experiment / "config.yaml"), "evaluation.eps=[2/255]"]
    for same in (["--norm", "linf"], ["threat.norm=linf"]):
        assert evaluate_command.read_arguments([*common, *same])[1].evaluation.eps == (2 / 255,)
    _, config = evaluate_command.read_arguments([*common, "--norm", "l2", "--eps", "0.5"])
    assert (config.threat.norm, config.threat.eps, config.evaluation.eps) == ("l2", 0.5, ())
    _, config = evaluate_command.read_arguments([*common, "threat.norm=l2", "--eps", "0.5,1"])
    assert config.evaluation.eps == (1,)


ATTACKS = [EvalAttack.parse(name) for name in ("pgd4", "clean", "autoattack", "apgd-ce+square")]


def test_clean_and_checks_come_first_then_the_costliest(shards: Path) -> None:
    attacks = [*ATTACKS, EvalAttack.parse("pgd8")]
    items = first_items([""], attacks, [Linf(EPS)], stream(shards), checked=8)
    assert list(dict.fromkeys(item.kind for item in items)) == ["clean", "checks", "pgd8", "pgd4"]
    assert len({item.name for item in items}) == len(items)
    alone = first_items([""], ATTACKS[2:], [Linf(EPS)], stream(shards), checked=0)
    assert {item.kind for item in alone} == {"clean"}, "AutoAttack begins with what is classified correctly"


def test_a_part_takes_the_survivors_in_full_batches() -> None:
    """At each eps those of its own; attacks that begin with the same parts share them."""
    left = {0: np.array([1, 4, 5, 7, 9]), 1: np.array([4])}

    def survivors(variant: str, radius: int, before: Sequence[str]) -> np.ndarray:
        asked.append(tuple(before))
        return left[radius]

    asked: list[tuple[str, ...]] = []
    balls = [Linf(EPS), Linf(2 * EPS), Linf(0.0)]
    items = part_items(1, [""], ATTACKS, balls, 3, survivors)
    assert set(asked) == {()}
    assert sorted((item.radius, item.ids.tolist()) for item in items) == [(0, [1, 4, 5]), (0, [7, 9]), (1, [4])]
    assert {item.kind for item in items} == {"apgd-ce"}
    asked.clear()
    items = part_items(2, [""], ATTACKS, balls, 3, survivors)
    assert set(asked) == {("apgd-ce",)}
    assert sorted(item.kind for item in items) == ["apgd-t"] * 3 + ["square"] * 3
    assert len({item.name for item in items}) == 6


def test_progress_counts_all_ranks_and_tells_the_time_left(shards: Path) -> None:
    """By passes until an item of a kind is finished, then by what it took; resumed items count, but take no time.
    AutoAttack is priced by the images that still stand."""
    attacks = [EvalAttack.parse("clean"), EvalAttack.parse("apgd-ce+square")]
    images = stream(shards)
    clean, resumed, *others = items = first_items([""], attacks, [Linf(EPS)], images, checked=0)
    n, size = len(images.ids), len(clean.ids)
    counters, before = Counters(None), {resumed.name: [1] * size}
    main, other = (Progress(attacks, n, counters, 2, [Linf(EPS)], shows=shows) for shows in (True, False))
    for progress in (main, other):
        progress.begin(0, items, before)
    main.finished(clean, [0] + [1] * (size - 1), 0.1 * size)
    standing = n * (2 * size - 1) / (2 * size)
    passes = sum(item.passes for item in others) + round(201 * standing) + round(5001 * standing)
    assert main.seconds_left() == pytest.approx(0.1 * passes / 2)
    assert f"2 of {len(items)} work items" in main.line()
    assert main.line().endswith(f"; clean {(2 * size - 1) / (2 * size):.1%}")

    left = [item.ids for item in items]
    part = part_items(1, [""], attacks, [Linf(EPS)], size, lambda *_: np.concatenate(left))
    for item in others:
        main.finished(item, [1] * len(item.ids), 0.1 * len(item.ids))
    for progress in (main, other):
        progress.begin(1, part, {})
    other.finished(part[0], [0] * (size - 1) + [1], 10.0)  # of the others as many are expected to fall
    square = 5001 * round(n / size, 6)
    pace = (0.1 * (n - size) + 10.0) / (n - size + 201 * size)
    expected = 10.0 / size * (n - size) + pace * square
    assert main.seconds_left() == pytest.approx(expected / 2, rel=1e-3)
    assert main.line().endswith(f"apgd-ce 1 of {size} survive")


def test_changed_checks_throw_no_attack_away(shards: Path, model: fd.AdaptedModel, tmp_path: Path) -> None:
    """An evaluation that could not be written continues with other checks: no attack is made again."""
    comm = Comm(0, 1, torch.device("cpu"), None)

    def fail(_: object) -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        Evaluator(["pgd2"], Linf(EPS), comm, progress=False).run(model, stream(shards), tmp_path, fail)
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    Evaluator(["pgd2"], Linf(EPS), comm, gradient_masking_samples=2, progress=False).run(
        model, stream(shards), tmp_path
    )
    with_checks = len(passes)
    Evaluator(["clean"], Linf(EPS), comm, gradient_masking_samples=2, progress=False).run(model, stream(shards))
    handle.remove()
    assert with_checks == len(passes) - with_checks - len(stream(shards).batches)


def test_an_adapter_by_its_alias(
    start: Callable[..., Launched], experiment: Path, shards: Path, database: Path, tmp_path: Path
) -> None:
    """The version that @champion points to, from the store that the config names; an alias that is not there."""
    store = f"sqlite:///{shutil.copy(database, tmp_path)}"
    registry = Registry(store, create=True)
    adapter = tmp_path / "adapter"
    fd.save_adapter(
        fd.load(str(experiment / "adapter")), str(adapter), training={"threat": {"norm": "linf", "eps": EPS}}
    )
    version = publish(registry, str(adapter), name="robust")
    registry.store.set_registered_model_alias("robust", "champion", "1")
    common = ["--config", str(experiment / "config.yaml"), f"tracking.uri={store}"]
    wrong = start(*common, "--adapter", "models:/robust@best")
    output = str(tmp_path / "evaluation.json")
    done = start(*common, "--adapter", "models:/robust@champion", "--output", output).wait()
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert (found["adapter"], found["adapter_sha256"]) == ("models:/robust/1", version.tags["adapter_sha256"])
    model = fd.load(str(experiment / "adapter"))
    here = evaluate(model, stream(shards), attacks=("clean", "pgd4"), eps=EPS, seed=7)
    assert {name: score["correct"] for name, score in found["attacks"].items()} == {
        name: score["correct"] for name, score in here["attacks"].items()
    }
    assert publish(registry, str(adapter), name="robust", evaluation=found).tags["n"] == "33"
    refused = wrong.wait()
    assert refused.returncode == 2
    assert (
        refused.stderr.strip().splitlines()[-1] == "error: robust has no alias best; it has @champion (1), versions 1"
    )


def test_bad_input_is_one_line_and_exit_2(start: Callable[..., Launched], experiment: Path) -> None:
    done = start("--config", str(experiment / "config.yaml"), "model.num_classes=7").wait()
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "4 classes, but the model has 7" in done.stderr
