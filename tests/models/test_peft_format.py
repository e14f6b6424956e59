"""LoRA in peft's files: what we write peft loads, with our logits; what peft writes we load, with its logits."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fulllora_dist as fd
from tests.models.own_modules import HALF, TARGETS, hugging_face_vit, torchvision_vit
from tests.models.test_adapt_module import own, same, timm_model, trace
from tests.tiny import CLASSES, SIDE, images, stir, tiny


def logits(module: nn.Module) -> Tensor:
    mean, std = (torch.tensor(HALF[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        inner = module.base_model.model if isinstance(module, peft.PeftModel) else module  # its forward is for texts
        output = inner.eval()((images() - mean) / std)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize(("family", "settings"), [
    ("vit", {}), ("vit", {"qkv": "shared", "head": "adapted"}), ("vit", {"components": ("q", "v"), "head": "frozen"}),
    ("swin", {}), ("siglip_pool", {}), ("xcit", {}), ("cait", {"head": "frozen"}), ("convit", {}),
    ("torchvision", {}), ("hugging face", {"head": "trained"}), ("vit", {"blocks": [1], "train_norms": True}),
    ("hugging face", {"train_norms": True}),
])  # fmt: skip
def test_peft_loads_what_is_saved(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Fused projections of two and three parts, convolutions and trained heads included."""
    module, targets = own(family) if family in TARGETS else (timm_model(family), None)
    bare = copy.deepcopy(module)
    settings = {"finetune": "lora", "rank": 3, "alpha": 2.0, **HALF, **settings}
    model = stir(fd.adapt(module, target_modules=targets, **settings))
    fd.save_peft(model, tmp_path)
    with torch.no_grad():
        expected = model(images())
    before = logits(bare)
    theirs = peft.PeftModel.from_pretrained(bare, str(tmp_path))
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
    assert (before - expected).abs().max() > 0.05
    # and back, as one branch of three times the rank for a fused projection
    again = fd.load_peft(tmp_path, fd.unload(model), **HALF)
    with torch.no_grad():
        torch.testing.assert_close(again(images()), expected, rtol=1e-4, atol=1e-5)


THEIRS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16},
    "a head": {"target_modules": "all-linear", "task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "r": 2},
    "ranks": {
        "target_modules": ["fc1", "fc2", "projection"], "r": 2, "lora_alpha": 3, "rank_pattern": {"fc1": 5},
        "alpha_pattern": {"layers.0.mlp.fc2": 7}, "lora_dropout": 0.1,
    },
    "rank-stabilized": {"target_modules": ["o_proj", "fc1"], "r": 4, "rank_pattern": {"fc1": 2}, "use_rslora": True},
}  # fmt: skip


@pytest.mark.parametrize("case", THEIRS)
def test_what_peft_saves_is_loaded(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = hugging_face_vit()
    bare = copy.deepcopy(module)
    theirs = peft.get_peft_model(copy.deepcopy(module), peft.LoraConfig(**THEIRS[case]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
                assert "lora_" in name or "classifier" in name
    theirs.save_pretrained(str(tmp_path))
    model = fd.load_peft(tmp_path, module, name="ours", **HALF)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), logits(theirs), rtol=1e-5, atol=1e-5)
    fd.save_adapter(model, str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = model(images())
        merged = logits(fd.merge(model))
    torch.testing.assert_close(merged, logits(theirs.merge_and_unload()), rtol=1e-5, atol=1e-5)
    assert torch.equal(fd.load(str(tmp_path / "adapter"), backbone=bare)(images()), expected)


def damaged(folder: Path, **config: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def renamed(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json; give a folder that peft's"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no"), "is damaged, or no LoRA adapter"),
    (lambda folder: damaged(folder, peft_type="IA3"), "must be LoRA, got IA3"),
    (lambda folder: damaged(folder, use_dora=True), "has use_dora=True, which is no plain LoRA; must be False"),
    (lambda folder: damaged(folder, bias="all"), "has bias='all', which is no plain LoRA"),
    (lambda folder: renamed(folder, "fc1.lora_B", "fc1.lora_C"), "must have lora_A and lora_B of each layer"),
    (lambda folder: damaged(folder, init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4', with"),
    (lambda folder: damaged(folder, layer_replication=[[0, 1], [0, 2]]), r"layer_replication=.* must be off"),
    (lambda folder: damaged(folder, use_qalora=True), "has use_qalora=True, which is no plain LoRA; must be off"),
    (lambda folder: damaged(folder, alpha_pattern={"fc1(": 3}), "must have regular expressions and numbers"),
    (lambda folder: damaged(folder, alpha_pattern={"fc1": "x"}), "must have regular expressions and numbers"),
    (lambda folder: renamed(folder, "fc1", "fc3"), "does not fit the module, which has no vit.layers.0.mlp.fc3"),
    (lambda folder: renamed(folder, "fc1", "fc2"), r"does not fit the module: vit.layers.0.mlp.fc2 takes A \[r, 64\]"),
    (lambda folder: renamed(folder, "classifier", "vit.layernorm"), "does not fit the module: adapter: "),
])  # fmt: skip
def test_files_that_do_not_fit_are_refused(damage: Any, words: str, tmp_path: Path) -> None:
    model = fd.adapt(hugging_face_vit(), target_modules=["fc1"], finetune="lora", head="trained", rank=2, **HALF)
    fd.save_peft(model, tmp_path)
    damage(tmp_path)
    module = fd.unload(model)
    before = trace(module)
    with pytest.raises(fd.UserError, match=words) as caught:
        fd.load_peft(tmp_path, module, **HALF)
    assert "\n" not in str(caught.value)
    assert same(trace(module), before)


@pytest.mark.parametrize(("make", "words"), [
    (tiny, "save_peft: peft's format holds plain LoRA, a model of finetune='lora', got finetune: fulllora"),
    (lambda: tiny("beit", finetune="lora"), r"never calls blocks.0.attn.qkv, but reads its weight"),
    (torchvision_vit, "got VisionTransformer"),
])  # fmt: skip
def test_what_peft_cannot_hold_is_refused(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(fd.UserError, match=words):
        fd.save_peft(make(), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


class SameEnds(nn.Module):
    """Layers whose names are the ends of others'."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.sub = nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, CLASSES)})
        self.embed, self.out = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.sub["fc"](self.fc(self.embed(x).mean(dim=(2, 3))).relu())
        return self.out(tokens + 0 * self.sub["out"](tokens).sum())


def test_layers_whose_names_are_ends_of_others(tmp_path: Path) -> None:
    """The branch of `fc` is that of `fc` alone, on both sides."""
    torch.manual_seed(0)
    module = SameEnds()
    bare = copy.deepcopy(module)
    settings: dict[str, Any] = {"image_size": SIDE, **HALF}
    model = stir(fd.adapt(module, target_modules="fc", finetune="lora", rank=2, alpha=8, **settings))
    fd.save_peft(model, tmp_path)
    with torch.no_grad():
        expected = model(images())
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare), str(tmp_path))
    assert theirs.targeted_module_names == ["fc"]
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    again = fd.load_peft(tmp_path, bare, **settings)
    torch.testing.assert_close(again(images()), expected, rtol=1e-5, atol=1e-5)
    hidden = fd.adapt(SameEnds(), target_modules="sub.out|fc", finetune="lora", head="trained", rank=2, **settings)
    with pytest.raises(
        fd.UserError, match=r"save_peft: peft takes sub.out, which has a branch, for the trained out by its"
    ):
        fd.save_peft(hidden, tmp_path / "hidden")
    assert not (tmp_path / "hidden").exists()
