"""A real `mlflow server` and a sqlite store, adapters, and evaluations of them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fulllora_dist as fd
from fulllora_dist.evaluation.report import score
from fulllora_dist.registry.registry import Registry
from tests.services.mlflow_server import MlflowServer
from tests.tiny import CLASSES, stir, tiny

EPS = 8 / 255
TRAINING = {
    "threat": {"norm": "linf", "eps": EPS},
    "method": {"name": "pgd", "steps": 3},
    "optim": {"lr": 1e-3},
    "seed": 0,
    "batches": 10,
    "updates": 10,
    "data": {"name": "digits", "index": "0f" * 32, "classes": ["ant", "bee", "cat", "dog"], "augment": "none"},
}
NAME = "vit_tiny_patch16_224_"  # and the weights' sha256, as random weights have no tag


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[str]:
    """URL of an `mlflow server` that serves artifacts, too."""
    with MlflowServer(tmp_path_factory.mktemp("server"), database) as running:
        running.start()
        yield running.uri


@pytest.fixture(scope="module")
def sqlite(database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a store in a file."""
    return f"sqlite:///{shutil.copy(database, tmp_path_factory.mktemp('sqlite'))}"


@pytest.fixture(params=["sqlite", "server"])
def registry(request: pytest.FixtureRequest) -> Registry:
    """Of each kind of store; that in a file is the module's own."""
    return Registry(request.getfixturevalue(request.param), create=True)


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., str]:
    """adapter(seed=..., **settings) -> folder of an adapter with tensors of that seed."""

    def make(seed: int = 0, training: dict[str, Any] | None = None, **settings: Any) -> str:
        folder = tmp_path / f"adapter-{seed}-{len(list(tmp_path.iterdir()))}"
        fd.save_adapter(stir(tiny(**settings), seed), str(folder), training=TRAINING if training is None else training)
        return str(folder)

    return make


def evaluation(robust: np.ndarray, clean: np.ndarray | None = None, **metadata: Any) -> dict[str, Any]:
    """evaluation.json of images that are correct (1) or not under pgd20."""
    labels = np.arange(len(robust)) % CLASSES
    classes = TRAINING["data"]["classes"]
    clean = np.ones_like(robust) if clean is None else clean
    return {
        "n": len(robust),
        "eps": EPS,
        "norm": "linf",
        "precision": "fp32",
        "backbone": "vit_tiny_patch16_224",
        "adapter": "adapter",
        "seed": 0,
        "data": "index",
        "ids": list(range(len(robust))),
        "attacks": {"clean": score(clean, labels, classes), "pgd20": score(robust, labels, classes)},
        "more_eps": [],
        "checks": {"square": {"n": 50}},
        "warnings": [],
    } | metadata


def right(n: int, of: int = 200) -> np.ndarray:
    """The first n of so many images are correct."""
    return (np.arange(of) < n).astype(int)
