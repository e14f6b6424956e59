"""Modules that are there already: timm's as `create_model` builds them, others by their layers' names against the
formula in plain PyTorch, and what is refused without a trace."""

import ast
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.models.adapter_file import read_adapter
from fulllora_dist.registry.card import model_card
from fulllora_dist.registry.registry import model_name
from tests.models.own_modules import HALF, TARGETS, Encoder, hugging_face_vit, torchvision_vit
from tests.tiny import CLASSES, FAMILIES, SIDE, architecture, images, patches, stir, tiny


def timm_model(family: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(FAMILIES[family][0], num_classes=CLASSES, img_size=SIDE, **architecture(family))


def own(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    make, targets = TARGETS[name]
    return make(), targets


def trace(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """All that adapting could change."""
    return (
        {name: tensor.clone() for name, tensor in module.state_dict(keep_vars=True).items()},
        {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        {path: (type(part), part.training, sorted(vars(part))) for path, part in module.named_modules()},
    )


def same(a: tuple[dict[str, Any], ...], b: tuple[dict[str, Any], ...]) -> bool:
    tensors = a[0].keys() == b[0].keys() and all(torch.equal(value, b[0][name]) for name, value in a[0].items())
    return tensors and a[1:] == b[1:]


@pytest.mark.parametrize(("family", "settings"), [
    ("vit", {}), ("vit", {"finetune": "lora", "qkv": "shared", "head": "adapted"}), ("vit", {"finetune": "layernorm"}),
    ("swinv2", {"components": ("q", "v", "fc2"), "blocks": [0, 2], "train_norms": True}),
    ("eva02_fused", {"precision": "bf16"}), ("xcit", {"head": "frozen"}),
])  # fmt: skip
def test_timm_s_models_are_as_create_model_builds_them(family: str, settings: dict[str, Any]) -> None:
    """Bit for bit: names, start, and logits after the same training."""
    built = tiny(family, **settings)
    rank = {} if "finetune" in settings and settings["finetune"] == "layernorm" else {"rank": 3}
    adapted = fd.adapt(timm_model(family), **rank, **settings)
    assert adapted.spec == built.spec
    assert adapted.report == built.report
    assert all(map(torch.equal, adapted.state_dict().values(), built.state_dict().values()))
    assert adapted.state_dict().keys() == built.state_dict().keys()
    assert torch.equal(stir(adapted)(images()), stir(built)(images()))
    assert (adapted.info.mean, adapted.info.std, adapted.info.image_size) == (built.info.mean, built.info.std, SIDE)


def plain_logits(module: nn.Module, adapted: fd.AdaptedModel, pixels: Tensor) -> Tensor:
    """W x + b + (alpha / r) B A LN(x), by hooks on the bare module, in float64."""
    module = copy.deepcopy(module).double().eval()
    for site in (a.site for a in adapted.report.adapted):
        branch = copy.deepcopy(adapted.backbone.get_submodule(f"{site.path}.lnlora")).double()

        def add(layer: nn.Module, args: tuple[Tensor], y: Tensor, branch: Any = branch) -> Tensor:
            conv = isinstance(layer, nn.Conv2d)
            x = patches(args[0], layer) if conv else args[0]
            if branch.norm is not None:
                x = F.layer_norm(x, x.shape[-1:], branch.norm.weight, branch.norm.bias, branch.eps)
            update = branch.scale * x @ branch.A.t() @ branch.B.t()
            return y + (update.permute(0, 3, 1, 2) if conv else update)

        module.get_submodule(site.path).register_forward_hook(add)
    mean, std = (torch.tensor(HALF[key], dtype=torch.float64).view(1, 3, 1, 1) for key in ("mean", "std"))
    logits = module((pixels.double() - mean) / std)
    return logits if isinstance(logits, Tensor) else logits.logits


@pytest.mark.parametrize("finetune", ["fulllora", "lora"])
@pytest.mark.parametrize("name", TARGETS)
def test_any_module_by_the_names_of_its_layers(name: str, finetune: str) -> None:
    module, targets = own(name)
    bare, x = copy.deepcopy(module).eval(), images()
    adapted = fd.adapt(module, target_modules=targets, finetune=finetune, rank=3, alpha=6, **HALF)
    torch.testing.assert_close(adapted(x), plain_logits(bare, adapted, x).float(), rtol=1e-5, atol=1e-5)
    stir(adapted)
    expected = plain_logits(bare, adapted, x)
    torch.testing.assert_close(adapted(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain_logits(bare, fd.adapt(copy.deepcopy(bare), finetune="full", **HALF), x)).abs().max() > 0.1
    assert adapted.backbone is module
    assert adapted.num_classes == CLASSES
    conv = module.get_submodule("conv_proj" if name == "torchvision" else "vit.embeddings.patch_embeddings.projection")
    assert conv.lnlora.eps == adapted.spec.patch_norm_eps == 1e-2  # type: ignore[union-attr]
    assert {path.rpartition(".lnlora")[0].rpartition(".")[2] for path in adapted.trainable()} == {
        target.rpartition(".")[2] for target in targets
    }


@pytest.mark.parametrize(("targets", "layers"), [
    (["fc1"], ["vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc1"]),
    (["0.attention.q_proj"], ["vit.layers.0.attention.q_proj"]),
    ("vit.*[qv]_proj", [f"vit.layers.{i}.attention.{part}_proj" for i in range(2) for part in "qv"]),
    (["classifier"], ["classifier"]),
    ("all-linear", [f"vit.layers.{i}.{layer}" for i in range(2) for layer in (
        "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"
    )]),
])  # fmt: skip
def test_target_modules_mean_what_they_do_in_peft(targets: Any, layers: list[str]) -> None:
    import peft

    module = hugging_face_vit()
    # of a classifier peft leaves the head out of "all-linear"
    config = peft.LoraConfig(target_modules=targets, r=2, task_type="SEQ_CLS" if targets == "all-linear" else None)
    theirs = peft.get_peft_model(copy.deepcopy(module), config).targeted_module_names
    ours = fd.adapt(module, target_modules=targets, finetune="lora", rank=2, **HALF).report.adapted
    assert sorted(a.site.path for a in ours) == sorted(layers)
    assert sorted(theirs) == sorted(layers)


def test_the_fraction_and_the_head_count_as_in_create_model() -> None:
    adapted = fd.adapt(
        hugging_face_vit(), target_modules=["fc1", "fc2"], head="trained", trainable_fraction=0.2, **HALF
    )
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    total = sum(p.numel() for n, p in adapted.backbone.named_parameters() if ".lnlora." not in n)
    assert adapted.report.share == trained / total <= 0.2 < (trained + 4 * (32 + 64)) / total
    assert {"classifier.weight", "classifier.bias"} <= adapted.trainable().keys()


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "torchvision's attention": (
        torchvision_vit,
        {"target_modules": ["mlp.0", "out_proj"]},
        "target_modules: encoder.layers.encoder_layer_0.self_attention.out_proj is never called: nn.MultiheadAttention",
    ),
    "a fused encoder": (
        Encoder,
        {"target_modules": ["linear1"]},
        "encoder.linear1 is never called in a forward pass in",
    ),
    "an idle layer": (Encoder, {"target_modules": "idle"}, "target_modules: idle is never called"),
    "a layer without effect": (
        Encoder,
        {"target_modules": ["logged"]},
        "the logits do not depend on the output of logged",
    ),
    "attention that reads qkv": (lambda: timm_model("beit"), {"target_modules": ["qkv"]}, "qkv is never called"),
    "a container": (
        torchvision_vit,
        {"target_modules": ["mlp"]},
        r"mlp is a MLPBlock; name linear layers .*encoder_layer_0\.mlp\.0$",
    ),
    "no such layer": (
        hugging_face_vit,
        {"target_modules": ["fc1", "qproj"]},
        "'qproj' matches no .* did you mean q_proj",
    ),
    "an end within a name": (
        hugging_face_vit,
        {"target_modules": ["proj"]},
        "target_modules: 'proj' matches no module",
    ),
    "a pass that fails behind": (
        timm_model,
        {"image_size": 20, "rank": 2},
        "image_size: vit_tiny.* fails on an image of 3 x 20",
    ),
    "a pattern's part": (hugging_face_vit, {"target_modules": "fc1"}, "the pattern 'fc1' matches no whole name"),
    "no pattern": (hugging_face_vit, {"target_modules": "*fc1"}, r"'\*fc1' is not a regular expression"),
    "no names": (
        hugging_face_vit,
        {"target_modules": []},
        r"target_modules: must be names of layers .* its layers: proj",
    ),
    "no targets": (torchvision_vit, {}, "target_modules: must name the layers .* conv_proj, out_proj, mlp.0, mlp.3"),
    "no normalisation": (
        torchvision_vit,
        {"target_modules": ["mlp.0"], "mean": None},
        "^mean: must be given, as torchvision",
    ),
    "no image size": (
        Encoder,
        {"target_modules": ["embed"], "image_size": None},
        "^image_size: .*say for which square",
    ),
    "another image size": (
        torchvision_vit,
        {"target_modules": ["mlp.0"], "image_size": 20},
        r"^image_size: torchvision\S* fails on an image of 3 x 20 x 20 \(Wrong image height",
    ),
    "a head that is scaled": (
        Encoder,
        {"target_modules": ["embed"], "head": "trained"},
        "no linear layer whose output",
    ),
    "a head twice": (
        hugging_face_vit,
        {"target_modules": ["classifier"], "head": "trained"},
        "head: trained contradicts",
    ),
    "components": (torchvision_vit, {"target_modules": ["mlp.0"], "components": ("q",)}, "^components: is for timm's"),
    "blocks": (torchvision_vit, {"target_modules": ["mlp.0"], "blocks": [0]}, "^blocks: is for timm's .* regular"),
    "bf16": (torchvision_vit, {"target_modules": ["mlp.0"], "precision": "bf16"}, "^precision: bf16 is for timm's"),
    "a setting of building": (timm_model, {"num_classes": 10}, "^num_classes: adapt takes the module as it is"),
    "an unknown setting": (timm_model, {"lora_rank": 3}, "^unknown setting lora_rank; did you mean rank"),
    "targets of no branch": (
        timm_model,
        {"finetune": "head", "target_modules": ["qkv"]},
        "^target_modules: finetune: head",
    ),
    "half": (
        lambda: timm_model().half(),
        {},
        r"^module must be float32, got float16 \(cls_token\); write module.float",
    ),
    "pixels outside": (timm_model, {"mean": (127, 127, 127)}, "model.mean: must be at most 1, for pixels in"),
    "a rank that is too large": (
        torchvision_vit,
        {"target_modules": ["mlp.0"], "rank": 65},
        "adapter.rank: must be at",
    ),
    "features": (lambda: nn.Sequential(nn.Conv2d(3, 4, 4)), {"target_modules": ["0"]}, r"must return logits \[1, cl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_have_no_effect_is_refused_and_leaves_no_trace(case: str) -> None:
    make, settings, words = REFUSED[case]
    module = make()
    next(module.parameters()).requires_grad_(False)
    before = trace(module)
    with pytest.raises(fd.UserError, match=words) as caught:
        fd.adapt(module, **{**HALF, "image_size": SIDE, **settings})
    assert "\n" not in str(caught.value)
    assert same(trace(module), before)


def test_what_is_no_plain_module_is_refused() -> None:
    adapted = tiny()
    for module in (adapted, adapted.backbone):
        with pytest.raises(fd.UserError, match=r"has an adapter already; fd.unload\(model\)"):
            fd.adapt(module)
    with pytest.raises(fd.UserError, match="is compiled; adapt it first"):
        fd.adapt(torch.compile(timm_model(), backend="eager"))  # type: ignore[arg-type]
    with torch.inference_mode():
        made_inside = timm_model()
    with pytest.raises(fd.UserError, match=r"made under torch.inference_mode; create or load it outside"):
        fd.adapt(made_inside)
    with pytest.raises(fd.UserError, match="wrapped in DataParallel; adapt its"):
        fd.adapt(nn.DataParallel(timm_model()))
    with pytest.raises(fd.UserError, match=r"must be a torch.nn.Module, got str; create_model takes a name"):
        fd.adapt("vit_tiny_patch16_224")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["timm", *TARGETS])
def test_an_adapter_comes_back_on_its_own_module_alone(name: str, tmp_path: Path) -> None:
    module, targets = own(name) if name in TARGETS else (timm_model(), None)
    another = copy.deepcopy(module)
    with torch.no_grad():
        next(another.parameters()).add_(1e-3)
    bare = copy.deepcopy(module)
    model = stir(fd.adapt(module, target_modules=targets, rank=2, name="our.s", head="trained", **HALF))
    fd.save_adapter(model, str(tmp_path / "adapter"))
    with pytest.raises(fd.UserError, match=r"belongs to our.s, a module that adapt was given; .*backbone=module"):
        fd.load(str(tmp_path / "adapter"))
    before = trace(another)
    with pytest.raises(fd.UserError, match=r"belongs to our.s with fingerprint .* give the backbone it was trained on"):
        fd.load(str(tmp_path / "adapter"), backbone=another)
    with pytest.raises(fd.UserError, match=r"backbone: must be a .* for the adapter .*, got a .*Encoder"):
        fd.load(str(tmp_path / "adapter"), backbone=Encoder())
    assert same(trace(another), before)
    description, _ = read_adapter(str(tmp_path / "adapter"))
    assert 'fd.load("models:/mine@champion", backbone=module)' in model_card(description, name="mine")
    assert model_name(description, "set", ("linf", 4 / 255)) == f"our.s_{model.info.sha256[:8]}-set-linf-4_255"
    loaded = fd.load(str(tmp_path / "adapter"), backbone=bare)
    assert (loaded.spec, loaded.info, loaded.backbone) == (model.spec, model.info, bare)
    assert torch.equal(loaded(images()), model(images()))


def test_a_timm_module_takes_the_adapter_of_create_model(tmp_path: Path) -> None:
    model = stir(tiny())
    fd.save_adapter(model, str(tmp_path / "adapter"))
    loaded = fd.load(str(tmp_path / "adapter"), backbone=timm_model())
    assert torch.equal(loaded(images()), model(images()))
    fd.save_adapter(loaded, str(tmp_path / "again"))
    assert (tmp_path / "again/adapter.json").read_text() == (tmp_path / "adapter/adapter.json").read_text()


@pytest.mark.parametrize("name", TARGETS)
def test_one_s_own_loop_trains_it(name: str) -> None:
    module, targets = own(name)
    frozen = {key: value.clone() for key, value in module.state_dict().items()}
    model = fd.adapt(module, target_modules=targets, rank=4, **HALF)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    method, engine = fd.method("pgd", eps="4/255", steps=2), fd.LocalEngine(model.train(), optimizer)
    batch = fd.Batch.of(images(8), torch.arange(8) % CLASSES)
    losses = [float(method.step(engine, batch, step)["loss"]) for step in range(12)]
    assert losses[-1] < losses[0] - 0.1
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items())


@pytest.mark.parametrize("name", ["timm", *TARGETS])
def test_several_adapters_of_a_module_are_switched(name: str, tmp_path: Path) -> None:
    """Each with the logits that it has alone, and none with the bare module's."""
    bare, targets = own(name) if name in TARGETS else (timm_model(), None)
    x, expected = images(), {}
    for key, settings in {"a": {"head": "trained"}, "b": {"finetune": "lora"}}.items():
        model = fd.adapt(copy.deepcopy(bare), target_modules=targets, rank=2, **HALF, **settings)
        expected[None] = model(x)
        fd.save_adapter(stir(model), str(tmp_path / key))
        expected[key] = model(x)
    folders = {key: str(tmp_path / key) for key in "ab"}
    with pytest.raises(fd.UserError, match="a module that adapt was given; give it: load"):
        fd.MultiAdapter(folders)
    several = fd.MultiAdapter(folders, backbone=bare).eval()
    assert torch.equal(several(x, "a"), expected["a"])
    assert torch.equal(several(x, "b"), expected["b"])
    choice = ["b", None, "a", "b"]
    mixed = several(x, choice)
    for i, key in enumerate(choice):
        torch.testing.assert_close(mixed[i], expected[key][i], rtol=1e-4, atol=1e-5)


def test_a_module_trained_as_a_whole_comes_back(tmp_path: Path) -> None:
    """Onto one of the same class, whatever its weights were."""
    model = stir(fd.adapt(hugging_face_vit(), finetune="full", **HALF))
    fd.save_adapter(model, str(tmp_path))
    assert torch.equal(fd.load(str(tmp_path), backbone=hugging_face_vit())(images()), model(images()))


def test_transformers_activation_checkpointing_is_taken(tmp_path: Path) -> None:
    """The same gradients, and the adapter is saved."""
    module, targets = own("hugging face")
    model = stir(fd.adapt(module, target_modules=targets, rank=2, **HALF)).train()

    def gradients() -> list[Tensor]:
        loss = F.cross_entropy(model(images()), torch.arange(CLASSES))
        return list(torch.autograd.grad(loss, list(model.trainable().values())))

    kept = gradients()
    module.gradient_checkpointing_enable()  # type: ignore[operator]
    assert all(map(torch.equal, gradients(), kept))
    fd.save_adapter(model, str(tmp_path))


class TopHead(nn.Module):
    """A layer called `head` that is not the one whose output the logits are."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(x).mean(dim=(2, 3))) * 2


@pytest.mark.parametrize(("make", "targets"), [
    (TopHead, ["f", "head"]), (lambda: timm_model("deit_distilled"), ["fc1", "head", "head_dist"]),
])  # fmt: skip
def test_a_layer_called_head_gets_its_branch(make: Any, targets: list[str]) -> None:
    model = fd.adapt(make(), target_modules=targets, rank=2, head="frozen", image_size=SIDE, **HALF)
    paths = [a.site.path for a in model.report.adapted]
    assert {path.rpartition(".")[2] for path in paths} == set(targets)
    for path in paths:
        before = model(images())
        with torch.no_grad():
            model.trainable()[f"{path}.lnlora.B"].add_(1)
        assert not torch.equal(model(images()), before)


@pytest.mark.parametrize("name", ["timm", "hugging face"])
def test_where_the_head_is_trained_its_start_does_not_matter(name: str, tmp_path: Path) -> None:
    """As in another process, which makes the head at random; where it is not trained it must be the same one."""
    module, targets = own(name) if name in TARGETS else (timm_model(), None)
    head = "head" if name == "timm" else "classifier"
    others = [copy.deepcopy(module) for _ in range(4)]
    for other in others:
        nn.init.normal_(other.get_submodule(head).weight)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"target_modules": targets, "rank": 2, **HALF}
    frozen = copy.deepcopy(module)
    for folder, backbone, kind in (("frozen", frozen, "frozen"), ("trained", module, "trained")):
        model = stir(fd.adapt(backbone, head=kind, **settings))
        fd.save_adapter(model, str(tmp_path / folder))
    loaded = fd.load(str(tmp_path / "trained"), backbone=others[0])
    assert torch.equal(loaded(images()), model(images()))
    fd.save_adapter(loaded, str(tmp_path / "again"))
    assert torch.equal(fd.load(str(tmp_path / "again"), backbone=others[1])(images()), model(images()))
    before = trace(others[2])
    with pytest.raises(fd.UserError, match=r"with another head, which it has not trained; give the backbone"):
        fd.load(str(tmp_path / "frozen"), backbone=others[2])
    with torch.no_grad():
        next(others[2].parameters()).add_(1)
    with pytest.raises(fd.UserError, match="give the backbone it was trained on"):
        fd.load(str(tmp_path / "trained"), backbone=others[2])
    assert before[1:] == trace(others[2])[1:]
    both = {"a": str(tmp_path / "trained"), "b": str(tmp_path / "frozen")}
    with pytest.raises(
        fd.UserError, match=r"frozen has not trained its head, and must have been made with the backbon"
    ):
        fd.MultiAdapter(both, backbone=others[3])
    same_again = own(name)[0] if name in TARGETS else timm_model()
    several = fd.MultiAdapter(both, backbone=same_again)
    assert several.adapters == ("a", "b")
    assert torch.equal(several(images(), "a"), model(images()))


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_forward_that_breaks_off_leaves_no_trace(error: type[BaseException]) -> None:
    """Whatever it raises once branches are there."""

    class Breaking(TopHead):
        def forward(self, x: Tensor) -> Tensor:
            if "lnlora" in self.f._modules:
                raise error("no such key")
            return super().forward(x)

    module = Breaking()
    before = trace(module)
    with pytest.raises(error):
        fd.adapt(module, target_modules=["f"], rank=2, image_size=SIDE, **HALF)
    assert same(trace(module), before)


def test_several_adapters_of_which_one_is_refused_leave_no_trace(tmp_path: Path) -> None:
    """Switches, hooks, classes and flags are taken back."""
    module, targets = own("hugging face")
    bare, x = copy.deepcopy(module).train(), images()
    model = stir(fd.adapt(module, target_modules=targets, rank=2, head="trained", **HALF))
    fd.save_adapter(model, str(tmp_path / "good"))
    before = trace(bare)
    with pytest.raises(fd.UserError, match=r"has no adapter.json"):
        fd.MultiAdapter({"good": str(tmp_path / "good"), "wrong": str(tmp_path / "none")}, backbone=bare)
    assert same(trace(bare), before)
    assert not any(part._forward_hooks for part in bare.modules())
    again = fd.MultiAdapter({"good": str(tmp_path / "good")}, backbone=bare)
    assert torch.equal(again(x, "good"), model(x))


@pytest.mark.parametrize(("make", "names"), [
    (torchvision_vit, ["conv_proj", "mlp.0", "mlp.3"]),
    (lambda: timm_model("beit"), ["proj", "fc1", "fc2"]),
    (lambda: torchvision.models.resnet18(num_classes=CLASSES), ["conv1", "conv2", "downsample.0"]),
    (lambda: nn.Sequential(nn.Conv2d(3, CLASSES, SIDE), nn.Flatten()), ["0"]),
])  # fmt: skip
def test_in_place_of_all_linear_a_list_is_offered(make: Any, names: list[str]) -> None:
    """Where that would take layers without effect, or none; and it is taken as it stands."""
    module = make()
    before = trace(module)
    settings: dict[str, Any] = {"rank": 2, "head": "frozen", "image_size": SIDE, **HALF}
    with pytest.raises(
        fd.UserError, match=r"^target_modules: .*in place of 'all-linear' give a list of layers: \["
    ) as e:
        fd.adapt(module, target_modules="all-linear", **settings)
    assert "leave it out" not in str(e.value)
    assert same(trace(module), before)
    offered = ast.literal_eval(str(e.value).rpartition("layers: ")[2])
    assert offered == names
    fd.adapt(module, target_modules=offered, **settings)


def test_a_class_may_move_to_a_file(tmp_path: Path) -> None:
    """From a notebook, where it is __main__.TopHead."""
    notebooks = type("TopHead", (TopHead,), {"__module__": "__main__"})
    module = notebooks()
    moved = TopHead()
    moved.load_state_dict(module.state_dict())
    model = stir(fd.adapt(module, target_modules=["f"], rank=2, image_size=SIDE, **HALF))
    assert model.info.module == "__main__.TopHead"
    fd.save_adapter(model, str(tmp_path))
    assert torch.equal(fd.load(str(tmp_path), backbone=moved)(images()), model(images()))


@pytest.mark.parametrize(("change", "words"), [
    (lambda model: model.backbone.add_module("more", nn.Linear(1, 1)), "the module more was added"),
    (lambda model: nn.init.ones_(model.backbone.head.weight), "the values of head.weight, which is frozen, changed"),
    (lambda model: model.backbone.head.double(), "head.weight was float32"),
    (lambda model: model.mean.add_(1), "the model's mean is"),
])  # fmt: skip
def test_advice_of_saving_is_what_adapt_takes(change: Any, words: str, tmp_path: Path) -> None:
    model = fd.adapt(TopHead(), target_modules=["f"], rank=2, image_size=SIDE, **HALF)
    with torch.no_grad():
        change(model)
    with pytest.raises(fd.UserError, match=f"^save_adapter: {words}.* adapt") as caught:
        fd.save_adapter(model, str(tmp_path / "adapter"))
    assert not re.search("create_model|checkpoint_path|model_kwargs", str(caught.value))


class Counting(TopHead):
    """It notes things in its forward pass, and has a factor that it leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.size, self.first, self.factor = 0, 0, True, 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.size, self.first, self.mean = self.calls + 1, len(x), False, float(x.mean())
        return super().forward(x) * self.factor


@pytest.mark.parametrize("settings", [{"target_modules": ["f"], "rank": 2}, {"finetune": "full"}], ids=str)
def test_what_a_forward_pass_notes_is_no_change(settings: dict[str, Any], tmp_path: Path) -> None:
    module = Counting()
    bare = copy.deepcopy(module)
    model = stir(fd.adapt(module, image_size=SIDE, **settings, **HALF))
    expected = model(images(8))
    fd.save_adapter(model, str(tmp_path / "adapter"))
    assert torch.equal(fd.load(str(tmp_path / "adapter"), backbone=bare)(images(8)), expected)
    module.factor = 2.0
    with pytest.raises(fd.UserError) as caught:
        fd.save_adapter(model, str(tmp_path / "changed"))
    assert str(caught.value) == (
        "save_adapter: factor was 1.0 and is 2.0, which an adapter does not hold; change the module before adapt, or "
        "change it back"
    )
    module.factor = 1.0
    fd.save_adapter(model, str(tmp_path / "changed"))
