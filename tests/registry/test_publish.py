"""An adapter becomes one version of one registered model, and comes out again as it went in."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fulllora_dist as fd
from fulllora_dist.errors import UserError
from fulllora_dist.tracking.publish import Lineage, publish
from fulllora_dist.tracking.registry import Registry
from tests.registry.conftest import evaluation, right
from tests.tiny import pictures


def test_published_once_and_loaded_as_it_was(
    registry: Registry, adapter: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    folder = adapter()
    run = registry.store.create_run(registry.store.experiment_id("trained")).info.run_id
    lineage = Lineage(run, "optim: {lr: 0.001}\n", "c0ffee")
    first = publish(registry, folder, evaluation=evaluation(right(120)), lineage=lineage)
    again = publish(registry, folder, evaluation=evaluation(right(120)), lineage=lineage)
    assert again == first
    (only,) = registry.versions(first.name)
    assert only == first
    assert first.name.startswith("vit_tiny_patch16_224_")
    assert first.name.endswith("-digits-linf-8_255")
    assert first.run_id == run
    description = json.loads(Path(folder, "adapter.json").read_text())
    expected = {
        "adapter_sha256": description["sha256"],
        "git_commit": "c0ffee",
        "data_digest": "0f" * 32,
        "method": "pgd",
        "n": "200",
        "norm": "linf",
        "attacks": "clean,pgd20",
        "warnings": "none",
        "accuracy.pgd20": "0.6000 0.5308 0.6654",  # Wilson's interval of 120 of 200
    }
    assert expected.items() <= first.tags.items()
    assert registry.evaluation(first) == evaluation(right(120))
    (logged,) = registry.store.search_logged_models([registry.store.experiment_id("trained")])
    assert logged.source_run_id == run
    fetched = registry.fetch(first.address, str(tmp_path / "fetched"))
    assert {"MLmodel", "README.md", "requirements.txt", "config.yaml"} <= set(os.listdir(fetched))
    for file in ("adapter.json", "adapter.safetensors"):
        assert Path(fetched, file).read_bytes() == Path(folder, file).read_bytes()
    x = pictures()
    expected_logits = fd.load(folder)(x)
    for address in (first.address, first.source, f"runs:/{run}/adapter"):
        assert torch.equal(fd.load(address)(x), expected_logits), address


def test_another_evaluation_of_the_same_adapter(registry: Registry, adapter: Callable[..., str]) -> None:
    folder = adapter(seed=2)
    bare = publish(registry, folder)
    assert registry.evaluation(bare) is None
    for n in (100, 110):
        version = publish(registry, folder, evaluation=evaluation(right(n)))
        assert version.number == bare.number
        assert registry.evaluation(version) == evaluation(right(n))
        assert version.tags["accuracy.pgd20"].startswith(f"{n / 200:.4f} ")
