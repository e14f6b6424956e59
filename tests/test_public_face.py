"""The public names: listed, typed, and documented with an example that fits their signature; the API pages of them."""

import ast
import inspect
import re
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fulllora_dist as fd
from tests.tiny import CLASSES, SIDE, architecture, images, tiny
from tools.api_pages import build

PUBLIC = {name: getattr(fd, name) for name in fd.__all__}


def functions(name: str) -> Iterator[Any]:
    """A public function, or the constructor and the public functions that a public class defines."""
    thing = PUBLIC[name]
    if not inspect.isclass(thing):
        yield thing
        return
    if thing.__init__ is not Exception.__init__ and "__init__" in vars(thing):
        yield thing.__init__
    for key, member in vars(thing).items():
        if not key.startswith("_"):
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(member):
                yield member


def section(docstring: str | None, title: str) -> str:
    """What stands under `title:` in a docstring; empty where it has none."""
    found = re.search(rf"^{title}:\n((?:[ ]+.*(?:\n|$)|\n)+)", inspect.cleandoc(docstring or ""), re.MULTILINE)
    return textwrap.dedent(found[1]).strip() if found else ""


def examples(name: str) -> list[str]:
    docstrings = [PUBLIC[name].__doc__, *(function.__doc__ for function in functions(name))]
    return [example for docstring in docstrings if (example := section(docstring, "Example"))]


def test_dir_and_type_checkers_know_every_name() -> None:
    assert set(fd.__all__) <= set(dir(fd))
    tree = ast.parse(Path(fd.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(typed) == sorted(fd.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_typed_and_documented(name: str) -> None:
    assert examples(name)
    assert PUBLIC[name].__doc__ not in (None, Exception.__doc__, ValueError.__doc__)
    for function in functions(name):
        signature = inspect.signature(function)
        given = [p.annotation for key, p in signature.parameters.items() if key not in ("self", "cls")]
        assert inspect.Parameter.empty not in given, function
        assert function.__name__ == "__init__" or signature.return_annotation is not inspect.Signature.empty, function
        assert function.__name__ in ("__init__", "forward") or function.__doc__, function
        docstring = PUBLIC[name].__doc__ if function.__name__ == "__init__" else function.__doc__
        described = re.findall(r"^(\w[\w, ]*):", section(docstring, "Args"), re.MULTILINE)
        assert {key for keys in described for key in keys.split(", ")} <= set(signature.parameters), function


@pytest.mark.parametrize("name", PUBLIC)
def test_its_example_fits_the_signatures(name: str) -> None:
    for example in examples(name):
        assert inspect.isclass(PUBLIC[name]) or f"fd.{name}(" in example
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fd":
                assert node.attr in PUBLIC
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("fd."):
                called = PUBLIC[node.func.attr] if isinstance(node.func.value, ast.Name) else fd.Batch.of  # type: ignore[attr-defined]
                inspect.signature(called).bind(*node.args, **{str(key.arg): key.value for key in node.keywords})


def test_the_pages_have_every_name_and_load_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(tmp_path)
    page = (tmp_path / "fulllora_dist.html").read_text()
    sections = dict(re.findall(r'<section id="([\w.]+)">(.*?)</section>', page, re.DOTALL))
    assert sections.keys() == PUBLIC.keys()
    assert not [name for name, text in sections.items() if '<div class="pdoc-code codehilite">' not in text]
    assert 'href="#create_model"' in sections["adapt"]
    assert 'id="AdapterSettings.trainable_fraction"' in (tmp_path / "fulllora_dist/models/settings.html").read_text()
    for file in tmp_path.rglob("*.html"):
        assert set(re.findall(r'(?:src|href)="(https?://[^"]*)', file.read_text())) <= {"https://pdoc.dev"}


def test_paths_are_taken_wherever_strings_are(tmp_path: Path) -> None:
    save_file(tiny(finetune="head").backbone.state_dict(), tmp_path / "first.safetensors")
    settings = {"num_classes": CLASSES, "image_size": SIDE, "model_kwargs": architecture("vit"), "rank": 2}
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = fd.create_model(name, checkpoint_path=tmp_path / "first.safetensors", **settings)
    fd.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "first.safetensors").rename(tmp_path / "moved.safetensors")
    moved = {"checkpoint_path": tmp_path / "moved.safetensors"}
    several = fd.MultiAdapter({"one": tmp_path / "adapter"}, **moved)
    several.add("two", tmp_path / "adapter")
    with torch.no_grad():
        expected = model(images())
        assert torch.equal(fd.load(tmp_path / "adapter", **moved)(images()), expected)
        assert torch.equal(several(images(), "two"), expected)
