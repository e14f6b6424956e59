"""The MLflow flavor: native and pyfunc, without pickle, on the right backbone alone."""

import json
import os
import pickle
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.comm import free_port
from fulllora_dist.models.adapter_description import AdapterDescription
from fulllora_dist.registry import flavor
from fulllora_dist.registry.card import model_card
from fulllora_dist.registry.publish import publish
from fulllora_dist.registry.registry import Registry
from tests.models.test_adapter_file import from_weights, no_pickle, weights
from tests.registry.conftest import EPS, TRAINING, evaluation, right
from tests.tiny import CLASSES, SIDE, stir, tiny


def uint8_images(n: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)


def native(model: fd.AdaptedModel, pixels: np.ndarray) -> np.ndarray:
    """As one writes it down: uint8 pixels to [0, 1], channels first."""
    with torch.no_grad():
        return model(
            torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / 255)
        ).numpy()


@pytest.fixture
def without_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, no_pickle)


@pytest.mark.usefixtures("without_pickle")
def test_saved_and_loaded_both_ways(tmp_path: Path) -> None:
    model, path = stir(tiny()), str(tmp_path / "model")
    flavor.save_model(model, path, evaluation=evaluation(right(120)))
    assert sorted(os.listdir(path)) == [
        "MLmodel", "README.md", "adapter.json", "adapter.safetensors", "conda.yaml", "python_env.yaml",
        "requirements.txt",
    ]  # fmt: skip
    x = uint8_images(70)
    assert np.array_equal(native(flavor.load_model(path), x[:5]), native(model, x[:5]))
    loaded = mlflow.pyfunc.load_model(path)
    scores = loaded.predict(x)
    assert (scores.shape, scores.dtype) == ((70, CLASSES), np.float32)
    np.testing.assert_array_equal(scores, np.concatenate([native(model, x[:64]), native(model, x[64:])]))
    assert loaded.predict(x[:0]).shape == (0, CLASSES)
    for wrong in (x.astype(np.float32) / 255, x[:, :8], x.transpose(0, 3, 1, 2)):
        with pytest.raises(mlflow.exceptions.MlflowException, match=r"schema|shape|type"):
            loaded.predict(wrong)
    info = mlflow.models.Model.load(path)
    assert info.metadata["backbone_sha256"] == model.info.sha256
    assert set(info.flavors) == {"fulllora_dist", "python_function"}
    assert f"torch=={torch.__version__.partition('+')[0]}" in Path(path, "requirements.txt").read_text().splitlines()
    with pytest.raises(UserError, match="is not empty; choose another folder for the model"):
        flavor.save_model(model, path)


@pytest.mark.usefixtures("without_pickle")
def test_logged_as_mlflow_s_own_flavors_are(sqlite: str) -> None:
    store, model = Registry(sqlite, create=True).store, stir(tiny())
    with mlflow.start_run(experiment_id=store.experiment_id("flavor")) as run:
        info = flavor.log_model(model, registered_model_name="logged")
    x = uint8_images()
    for uri in (info.model_uri, "models:/logged/1", f"runs:/{run.info.run_id}/adapter"):
        np.testing.assert_array_equal(mlflow.pyfunc.load_model(uri).predict(x), native(model, x))
        assert np.array_equal(native(flavor.load_model(uri), x), native(model, x))


def test_the_backbone_must_be_the_right_one(sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (weights(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    model = stir(from_weights(first, rank=2))
    fd.save_adapter(model, str(tmp_path / "adapter"), training=TRAINING)
    address = publish(Registry(sqlite, create=True), str(tmp_path / "adapter")).address
    moved = str(tmp_path / "moved.safetensors")
    Path(first).rename(moved)
    x = uint8_images()
    with pytest.raises(UserError, match=f"{address} belongs to .* these weights have .*; give the backbone") as caught:
        fd.load(address, checkpoint_path=second)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"^adapter: {address} was trained on the weights {first}, which are not there"):
        fd.load(address)
    assert np.array_equal(native(fd.load(address, checkpoint_path=moved), x), native(model, x))
    for wrong in (second, first):
        with pytest.raises(
            UserError, match=r"give the backbone it was trained on|not there; .* FULLLORA_CHECKPOINT=FILE$"
        ):
            mlflow.pyfunc.load_model(address, model_config={"checkpoint": wrong})
    monkeypatch.setenv("FULLLORA_CHECKPOINT", moved)
    np.testing.assert_array_equal(mlflow.pyfunc.load_model(address).predict(x), native(model, x))


def test_the_card_says_what_trained_which_batches() -> None:
    model = tiny()
    training = {
        "threat": {"norm": "linf", "eps": EPS},
        "made": [
            {"first": 0, "end": 4, "method": {"name": "standard"}, "eps": None, "image_size": 8},
            {"first": 4, "end": 9, "method": {"name": "pgd"}, "eps": EPS / 2, "image_size": None},
        ],
        "rollbacks": [{"at": at, "to": 4, "rollback_lr_factor": 0.5} for at in (6, 7)],
    }
    description = AdapterDescription(model.info, model.spec, "a", 1, 0.1, training, {})
    card = model_card(description).splitlines()
    assert "- batches 0 to 4: name standard; clean, 8 pixels" in card
    assert "- batches 4 to 9: name pgd; linf eps = 4/255" in card
    assert "- collapsed at batch 7, rolled back to 4, continued with 0.25 of the learning rate" in card


def test_the_card(tmp_path: Path) -> None:
    found = evaluation(right(120), right(190), warnings=["square: is stronger"], more_eps=[])
    fd.save_adapter(stir(tiny()), str(tmp_path / "adapter"), training=TRAINING)
    flavor.save_model(str(tmp_path / "adapter"), str(tmp_path / "model"), evaluation=found, name="bees")
    card = (tmp_path / "model" / "README.md").read_text()
    for line in (
        "# bees",
        "Made for linf eps = 8/255, in pixels of [0, 1]; white box, untargeted.",
        "| clean |  | 95.00 % | 91.0 to 97.3 % |",
        "| pgd20 | linf eps = 8/255 | 60.00 % | 53.1 to 66.5 % |",
        "n = 200, fp32.",
        "- square: is stronger",
        "- 4 classes: ant, bee, cat, dog",
        "- method: name pgd, steps 3",
        "- Nothing is claimed beyond this linf ball: not other norms, patches, blur or corruptions.",
        "- Not evaluated under AutoAttack: stronger attacks may find less accuracy than is said above.",
        'model = fd.load("models:/bees@champion")  # fp32 pixels [B, 3, H, W] in [0, 1] -> logits',
    ):
        assert line in card.splitlines(), line
    flavor.save_model(stir(tiny()), str(tmp_path / "bare"))
    bare = (tmp_path / "bare" / "README.md").read_text()
    assert "Not evaluated." in bare
    assert "Gradient masking was not checked." in bare


def wait_for(url: str, process: subprocess.Popen, seconds: float = 120) -> None:
    """Until it answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")


@pytest.mark.long
def test_served(server: str, adapter: Callable[..., str]) -> None:
    """By `mlflow models serve`, over HTTP."""
    port, folder = free_port(), adapter(seed=3)
    version = publish(Registry(server), folder, name="served")
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", version.address, "--env-manager", "local"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": server, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # it calls uvicorn by name
    process = subprocess.Popen([*command, "-p", str(port)], env=environment, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", process)
        x = uint8_images(2)
        body = json.dumps({"inputs": x.tolist()}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        np.testing.assert_allclose(answer["predictions"], native(fd.load(folder), x), rtol=1e-6)
    finally:
        process.poll() is None and os.killpg(process.pid, 9)
        process.wait()
