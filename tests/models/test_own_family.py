"""The family that docs/extending.md shows, from a module outside of the package."""

import dataclasses
import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from fulllora_dist.models.families import FAMILIES, Family, register_family
from tests.ranks import RankServer
from tests.tiny import branches, images, patches, roughen, stir

ROOT = Path(__file__).parents[2]
SETTINGS = {"pretrained": False, "num_classes": 4, "image_size": 16, "rank": 3, "head": "adapted"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The module in the page, imported from a folder of its own."""
    folder = tmp_path_factory.mktemp("outside")
    example = re.search(r"```python\n(# my_family.py\n.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    assert example is not None
    (folder / "my_family.py").write_text(example[1])
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("my_family")
    finally:
        sys.path.remove(str(folder))
        FAMILIES.pop("toy")


def formula(layer: nn.Module, x: Tensor, scale: float) -> Tensor:
    """W x + b + (alpha / r) B A LN(x) of an adapted layer, from its tensors."""

    def low_rank(branch: nn.Module, x: Tensor, eps: float) -> Tensor:
        norm = F.layer_norm(x, x.shape[-1:], branch.norm.weight, branch.norm.bias, eps)
        return scale * (norm @ branch.A.T @ branch.B.T)

    if isinstance(layer, nn.Conv2d):
        tokens = low_rank(layer.lnlora, patches(x, layer), 1e-2)
        return F.conv2d(x, layer.weight, layer.bias, layer.stride) + tokens.permute(0, 3, 1, 2)
    parts = [getattr(layer.lnlora, n) for n in "qkv" if hasattr(layer.lnlora, n)] or [layer.lnlora]
    return x @ layer.weight.T + layer.bias + torch.cat([low_rank(part, x, 1e-6) for part in parts], dim=-1)


def test_each_branch_acts(own: ModuleType) -> None:
    model = stir(roughen(fd.create_model("toy_transformer", alpha=2.0, **SETTINGS).double()))
    assert type(model.backbone) is own.ToyTransformer
    tensors, x = model.trainable(), images(dtype=torch.float64)
    names = branches(model)
    assert len(names) == 1 + 2 * 6 + 1
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {name.partition(".lnlora")[0] for name in names}
    for layer in layers:
        model.backbone.get_submodule(layer).register_forward_hook(
            lambda _, args, y, layer=layer: seen.update({layer: (args[0], y)})
        )
    full = {name: tensors[f"{name}.B"].detach().clone() for name in names}
    with torch.no_grad():
        for name in names:
            tensors[f"{name}.B"].zero_()
        still = model(x)
    for name in names:
        tensors[f"{name}.B"].data.copy_(full[name])
        model.zero_grad()
        logits = model(x)
        F.cross_entropy(logits, torch.arange(4)).backward()
        assert (logits - still).abs().max() > 1e-9, name
        for layer in layers:
            x_layer, y_layer = seen[layer]
            expected = formula(model.backbone.get_submodule(layer), x_layer, 2.0 / 3)
            torch.testing.assert_close(y_layer, expected, rtol=0, atol=1e-12, msg=f"{name}, {layer}")
        for tensor in ("A", "B", "norm.weight", "norm.bias"):
            if f"{name}.{tensor}" not in [n for n in tensors if n.endswith("k.norm.bias")]:
                assert tensors[f"{name}.{tensor}"].grad.norm() > 1e-10, f"{name}.{tensor}"
        tensors[f"{name}.B"].data.zero_()


def test_it_computes_in_bf16_and_refuses_checkpointing(own: ModuleType) -> None:
    exact, rounded = (
        stir(fd.create_model("toy_transformer", precision=precision, **SETTINGS)) for precision in ("fp32", "bf16")
    )
    assert rounded.backbone.layers[0].up.weight.dtype == torch.bfloat16
    assert rounded.backbone.stem.weight.dtype == torch.float32
    torch.testing.assert_close(rounded(images()), exact(images()), rtol=0.05, atol=0.05)
    assert not torch.equal(rounded(images()), exact(images()))
    with pytest.raises(UserError, match="toy_transformer of the family toy does not support it; set it to off"):
        exact.set_activation_checkpointing(True)


LOAD = """
import sys
import fulllora_dist as fd
from fulllora_dist.config.plugins import import_plugins
if sys.argv[2] == "import":
    import my_family
elif sys.argv[2] == "file":
    import_plugins([sys.argv[3]])
try:
    model = fd.load(sys.argv[1])
    fd.save_adapter(model, sys.argv[1] + "/again")
    print(model.info.name)
except fd.UserError as error:
    print(error)
"""


@pytest.mark.parametrize("plugin", ["import", "file", "neither"])
def test_its_adapter_loads_where_its_module_is_imported(
    rank_server: RankServer, own: ModuleType, plugin: str, tmp_path: Path
) -> None:
    model = stir(fd.create_model("toy_transformer", **SETTINGS))
    fd.save_adapter(model, str(tmp_path))
    again = fd.load(str(tmp_path))
    assert torch.equal(again(images()), model(images()))
    module = Path(own.__file__ or "")
    paths = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    paths += f"sys.path.insert(0, {str(module.parent)!r})\n" if plugin == "import" else ""
    (tmp_path / "load.py").write_text(paths + LOAD)
    done = rank_server.launch(tmp_path / "load.py", tmp_path, plugin, module, cwd=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip().splitlines()[-1]
    if plugin == "neither":
        assert said == (
            f"adapter: {tmp_path} is of the family toy, which is not registered; import my_family, or list it or its "
            ".py file under plugins:"
        )
    else:
        assert said == "toy_transformer"
        assert (tmp_path / "again" / "adapter.json").read_text() == (tmp_path / "adapter.json").read_text()


KNOWN = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "fulllora_dist"]:
    del sys.modules[name]
sys.path.insert(0, sys.argv[1])
import fulllora_dist
from fulllora_dist.models.families import FAMILIES
print(fulllora_dist.__file__, *FAMILIES)
"""


def test_a_file_beside_the_others_is_found(rank_server: RankServer, own: ModuleType, tmp_path: Path) -> None:
    package = ROOT / "fulllora_dist"
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(own.__file__ or "", tmp_path / package.name / "models" / "families" / "toy.py")
    (tmp_path / "known.py").write_text(KNOWN)
    done = rank_server.launch(tmp_path / "known.py", tmp_path, cwd=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    imported, *names = done.stdout.split()
    assert imported == str(tmp_path / package.name / "__init__.py")
    assert sorted(names) == sorted(FAMILIES)  # here the fixture has registered it


@pytest.mark.filterwarnings("ignore:Overwriting toy_transformer in registry")
def test_a_module_loaded_again_replaces_its_family(own: ModuleType) -> None:
    before, count = FAMILIES["toy"], len(FAMILIES)
    importlib.reload(own)
    assert (len(FAMILIES), FAMILIES["toy"] is before, FAMILIES["toy"] is own.TOY) == (count, False, True)
    assert fd.create_model("toy_transformer", **SETTINGS).family is own.TOY
    with pytest.raises(UserError, match=r"family toy: another family has this name; .* or set plugin=__name__"):
        register_family(dataclasses.replace(own.TOY, plugin="elsewhere"))


class Reads(nn.Module):
    """Its `up` is never called: the weight is read."""

    def __init__(self, num_classes: int = 4, img_size: int = 16, extra: bool = False):
        super().__init__()
        self.num_classes = num_classes
        self.up = nn.Linear(3, 8)
        self.head = nn.Linear(8, num_classes)
        if extra:
            self.extra = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x.flatten(2).mean(dim=2), self.up.weight, self.up.bias))


@register_model
def reads_weights(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **settings):
    return Reads(**settings)


def test_what_would_silently_not_act_is_refused() -> None:
    register_family(Family(name="reads", models=(Reads,), parts={Reads: {"up": "fc1", "head": "head"}}, blocks=()))
    try:
        with pytest.raises(UserError, match=r"reads_weights never calls up \(1 such layers\)"):
            fd.create_model("reads_weights", **SETTINGS)
        with pytest.raises(
            UserError, match="reads_weights has the layer extra, which is not known to the family reads"
        ):
            fd.create_model("reads_weights", model_kwargs={"extra": True}, **SETTINGS)
        with pytest.raises(UserError, match="family other: Reads belongs to the family reads"):
            register_family(Family(name="other", models=(Reads,), parts={}, blocks=()))
        with pytest.raises(UserError, match="family ViT: another family has this name"):
            register_family(Family(name="ViT", models=(), parts={}, blocks=()))
    finally:
        FAMILIES.pop("reads")
    with pytest.raises(
        UserError, match=r"family wrong: Reads.up has the unknown component 'fc7'; known: patch_embed, .*None"
    ):
        Family(name="wrong", models=(Reads,), parts={Reads: {"up": "fc7"}}, blocks=())
    with pytest.raises(UserError, match="reads_weights has the model class Reads, where no branch is known to act"):
        fd.create_model("reads_weights", **SETTINGS)
