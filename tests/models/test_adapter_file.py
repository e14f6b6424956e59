"""The adapter on disk comes back bit for bit, or is refused with one line."""

import contextlib
import functools
import hashlib
import json
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file

import fulllora_dist as fd
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.comm import Comm, free_port
from fulllora_dist.models.adapt import create_model
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.adapter_description import AdapterDescription
from fulllora_dist.registry.card import model_card
from fulllora_dist.training.build import build_evaluator
from tests.tiny import ARCHITECTURE, architecture, images, roughen, stir, tiny

TAG = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
FILES = ("adapter.json", "adapter.safetensors")
MODES = [
    {"finetune": "fulllora"},
    {"finetune": "fulllora", "head": "adapted", "qkv": "shared", "alpha": 7.0, "patch_norm_eps": 0.5},
    {"finetune": "lora", "components": ("q", "v", "fc2"), "head": "frozen"},
    {"finetune": "full"},
    {"finetune": "head"},
    {"finetune": "layernorm"},
    {"family": "deit_distilled"},
    {"family": "swin", "blocks": [2, 0], "train_norms": True},
    {"mean": (0.1, 0.2, 0.3), "std": (0.9, 0.8, 0.7)},
]


def weights(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    model = timm.create_model(TAG, **ARCHITECTURE, img_size=16, num_classes=6)
    save_file({n: torch.randn_like(v) * 0.3 for n, v in model.state_dict().items()}, path)
    return str(path)


def from_weights(checkpoint: str, name: str = TAG, **settings: Any) -> AdaptedModel:
    return create_model(
        name, **{"checkpoint_path": checkpoint, "image_size": 16, "model_kwargs": ARCHITECTURE} | settings
    )


def bits(model: AdaptedModel) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def no_pickle(*_: object, **__: object) -> None:
    raise AssertionError("something was unpickled")


@pytest.fixture
def without_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, no_pickle)


@pytest.mark.usefixtures("without_pickle")
@pytest.mark.parametrize("settings", MODES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_round_trip_is_bit_equal(settings: dict[str, Any], tmp_path: Path) -> None:
    model = stir(tiny(**settings))
    fd.save_adapter(model, str(tmp_path / "a"), training={"eps": 4 / 255})
    back = fd.load(str(tmp_path / "a"))
    assert bits(back) == bits(model)
    assert torch.equal(back(images()), model(images()))
    assert back.spec == model.spec
    assert back.report == model.report
    assert back.info.sha256 == model.info.sha256
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == list(FILES)
    assert set(load_file(tmp_path / "a" / "adapter.safetensors")) == set(model.trainable())
    # as before these settings, where they are not used
    keys = json.loads((tmp_path / "a" / "adapter.json").read_text())["adapter"].keys()
    assert keys & {"blocks", "train_norms"} == settings.keys() & {"blocks", "train_norms"}
    # what was loaded is saved as the same adapter
    fd.save_adapter(back, str(tmp_path / "b"), training={"eps": 4 / 255})
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("finetune", ["fulllora", "full"])
def test_round_trip_over_a_checkpoint_with_chosen_classes(finetune: str, tmp_path: Path) -> None:
    checkpoint = weights(tmp_path / "w.safetensors", seed=1)
    model = stir(
        from_weights(
            checkpoint, class_indices=[4, 1, 2], finetune=finetune, **({"rank": 2} if finetune != "full" else {})
        )
    )
    fd.save_adapter(model, f"memory://adapter-{finetune}")
    back = fd.load(f"memory://adapter-{finetune}")
    assert bits(back) == bits(model)
    for field in ("name", "checkpoint", "pretrained", "own_classes", "sha256", "num_classes"):
        assert getattr(back.info, field) == getattr(model.info, field), field


def test_statistics_that_an_earlier_file_lacks_are_the_backbone_s(tmp_path: Path) -> None:
    name = "xcit_nano_12_p8_224.fb_in1k"
    of_backbone = str(tmp_path / "backbone.safetensors")
    save_file(roughen(tiny("xcit", finetune="full")).backbone.state_dict(), of_backbone)
    model = stir(from_weights(of_backbone, name=name, model_kwargs=architecture("xcit"), finetune="full"))
    fd.save_adapter(model, str(tmp_path / "a"))
    names = set(model.backbone.state_dict()) - set(model.trainable())
    assert any(name.endswith("running_mean") for name in names)
    forge(tmp_path / "a", tensors=lambda state: [state.pop(name) for name in names])
    assert bits(fd.load(str(tmp_path / "a"))) == bits(model)


@pytest.mark.parametrize(("family", "tag"), [("vit", TAG), ("xcit", "xcit_nano_12_p8_224.fb_in1k")])
def test_a_fully_finetuned_model_is_itself_a_checkpoint(family: str, tag: str, tmp_path: Path) -> None:
    """Also where it has statistics of batch norms, which do not train and are not those of a new model."""
    model = roughen(stir(tiny(family, finetune="full")))
    expected = model(images())
    fd.save_adapter(model, str(tmp_path))
    assert torch.equal(fd.load(str(tmp_path))(images()), expected)
    checkpoint = str(tmp_path / "adapter.safetensors")
    again = from_weights(checkpoint, name=tag, model_kwargs=architecture(family), rank=1)
    assert torch.equal(again(images()), expected)
    tensors = model.trainable()
    fd.save_adapter(model, str(tmp_path / "average"), state={name: p.detach() / 2 for name, p in tensors.items()})
    halved = fd.load(str(tmp_path / "average"))
    assert all(torch.equal(p, tensors[name] / 2) for name, p in halved.trainable().items())
    assert all(torch.equal(b, dict(model.backbone.named_buffers())[n]) for n, b in halved.backbone.named_buffers())


def test_an_adapter_that_is_saved_again_is_a_new_file(tmp_path: Path) -> None:
    """Whoever reads the old one, or dies while writing the new one, is left with a whole one."""
    fd.save_adapter(tiny(), tmp_path)
    paths = [tmp_path / name for name in FILES]
    before = [path.read_bytes() for path in paths]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        fd.save_adapter(stir(tiny()), tmp_path)
        assert [file.read() for file in files] == before
    assert [path.read_bytes() for path in paths] != before
    assert sorted(path.name for path in tmp_path.iterdir()) == list(FILES)


def test_an_average_is_saved_in_place_of_the_tensors(tmp_path: Path) -> None:
    model = stir(tiny())
    average = {name: p.detach() / 2 for name, p in model.trainable().items()}
    fd.save_adapter(model, str(tmp_path), state=average)
    assert all(torch.equal(p, average[name]) for name, p in fd.load(str(tmp_path)).trainable().items())


def test_the_backbone_must_be_the_one_it_was_trained_on(tmp_path: Path) -> None:
    first, second = (weights(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    model = stir(from_weights(first, rank=2))
    fd.save_adapter(model, str(tmp_path / "a"))
    moved = tmp_path / "moved.safetensors"
    Path(first).rename(moved)
    gone = f"adapter: {tmp_path}/a was trained on the weights {first}, which are not there; give load"
    for load in (fd.load, lambda address: fd.MultiAdapter({"a": address})):
        with pytest.raises(UserError, match=gone):
            load(str(tmp_path / "a"))
    with pytest.raises(UserError, match=f"belongs to {TAG} with fingerprint {model.info.sha256[:12]}, but"):
        fd.load(str(tmp_path / "a"), checkpoint_path=second)
    assert bits(fd.load(str(tmp_path / "a"), checkpoint_path=str(moved))) == bits(model)


def test_a_store_that_does_not_answer_is_one_line() -> None:
    with pytest.raises(UserError, match=r"adapter: http://127.0.0.1:\d+/a/adapter.json: Cannot connect"):
        fd.load(f"http://127.0.0.1:{free_port()}/a")


def forge(folder: Path, description: Callable[[dict], object] = id, tensors: Callable[[dict], object] = id) -> None:
    """Change an adapter and make its checksums fit again, as a careful hand would."""
    metadata = json.loads((folder / "adapter.json").read_text())
    state = load_file(folder / "adapter.safetensors")
    description(metadata)
    tensors(state)
    content = save(state)
    metadata["sha256"] = hashlib.sha256(content).hexdigest()
    del metadata["checksum"]
    metadata["checksum"] = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    (folder / "adapter.safetensors").write_bytes(content)
    (folder / "adapter.json").write_text(json.dumps(metadata))


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def flip_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


B = "blocks.0.mlp.fc1.lnlora.B"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no json": (lambda f: (f / "adapter.json").unlink(), "has no adapter.json"),
    "no tensors": (lambda f: (f / "adapter.safetensors").unlink(), "has no adapter.safetensors"),
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "has no adapter.json"),
    "tensors flipped": (edit("adapter.safetensors", flip_last), "adapter.safetensors is damaged"),
    "tensors cut": (edit("adapter.safetensors", lambda c: c[:-9]), "adapter.safetensors is damaged"),
    "json cut": (edit("adapter.json", lambda c: c[:-9]), "adapter.json is damaged"),
    "json empty": (edit("adapter.json", lambda c: b""), "adapter.json is damaged"),
    "json a list": (edit("adapter.json", lambda c: b"[1]"), "adapter.json is damaged"),
    "json binary": (edit("adapter.json", lambda c: b"\xff\x00" + c), "adapter.json is damaged"),
    "json another alpha": (
        edit("adapter.json", lambda c: c.replace(b'"alpha": 3.0', b'"alpha": 7.0')),
        "adapter.json is damaged",
    ),
    "another version": (
        edit("adapter.json", lambda c: c.replace(b'"format_version": 1', b'"format_version": 99')),
        "has format version 99; this program reads 1",
    ),
    "field unknown": (lambda f: forge(f, lambda d: d["adapter"].update(depth=3)), "adapter.json .*depth"),
    "field lost": (lambda f: forge(f, lambda d: d["backbone"].pop("sha256")), "adapter.json .*sha256"),
    "another rank": (
        lambda f: forge(f, lambda d: d["adapter"].update(rank=4)),
        r"lnlora.A must have shape \(4, \d+\), got \(3",
    ),
    "another depth": (lambda f: forge(f, lambda d: d["backbone"]["architecture"].update(depth=1)), "fingerprint"),
    "another seed": (lambda f: forge(f, lambda d: d["adapter"].update(seed=5)), "fingerprint"),
    "tensor lost": (lambda f: forge(f, tensors=lambda t: t.pop(B)), f"adapter: {B} is missing"),
    "tensor too many": (
        lambda f: forge(f, tensors=lambda t: t.update(extra=t[B].clone())),
        "adapter: extra is not in this model",
    ),
    "tensor reshaped": (
        lambda f: forge(f, tensors=lambda t: t.update({B: t[B][:-1]})),
        f"adapter: {B} must have shape ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_that_adapter_is_refused(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    fd.save_adapter(stir(tiny()), str(folder))
    change, words = DAMAGE[damage]
    change(folder)
    with pytest.raises(UserError, match=f"adapter: .*{words}|^{words}") as caught:
        fd.load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("training", "line"), [
    ({"threat": "linf 4/255"}, 'training: threat must be a mapping such as {"norm": "linf", "eps": 0.016}, got'),
    ({"threat": {"eps": 4 / 255}}, 'training: threat must be a mapping such as {"norm": "linf", "eps": 0.016}, got'),
    ({"data": ["cat", "dog"]}, 'training: data must be a mapping such as {"classes": ["cat", "dog"]}, got'),
    ({"seed": "0"}, "training: seed must be an integer, got '0'"),
])  # fmt: skip
def test_a_record_that_nothing_could_read_is_not_saved(training: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        fd.save_adapter(tiny(), tmp_path / "adapter", training=training)
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """URL of tmp_path on a web server, which asks for no signature."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_what_signs_a_checkpoint_s_url_is_not_kept(web: str, tmp_path: Path) -> None:
    local = weights(tmp_path / "weights.safetensors", 1)
    url, folder = f"{web}/weights.safetensors?X-Amz-Signature=dead", str(tmp_path / "adapter")
    model = stir(from_weights(url, rank=2))
    fd.save_adapter(model, folder)
    description = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert description["backbone"]["checkpoint"] == f"{web}/weights.safetensors?***"
    with pytest.raises(
        UserError, match=r"checkpoint_path: .*safetensors\?\*\*\* was saved without its signature; set it to"
    ):
        fd.load(folder)
    for checkpoint in (url, local):
        assert bits(fd.load(folder, checkpoint_path=checkpoint)) == bits(model)
    description["backbone"]["checkpoint"] = url  # as earlier versions wrote it
    assert "dead" not in model_card(AdapterDescription.of(description | {"training": {}}))
    config = {"model": {"backbone": "none"}, "data": {"train": "none"}, "run": {"output_dir": "none"}}
    config |= {"threat": {"eps": 0.1}, "optim": {"epochs": 1}, "method": {"name": "fgsm_rs"}}
    comm = Comm(0, 1, torch.device("cpu"), control=None)
    evaluator = build_evaluator(Config.model_validate(config), model.info, comm, f"{web}/adapter?sig=dead")
    assert evaluator._evaluated["adapter"] == f"{web}/adapter?***"
    for wrong in (f"{web}/gone.safetensors?sig=dead", f"http://me:dead@{web.removeprefix('http://')}/x.pth"):
        with pytest.raises(UserError, match=r"^model.checkpoint_path: http") as caught:
            from_weights(wrong)
        assert "dead" not in str(caught.value)
    with pytest.raises(UserError, match=r"has no adapter\.json") as caught:
        fd.load(f"{web}/gone?sig=dead")
    assert "dead" not in str(caught.value)
