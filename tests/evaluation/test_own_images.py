"""What a notebook has, a DataLoader or tensors, is evaluated as shards are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_cases import EPS, stream, write_images
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.evaluation.compare import compare
from tests.tiny import CLASSES, images, stir, tiny

ATTACKS = ("clean", "pgd3", "apgd-ce")
N = 40
NAMES = ("class0", "class1", "class2", "class3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures, a folder for each class."""
    root = tmp_path_factory.mktemp("pictures")
    write_images(root, 1, N)
    return root


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shards")
    make_shards(folder, made, progress=False)
    return made


@pytest.fixture(scope="module")
def pair(shards: Path) -> tuple[Tensor, Tensor]:
    """All images of the shards, in their order."""
    (batch,) = stream(shards, batch_size=N)
    return batch.pixels(), batch.labels


class Named(TensorDataset):
    classes = NAMES


def evaluate(model: fd.AdaptedModel, data: Any, **settings: Any) -> Any:
    return fd.evaluate(model, data, **{"attacks": ATTACKS, "eps": EPS, **settings})


class Rows(torch.utils.data.Dataset):
    """Images, labels, and ids that are no positions."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        return self.x[i], self.y[i], 1000 - 7 * i


def test_loader_tensors_and_shards_get_the_same_report(
    healthy: dict[str, fd.AdaptedModel], shards: Path, pair: tuple[Tensor, Tensor]
) -> None:
    model, (x, y) = healthy["full_at"], pair
    of_shards = evaluate(model, stream(shards, batch_size=16))
    of_loader = evaluate(model, DataLoader(Named(x, y), batch_size=16))
    of_tensors = evaluate(model, pair, batch_size=16, classes=NAMES)
    in_bytes = evaluate(model, ((255 * x).round().byte(), y), batch_size=16, classes=NAMES)
    ours = {"data", "pictures"}
    for found in (of_loader, of_tensors, in_bytes):
        assert {k: v for k, v in found.items() if k not in ours} == {
            k: v for k, v in of_shards.items() if k not in ours
        }
        assert found["data"] == of_loader["data"] != of_shards["data"]
    assert compare(of_loader, in_bytes)["n"] == N
    with torch.no_grad():
        right = model(x).argmax(dim=1) == y
    assert of_loader["attacks"]["clean"]["correct"] == right.int().tolist()
    assert 0 < of_loader["attacks"]["pgd3"]["accuracy"] < of_loader["attacks"]["clean"]["accuracy"]
    assert list(of_loader["attacks"]["clean"]["per_class"]) == list(NAMES)


def test_ids_stay_with_their_images(healthy: dict[str, fd.AdaptedModel], pair: tuple[Tensor, Tensor]) -> None:
    """Shuffled or not, with padding or not, each image keeps its verdicts."""
    model, ids = healthy["full_at"], torch.arange(1000, 1000 - 7 * N, -7)
    settings: dict[str, Any] = {"attacks": ("clean", "pgd3"), "batch_size": 8}
    plain = evaluate(model, (*pair, ids), **settings)
    shuffled = evaluate(model, DataLoader(Rows(*pair), batch_size=8, shuffle=True), **settings)
    assert shuffled == plain
    assert plain["ids"] == sorted(ids.tolist())
    padded = fd.Batch(*(torch.cat([t, t[:3]]) for t in (*pair, ids)), torch.arange(N + 3) < N)
    assert evaluate(model, [padded], **settings) == plain
    by_position = evaluate(model, pair, **settings)
    assert by_position["ids"] == list(range(N))
    assert by_position["attacks"]["clean"]["correct"] == plain["attacks"]["clean"]["correct"][::-1]


def test_some_of_them_evenly_over_the_classes(
    healthy: dict[str, fd.AdaptedModel], folder: Path, pair: tuple[Tensor, Tensor]
) -> None:
    pictures = ImageFolder(folder, ToTensor())
    found = evaluate(healthy["full_at"], DataLoader(pictures, batch_size=16), num_samples=8, attacks=("clean",))
    assert [n for _, n in found["attacks"]["clean"]["per_class"].values()] == [2, 2, 2, 2]
    assert found["ids"] == [i for i in range(N) if i % 10 < 2]
    part = Subset(pictures, range(8))
    found = evaluate(healthy["full_at"], DataLoader(part, batch_size=3), attacks=("clean",))
    assert list(found["attacks"]["clean"]["per_class"]) == list(NAMES), "of the data set under the subset"
    unnamed = evaluate(healthy["full_at"], pair, attacks=("clean",))
    assert list(unnamed["attacks"]["clean"]["per_class"]) == ["0", "1", "2", "3"]


def test_augmented_images_are_the_same_ones_under_every_attack(healthy: dict[str, fd.AdaptedModel]) -> None:
    """A loader is read once: a second epoch would be other pixels."""

    class Noise(IterableDataset):
        epochs = 0

        def __iter__(self) -> Any:
            self.epochs += 1
            generator = torch.Generator().manual_seed(self.epochs)
            return iter((torch.rand(3, 16, 16, generator=generator), i % CLASSES) for i in range(8))

    noise = Noise()
    first = evaluate(healthy["standard"], DataLoader(noise, batch_size=4), attacks=("clean", "fgsm"))
    assert noise.epochs == 1
    second = evaluate(healthy["standard"], DataLoader(noise, batch_size=4), attacks=("clean", "fgsm"))
    with pytest.raises(UserError, match=r"data of A is .*: they cannot be compared"):
        compare(first, second)


X, Y = images(4), torch.arange(4)
IN_MODEL = "normalise in the model, not in the transform (models of create_model and load do so)"
WHAT = "data must be a folder of shards, an EvalStream, a DataLoader or a pair of tensors (x, y), got"
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "normalised": (lambda: (4 * X - 2, Y), {}, f"x must be in [0, 1], got -2 to 2; {IN_MODEL}"),
    "a normalised batch of a loader": (
        lambda: [(X, Y), (4 * X - 2, Y)],
        {},
        f"data: batch 1: x must be in [0, 1], got -2 to 2; {IN_MODEL}",
    ),
    "half precision": (
        lambda: (X.half(), Y),
        {},
        "x must be float32 or float64, got float16, which rounds away perturbations of a grey level; write x.float() "
        "and cast inside the model",
    ),
    "0..255 as int64": (
        lambda: ((255 * X).long(), Y),
        {},
        "x must be floats in [0, 1], got int64; for 0..255 write x.float() / 255",
    ),
    "labels as floats": (
        lambda: (X, Y.float()),
        {},
        "y must be integer labels [B], got float32 [4]; write y.long()",
    ),
    "negative labels": (lambda: (X, Y - 1), {}, "y must be labels >= 0, got -1"),
    "labels beyond the outputs": (
        lambda: (X, Y + 1),
        {},
        "y must be labels below 4, one for each of the model's 4 outputs, got 4; labels count from 0",
    ),
    "labels beyond the names": (
        lambda: (X, Y),
        {"classes": ["a", "b"]},
        "y must be labels below 2, one for each of 2 class names, got 3; labels count from 0",
    ),
    "fewer labels": (lambda: (X, Y[:3]), {}, "y must have a label for each image, got 3 for 4 images"),
    "no labels": (
        lambda: DataLoader(TensorDataset(X)),
        {},
        "data must yield (x, y) or (x, y, ids), got 1 values",
    ),
    "a dict": (lambda: [{"x": X, "y": Y}], {}, "data must yield (x, y) or (x, y, ids), got dict"),
    "a data set": (
        lambda: TensorDataset(X, Y),
        {},
        f"{WHAT} TensorDataset; wrap it in a DataLoader",
    ),
    "a tensor": (lambda: X, {}, f"{WHAT} Tensor"),
    "nothing": (lambda: None, {}, f"{WHAT} NoneType"),
    "an empty loader": (lambda: [], {}, "data has no images"),
    "no images": (lambda: (X[:0], Y[:0]), {}, "x has no images, got [0, 3, 16, 16]"),
    "a loader that shuffles": (
        lambda: DataLoader(TensorDataset(X, Y), shuffle=True),
        {},
        "data: the DataLoader shuffles, so that an image's position does not tell which one it is; set shuffle=False, "
        "or yield (x, y, ids)",
    ),
    "one that shuffles for each rank": (
        lambda: DataLoader(TensorDataset(X, Y), sampler=DistributedSampler(TensorDataset(X, Y), 2, 0)),
        {},
        "data: the DataLoader shuffles, so that an image's position does not tell which one it is; set shuffle=False, "
        "or yield (x, y, ids)",
    ),
    "no batches": (lambda: (X, Y), {"batch_size": -1}, "batch_size must be an integer >= 1, got -1"),
    "two sizes": (
        lambda: [(X, Y), (X[..., :12], Y)],
        {},
        "data: images must be alike, got float32 [3, 16, 12] in batch 1, float32 [3, 16, 16] before",
    ),
    "an id twice": (lambda: (X, Y, Y // 2), {}, "evaluation: a sample is in two batches"),
    "more than there are": (
        lambda: (X, Y),
        {"num_samples": 5},
        "num_samples must be between 1 and the 4 images of data, got 5",
    ),
    "a fraction of images": (lambda: (X, Y), {"num_samples": 4.0}, "num_samples must be an integer >= 1, got 4.0"),
    "checks of less than none": (
        lambda: (X, Y),
        {"gradient_masking_samples": -1},
        "gradient_masking_samples must be an integer >= 0, got -1",
    ),
    "labels that no image has": (lambda: ((255 * X).byte(), Y - 100), {}, "y must be labels >= 0, got -100"),
    "norms of the command line": (
        lambda: (X, Y),
        {"norms": ["l2=1"]},
        "norms must be a mapping from norm to eps, e.g. {\"l2\": 2}, got ['l2=1']",
    ),
    "an unknown norm": (lambda: (X, Y), {"norm": "l3"}, "norm: 'l3' is unknown; known: linf, l2, l1"),
    "a number among the attacks": (
        lambda: (X, Y),
        {"attacks": ("clean", 5)},
        "attacks must be names, e.g. ['clean', 'pgd20'], got 5",
    ),
    "a name instead of names": (
        lambda: (X, Y),
        {"classes": "ants"},
        "classes must be a list of names, in the order of the labels, got 'ants'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    data, settings, line = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        fd.evaluate(tiny(), data(), **{"attacks": ("clean",), **settings})
    assert str(refusal.value) == line


def test_a_stream_has_settings_of_its_own(images: Path) -> None:
    with pytest.raises(UserError, match="num_samples: a stream has its own; give it to the EvalStream instead"):
        fd.evaluate(tiny(), stream(images), num_samples=3)
    with pytest.raises(UserError, match="classes: shards and streams have their own class names; leave it out"):
        fd.evaluate(tiny(), stream(images), classes=NAMES)


def test_the_worst_case_is_what_all_attacks_leave(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    found = fd.evaluate(healthy["full_at"], stream(images), attacks=("clean", "fgsm", "cw1", "pgd1"), eps=1.5 * EPS)
    left = [found["attacks"][name]["correct"] for name in ("clean", "fgsm", "cw1", "pgd1")]
    expected = [int(all(row)) for row in zip(*left, strict=True)]
    assert found["worst_case"]["correct"] == expected
    assert found["worst_case"]["accuracy"] == np.mean(expected)
    assert sum(expected) < min(map(sum, left)), "each attack fools an image that the others do not"
    clean = fd.evaluate(stir(tiny()), stream(images, 8), attacks=("clean",))
    assert "worst_case" not in clean, "nothing was attacked"
