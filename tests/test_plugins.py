"""Methods from outside the package: the examples of docs/extending.md, as a reader would use them."""

import builtins
import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fulllora_dist as fd
from fulllora_dist.config.load import load_config
from fulllora_dist.config.plugins import import_plugins
from fulllora_dist.core.errors import UserError
from fulllora_dist.methods import METHODS, register_method
from fulllora_dist.methods.base import MethodSettings, PerturbedStep
from fulllora_dist.methods.settings import METHOD_SETTINGS
from fulllora_dist.training.phases import build_phases
from tests.methods.test_methods import PlainEngine, start
from tests.tiny import batches, stir, tiny

DOC = Path(__file__).parents[1] / "docs" / "extending.md"
CONFIG = """
model: {backbone: vit_tiny_patch16_224.augreg_in21k_ft_in1k}
threat: {eps: 0.05}
method: {name: noise, radius: 0.5}
data: {train: shards}
run: {output_dir: out, seed: 3}
"""


def example(name: str) -> str:
    """The code block of the docs that begins with a comment naming the file."""
    found = re.search(rf"```python\n(# {re.escape(name)}\n.*?)```", DOC.read_text(), re.DOTALL)
    assert found is not None, name
    return found.group(1)


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    registries = METHODS, METHOD_SETTINGS
    known, modules, path = [dict(registry) for registry in registries], set(sys.modules), list(sys.path)
    yield
    for registry, before in zip(registries, known, strict=True):
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if "noise" in name:
            del sys.modules[name]


@pytest.mark.parametrize("plugin", ["noise_method", "noise_method.py"])
def test_a_method_from_outside_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: str) -> None:
    """By module in the working directory and by file: the config names it, and one step is what its code says."""
    (tmp_path / "noise_method.py").write_text(example("noise_method.py"))
    (tmp_path / "run.yaml").write_text(CONFIG + f"plugins: [{plugin}]\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="unknown method 'noise'"):
        load_config("run.yaml", ["plugins=[]"])
    config = load_config("run.yaml")
    assert load_config("run.yaml") == config  # a second time, as tests and notebooks do
    method = build_phases(config, steps_per_epoch=4).at(0).method
    (batch,) = batches(1, size=4)
    model, seen = start(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    metrics = method.step(PlainEngine(model), batch, 2)
    (x,) = seen
    assert 0.02 < float((x - batch.images).abs().max()) <= 0.025
    reference = start()
    assert float(metrics["loss"]) == pytest.approx(float(F.cross_entropy(reference(x), batch.labels).detach()))
    assert method.passes() == (1, 1)


def test_a_plugin_that_breaks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_noise.py").write_text("raise RuntimeError('two\\nlines')\n")
    (tmp_path / "run.yaml").write_text(CONFIG + "plugins: [broken_noise.py]\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"plugins: broken_noise.py cannot be imported \(RuntimeError: two lines"
    ) as caught:
        load_config("run.yaml")
    assert "\n" not in str(caught.value)


def test_a_file_is_a_module_of_its_name_and_comes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So an adapter can name it, and importing it by hand or by another path is the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "once_only.py").write_text("import builtins\nbuiltins.times = getattr(builtins, 'times', 0) + 1\n")
    import_plugins(["once_only.py", str(tmp_path / "once_only.py"), "once_only"])
    assert vars(builtins).pop("times") == 1
    assert sys.modules["once_only"].__name__ == "once_only"
    (tmp_path / "json.py").write_text("")
    with pytest.raises(UserError, match=r"json.py cannot be imported \(ImportError: another module has the name json"):
        import_plugins(["json.py"])


def test_an_installed_package_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real distribution on the path, as pip would leave it."""
    (tmp_path / "noise_method.py").write_text(example("noise_method.py"))
    info = tmp_path / "noise_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noise-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fulllora_dist.plugins]\nnoise = noise_method:Noise\n")
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_config(str(tmp_path / "run.yaml")).method.model_dump() == {"name": "noise", "radius": 0.5}


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method 'pgd' of .* is already fulllora_dist.methods.pgd's"):

        @register_method
        class Other(PerturbedStep):
            Settings = METHODS["pgd"].Settings

    with pytest.raises(ValueError, match="has no default name"):

        @register_method
        class Nameless(PerturbedStep):
            Settings = MethodSettings

    assert METHODS["pgd"].__module__ == "fulllora_dist.methods.pgd"


def test_dropping_tokens_is_n_fgsm_on_those_with_most_attention() -> None:
    """tools/experiments: with all tokens it is N-FGSM bit for bit, its warm-up included; with half of them the second
    block sees these alone."""
    import_plugins([str(DOC.parents[1] / "tools" / "experiments" / "cheaper_passes.py")])
    trained, seen = [], []
    for name, settings in (("n_fgsm", {}), *(("agat_n_fgsm", {"keep": keep, "at": (1,)}) for keep in (1.0, 0.5))):
        model = stir(tiny())
        method = fd.method(name, eps=0.05, noise=0, eps_warmup_steps=3, **settings)
        blocks: list[Any] = [model.backbone.get_submodule(f"blocks.{i}") for i in (0, 1)]
        blocks[0].register_forward_hook(lambda _, __, out: seen.append(out.detach()))
        blocks[1].norm1.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        engine = PlainEngine(model)
        for step, batch in enumerate(batches(2, size=4)):
            block = copy.deepcopy(blocks[1])  # of the weights that this step's passes see
            method.step(engine, batch, step)
        trained.append(model.trainable())
    assert all(map(torch.equal, trained[0].values(), trained[1].values()))
    whole, kept = seen[-2:]
    assert (whole.shape[1], kept.shape[1]) == (17, 9)
    with torch.no_grad():
        qkv = block.attn.qkv(block.norm1(whole)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mean = F.scaled_dot_product_attention(qkv[0], qkv[1], torch.eye(17).expand(4, 2, 17, 17)).mean(dim=(1, 2))
    for image, tokens, attention in zip(whole, kept, mean, strict=True):
        most = 1 + attention[1:].argsort(descending=True)[:8].sort().values
        assert torch.equal(tokens, image[torch.cat([torch.tensor([0]), most])])
