"""Class names of a model and of a data set: mapped where they are the same in another order, refused where they are
others, said where one side has none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import fulllora_dist as fd
from fulllora_dist.commands import adapter_actions, adapters
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.class_names import match_classes
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.evaluation.compare import compare
from fulllora_dist.models.training_record import TrainingRecord
from fulllora_dist.registry.promotion import Rules, judge
from fulllora_dist.training.guard import build_guard
from fulllora_dist.training.inputs import check_files
from tests.ranks import RankServer
from tests.registry.conftest import evaluation, right
from tests.tiny import ARCHITECTURE, CLASSES, SIDE, tiny

ROOT = Path(__file__).parents[2]
NAMES = ["ant", "bee", "cat", "dog"]
TURNED = ["dog", "ant", "cat", "bee"]
EPS = "2/255"
MAPPED = "mapped by name, as the data has the classes of the model in another order"
OTHER = "{} has other classes than {}: {} instead of {}; both must have the same classes"
ALIKE = "class {} of {} is {} in {}: write both alike, they differ in case, spaces or encoding alone"
FEWER = (
    "{} has {} classes, the model has 4, {} by the same name; make the data with all of them, in any order, e.g. "
    "'ant', 'bee', 'cat', ..."
)
TWICE = (
    "the data has the classes of the model in another order, and {} is the name of two of them; give each class a name "
    "of its own"
)
EEL = ["ant", "bee", "cat", "eel"]


# ---- the comparison


@pytest.mark.parametrize(
    ("model", "data", "outputs"),
    [
        (NAMES, NAMES, None),
        (NAMES, TURNED, [3, 0, 2, 1]),
        (TURNED, NAMES, [1, 3, 2, 0]),
        ([str(k) for k in range(11)], sorted(map(str, range(11))), [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]),
        (["great white shark", "great grey owl"], ["great grey owl", "great white shark"], [1, 0]),
    ],
)
def test_the_same_names_are_mapped(model: list[str], data: list[str], outputs: list[int] | None) -> None:
    match = match_classes(model, data)
    labels = torch.arange(len(data)).flip(0)
    expected = torch.tensor([model.index(data[label]) for label in labels])
    assert torch.equal(match.of(labels), expected)
    assert (None if match.outputs is None else match.outputs.tolist()) == outputs
    assert match.note == ("" if outputs is None else MAPPED)


@pytest.mark.parametrize(
    ("model", "data", "line"),
    [
        (NAMES, EEL, OTHER.format("the data", "the model", "'eel'", "'dog'")),
        (NAMES, ["ant", "ant", "cat", "dog"], OTHER.format("the data", "the model", "none", "'bee'")),
        (NAMES, ["Ant", "bee", "cat", "dog"], ALIKE.format("'Ant'", "the data", "'ant'", "the model")),
        (NAMES, ["ant", "bee", "cat ", "dog"], ALIKE.format("'cat '", "the data", "'cat'", "the model")),
        (["polar bear"], ["polar_bear"], ALIKE.format("'polar_bear'", "the data", "'polar bear'", "the model")),
        (["caf\u00e9"], ["cafe\u0301"], ALIKE.format(r"'cafe\u0301'", "the data", r"'caf\xe9'", "the model")),
        (NAMES, ["ant", "bee"], FEWER.format("the data", 2, 2)),
        (["crane", "owl", "crane"], ["owl", "crane", "crane"], TWICE.format("'crane'")),
    ],
)
def test_other_names_are_refused(model: list[str], data: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        match_classes(model, data)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("model", "data", "unnamed"),
    [([], NAMES, "the model"), (NAMES, ["0", "1", "2", "3"], "the data"), (["0", "1", "2", "3"], NAMES, "the model")],
)
def test_where_one_side_has_no_names_that_is_said(model: list[str], data: list[str], unnamed: str) -> None:
    match = match_classes(model, data)
    assert match.outputs is None
    assert match.note == f"not compared, as {unnamed} has no class names: label k is taken as output k"


# ---- evaluations


def _write(root: Path, names: list[str], copies: int = 6) -> None:
    """Noisy copies of a prototype for each name, the same ones however the names are ordered."""
    for name in names:
        (root / name).mkdir(parents=True)
        rng = np.random.default_rng([ord(letter) for letter in name.strip().lower()])
        prototype = rng.integers(60, 196, (SIDE, SIDE, 3))
        for i in range(copies):
            noisy = prototype + rng.normal(0, 12, prototype.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """data(names, source=...) -> shards of the same 24 images with classes of these names, in this order."""
    made: dict[str, str] = {}
    root = tmp_path_factory.mktemp("pictures")
    _write(root / "plain", NAMES)

    def make(names: list[str]) -> str:
        key = ",".join(names)
        if key not in made:
            source = root / f"named-{len(made)}"
            for name in names:
                plain = {"eel": "dog"}.get(name, name.strip().lower())
                shutil.copytree(root / "plain" / plain, source / name)
            made[key] = str(root / f"shards-{len(made)}")
            make_shards(source, made[key], classes=names, progress=False)
        return made[key]

    return make


def _pixels(folder: str) -> tuple[Tensor, Tensor]:
    stream = EvalStream(folder, batch_size=100, transform=EvalTransform(size=SIDE, crop_pct=1.0))
    batch = stream.read(stream.ids)
    return batch.pixels(), batch.labels


@pytest.fixture(scope="module")
def experiment(data: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.yaml, and adapter/ and nameless/ of a model that is right about most images, in the order of NAMES."""
    folder = tmp_path_factory.mktemp("experiment")
    x, y = _pixels(data(NAMES))
    bare = tiny(finetune="head", mean=(0.5,) * 3, std=(0.5,) * 3)
    with torch.no_grad():
        features = bare.backbone.forward_head(bare.backbone.forward_features((x - 0.5) / 0.5), pre_logits=True)
        with_one = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
        solution = torch.linalg.pinv(with_one, rtol=1e-4) @ torch.nn.functional.one_hot(y, CLASSES).double()
        bare.backbone.head.weight.copy_(solution[:-1].T)
        bare.backbone.head.bias.copy_(solution[-1])
    save_file(bare.backbone.state_dict(), folder / "backbone.safetensors")
    settings = {
        "checkpoint_path": str(folder / "backbone.safetensors"),
        "num_classes": CLASSES,
        "image_size": SIDE,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "model_kwargs": ARCHITECTURE,
    }
    model = fd.create_model("vit_tiny_patch16_224.augreg_in21k", **settings, rank=2)
    recorded = {"data": {"name": "zoo", "classes": NAMES, "crop_pct": 1.0}}
    fd.save_adapter(model, str(folder / "adapter"), training=recorded)
    fd.save_adapter(model, str(folder / "nameless"))
    config = {
        "model": settings | {"backbone": "vit_tiny_patch16_224.augreg_in21k"},
        "threat": {"eps": EPS},
        "method": "pgd",
        "data": {"train": data(NAMES), "validation": data(NAMES), "num_workers": 0},
        "run": {"output_dir": str(folder / "run")},
        "evaluation": {"attacks": ["clean", "pgd2"], "gradient_masking_samples": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def _by_image(report: dict[str, Any], folder: str, attack: str) -> dict[str, int]:
    """{name of the image: whether it is correct}."""
    index = EvalStream(folder, batch_size=1, transform=EvalTransform(size=SIDE)).index
    return {index.key(i): hit for i, hit in zip(report["ids"], report["attacks"][attack]["correct"], strict=True)}


def test_an_evaluation_in_another_order_gives_the_same_verdicts(data: Callable[..., str], experiment: Path) -> None:
    """97 % became 0.25 %."""
    model = fd.load(str(experiment / "adapter"))
    own, turned = (fd.evaluate(model, data(names), eps=EPS, attacks=("clean", "pgd2")) for names in (NAMES, TURNED))
    x, y = _pixels(data(NAMES))
    assert own["attacks"]["clean"]["accuracy"] == float((model(x).argmax(dim=1) == y).double().mean()) > 0.9
    for attack in ("clean", "pgd2"):
        assert _by_image(own, data(NAMES), attack) == _by_image(turned, data(TURNED), attack)
        assert own["attacks"][attack]["per_class"] == turned["attacks"][attack]["per_class"]
    assert list(turned["attacks"]["clean"]["per_class"]) == TURNED
    assert (own["class_match"], turned["class_match"]) == ("", MAPPED)
    assert own["classes"] == turned["classes"] == NAMES


def test_a_stream_and_one_of_several_adapters_are_mapped_too(data: Callable[..., str], experiment: Path) -> None:
    several = fd.MultiAdapter({"one": str(experiment / "adapter"), "other": str(experiment / "nameless")})
    stream = EvalStream(data(TURNED), batch_size=5, transform=EvalTransform(size=SIDE, crop_pct=1.0))
    found = {name: fd.evaluate(several.select(name), stream, attacks=("clean",)) for name in ("one", "other")}
    assert found["one"]["attacks"]["clean"]["accuracy"] > 0.9
    assert found["one"]["class_match"] == MAPPED
    assert found["other"]["attacks"]["clean"]["accuracy"] < 0.5
    assert found["other"]["class_match"].startswith("not compared, as the model has no class names")


def test_names_survive_a_second_saving(data: Callable[..., str], experiment: Path, tmp_path: Path) -> None:
    fd.save_adapter(fd.load(str(experiment / "adapter")), str(tmp_path / "again"))
    again = fd.load(str(tmp_path / "again"))
    assert again.record.classes == tuple(NAMES)
    assert fd.evaluate(again, data(TURNED), attacks=("clean",))["class_match"] == MAPPED


def test_an_interrupted_evaluation_is_not_continued_under_other_names(
    data: Callable[..., str], experiment: Path
) -> None:
    from fulllora_dist.evaluation.resume_log import fingerprint

    stream = EvalStream(data(TURNED), batch_size=5, transform=EvalTransform(size=SIDE, crop_pct=1.0))
    named, nameless = (fd.load(str(experiment / name)) for name in ("adapter", "nameless"))
    assert fingerprint(named, stream, 0) != fingerprint(nameless, stream, 0)


WORDNET = ["n01440764", "n02102040", "n02979186", "n03000684"]  # rows 0, 217, 482 and 491 of ImageNet's head
ROWS = [0, 217, 482, 491]


@pytest.fixture(scope="module")
def imagenet_head(tmp_path_factory: pytest.TempPathFactory) -> fd.AdaptedModel:
    """A backbone whose 1,000 outputs are ImageNet's, of which four rows are kept. Nothing was trained."""
    checkpoint = tmp_path_factory.mktemp("imagenet") / "backbone.safetensors"
    save_file(tiny(finetune="head", num_classes=1000).backbone.state_dict(), checkpoint)
    return fd.create_model(
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        checkpoint_path=str(checkpoint),
        class_indices=ROWS,
        image_size=SIDE,
        model_kwargs=ARCHITECTURE,
        rank=2,
    )


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (WORDNET, ""),
        (WORDNET[::-1], MAPPED),
        ([*WORDNET[:3], "n01443537"], OTHER.format("the data", "the model", "'n01443537'", "'n03000684'")),
        (NAMES, "not compared, as the model has no class names: label k is taken as output k"),
    ],
)
def test_rows_of_imagenet_s_own_head_are_known_by_wordnet_ids(
    imagenet_head: fd.AdaptedModel, tmp_path: Path, names: list[str], found: str
) -> None:
    _write(tmp_path / "in", names)
    make_shards(tmp_path / "in", tmp_path / "shards", classes=names, progress=False)
    if found.startswith("the data"):
        with pytest.raises(UserError) as caught:
            fd.evaluate(imagenet_head, tmp_path / "shards", attacks=("clean",))
        assert str(caught.value) == found
        return
    transform = EvalTransform(size=SIDE, crop_pct=1.0)
    stream = EvalStream(tmp_path / "shards", batch_size=100, transform=transform)
    report = fd.evaluate(imagenet_head, stream, attacks=("clean",))
    assert report["class_match"] == found
    x, labels = _pixels(str(tmp_path / "shards"))
    order = [WORDNET.index(name) if name in WORDNET else k for k, name in enumerate(names)]
    outputs = torch.tensor(order)[labels]
    with torch.no_grad():
        expected = (imagenet_head(x).argmax(dim=1) == outputs).int().tolist()
    assert report["attacks"]["clean"]["correct"] == expected


# ---- command lines


@pytest.fixture
def evaluate_py(rank_server: RankServer, experiment: Path, tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """evaluate_py(*arguments) -> what it prints, and its evaluation.json."""

    def launch(*arguments: str, ranks: int = 1) -> tuple[str, dict[str, Any]]:
        output = tmp_path / "evaluation.json"
        common = ["--config", str(experiment / "config.yaml"), "--output", str(output)]
        done = rank_server.launch(ROOT / "fulllora_dist/evaluate.py", *common, *arguments, ranks=ranks).wait()
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(output.read_text())

    return launch


def test_evaluate_py_maps(evaluate_py: Callable[..., Any], data: Callable[..., str], experiment: Path) -> None:
    printed, report = evaluate_py("--adapter", str(experiment / "adapter"), f"data.validation={data(TURNED)}", ranks=2)
    assert f"classes: {MAPPED}" in printed.splitlines()
    here = fd.evaluate(fd.load(str(experiment / "adapter")), data(NAMES), attacks=("clean", "pgd2"), eps=EPS)
    for attack in ("clean", "pgd2"):
        assert _by_image(report, data(TURNED), attack) == _by_image(here, data(NAMES), attack)


@pytest.mark.parametrize(("adapter", "unnamed"), [("nameless", "the model"), (None, "the model")])
def test_evaluate_py_says_that_it_cannot_compare(
    evaluate_py: Callable[..., Any], experiment: Path, adapter: str | None, unnamed: str
) -> None:
    printed, report = evaluate_py(*(["--adapter", str(experiment / adapter)] if adapter else []))
    line = f"not compared, as {unnamed} has no class names: label k is taken as output k"
    assert f"classes: {line}" in printed.splitlines()
    assert (report["class_match"], report["classes"], report["warnings"]) == (line, None, [])


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (EEL, OTHER.format("data.validation", "the model", "'eel'", "'dog'")),
        (["Ant", "bee", "cat", "dog"], ALIKE.format("'Ant'", "data.validation", "'ant'", "the model")),
        (["ant", "bee", "cat"], FEWER.format("data.validation", 3, 3)),
    ],
)
def test_evaluate_py_refuses_others(
    refused: Callable[..., str], data: Callable[..., str], experiment: Path, tmp_path: Path, names: list[str], line: str
) -> None:
    said = refused(
        "fulllora_dist/evaluate.py",
        *("--config", experiment / "config.yaml", "--adapter", experiment / "adapter"),
        *("--output", tmp_path / "evaluation.json", f"data.validation={data(names)}"),
        keep=(experiment, tmp_path),
    )
    assert said == f"error: {line}"
    with pytest.raises(UserError) as caught:
        fd.evaluate(fd.load(str(experiment / "adapter")), data(names), attacks=("clean",))
    assert str(caught.value) == line.replace("data.validation", "the data")


@pytest.mark.parametrize("setting", ["validation", "held_out"])
@pytest.mark.parametrize(
    ("names", "line"),
    [
        (EEL, OTHER.format("{}", "data.train", "'eel'", "'dog'")),
        (["ant", "bee", "cat", "DOG"], ALIKE.format("'DOG'", "{}", "'dog'", "data.train")),
    ],
)
def test_train_py_refuses_others(
    refused: Callable[..., str], data: Callable[..., str], experiment: Path, setting: str, names: list[str], line: str
) -> None:
    said = refused(
        "fulllora_dist/train.py",
        *("--config", experiment / "config.yaml", f"data.{setting}={data(names)}"),
        keep=(experiment,),
    )
    assert said == f"error: {line.format(f'data.{setting}')}"


@pytest.fixture(scope="module")
def other_images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards in the order of TURNED, of images that are not those of `data`, byte for byte."""
    root = tmp_path_factory.mktemp("others")
    _write(root / "in", NAMES, copies=9)
    for file in (root / "in").rglob("[0-5].png"):
        file.unlink()
    make_shards(root / "in", root / "shards", classes=TURNED, progress=False)
    return str(root / "shards")


def test_the_guard_is_mapped(data: Callable[..., str], experiment: Path, other_images: str) -> None:
    """Held-out images in another order: what the guard counts is what the evaluation counts."""
    config = Config.model_validate(
        yaml.safe_load((experiment / "config.yaml").read_text())
        | {"guard": {"steps": 2}, "optim": {"lr": 1e-3, "batch_size": 8}}
        | {"data": {"train": data(NAMES), "held_out": other_images, "num_workers": 0, "crop_pct": 1.0}}
    )
    check_files(config)
    model = fd.load(str(experiment / "adapter"))
    guard = build_guard(config, model, Comm(0, 1, torch.device("cpu"), None))
    assert guard is not None
    robust, clean, examples = guard._attacked(model)
    report = fd.evaluate(model, other_images, attacks=("clean", "pgd2"), eps=EPS)
    assert (clean, robust) == tuple(report["attacks"][name]["accuracy"] for name in ("clean", "pgd2"))
    assert clean > 0.7
    assert guard.classes == tuple(NAMES)
    assert torch.equal(examples.labels, model(examples.clean).argmax(dim=1))


# ---- the registry


TURNED_OUTPUTS = "its outputs are the champion's classes in another order; whoever reads the scores takes them wrongly"
EEL_FOR_DOG = ("'eel'", "'dog'")
TURNED_LABELS = "the data numbers them in another order; compare the names (class), not the numbers (label)"
EEL_DATA = OTHER.format("the data", "the model", *EEL_FOR_DOG)


@pytest.mark.parametrize(
    ("champion", "candidate", "reasons", "findings"),
    [
        (NAMES, NAMES, [], []),
        (NAMES, TURNED, [TURNED_OUTPUTS], []),
        (NAMES, EEL, [f"its outputs are not the champion's: {OTHER.format('it', 'the champion', *EEL_FOR_DOG)}"], []),
        (NAMES, None, [], ["classes: not compared, as it has no class names: label k is taken as output k"]),
        (None, NAMES, [], ["classes: not compared, as the champion has no class names: label k is taken as output k"]),
    ],
)
def test_the_gate(champion: Any, candidate: Any, reasons: list[str], findings: list[str]) -> None:
    a, b = (evaluation(right(600, 1000), right(800, 1000), classes=names) for names in (champion, candidate))
    verdict = judge(b, a, Rules(clean_floor=0.7), first=False, threat="linf eps = 8/255")
    assert list(verdict.reasons) == reasons
    assert [line for line in verdict.findings if line.startswith("classes")] == findings


@pytest.fixture
def predicted(experiment: Path, tmp_path: Path) -> Callable[..., Any]:
    """predicted(adapter, source) -> what `adapters.py predict` prints, and its lines."""

    def call(adapter: str, source: str) -> tuple[list[str], list[dict[str, Any]]]:
        output = tmp_path / "out.jsonl"
        arguments = ["predict", str(experiment / adapter), source, "--output", str(output)]
        text, _, code = adapter_actions.predict_command(adapters._parser().parse_args(arguments))
        assert code == 0
        return text.splitlines(), [json.loads(line) for line in output.read_text().splitlines()]

    return call


@pytest.mark.parametrize(
    ("adapter", "names", "line"),
    [
        ("adapter", NAMES, None),
        ("adapter", TURNED, f"classes: {TURNED_LABELS}"),
        ("adapter", EEL, f"classes are the adapter's, not the data's: {EEL_DATA}"),
        ("nameless", NAMES, "the adapter records no class names: class is the number of the output"),
    ],
)
def test_predictions_say_what_their_numbers_are(
    predicted: Callable[..., Any], data: Callable[..., str], adapter: str, names: list[str], line: str | None
) -> None:
    printed, rows = predicted(adapter, data(names))
    assert printed[1:] == ([line] if line else [])
    right_names = [row["class"] == row["picture"].split("/")[0].replace("eel", "dog") for row in rows]
    assert sum(right_names) > 20 if adapter == "adapter" else rows[0]["class"] in "0123"


# ---- comparing two reports


def _compared(**other: Any) -> None:
    labels, n = np.arange(8) % CLASSES, 8
    report = evaluation(right(4, n), right(8, n), data=None)
    counted = {name: [1, int((labels == k).sum())] for k, name in enumerate(NAMES)}
    changed = {"per_class": other.pop("per_class", counted)}
    second = json.loads(json.dumps(report)) | other
    for attack in second["attacks"].values():
        attack.update(changed)
    compare(report, second)


def test_reports_of_other_images_or_labels_are_refused() -> None:
    _compared()
    with pytest.raises(UserError) as caught:
        _compared(per_class={name: [1, 2] for name in TURNED})
    assert str(caught.value) == (
        "A and B have the same ids, with the same classes in another order: they are not of the same images"
    )
    with pytest.raises(UserError) as caught:
        _compared(per_class={"ant": [1, 2], "bee": [1, 2], "cat": [1, 3], "dog": [1, 1]})
    assert str(caught.value) == (
        "A and B have the same ids, A with 2 images of class 'cat', B with 3 images of class 'cat': they are not of "
        "the same images"
    )
    with pytest.raises(UserError) as caught:
        _compared(data="other", per_class={name: [1, 2] for name in TURNED})
    assert str(caught.value) == (
        "data of A is None, of B other, with the same classes in another order: they cannot be compared"
    )


def test_a_model_s_own_order_does_not_matter_to_a_comparison(data: Callable[..., str], experiment: Path) -> None:
    """Two models of the same images, whose classes are in another order each."""
    model = fd.load(str(experiment / "adapter"))
    other = fd.load(str(experiment / "adapter"))
    order = [NAMES.index(name) for name in TURNED]
    with torch.no_grad():
        for parameter in (other.backbone.head.weight, other.backbone.head.bias):
            parameter.copy_(parameter[order].clone())
    other.record = TrainingRecord({"data": {"classes": TURNED, "crop_pct": 1.0}})
    reports = [fd.evaluate(m, data(NAMES), attacks=("clean",)) for m in (model, other)]
    (row,) = compare(*reports)["rows"]
    assert (row["only_a"], row["only_b"]) == (0, 0)
    assert reports[0]["attacks"] == reports[1]["attacks"]
