"""What a newcomer meets: the wheel, the README's lines, a light import."""

import ast
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fulllora_dist as fd
from fulllora_dist.commands.cli import COMMANDS
from fulllora_dist.data.shards.make import make_shards

ROOT = Path(__file__).parents[1]


def test_the_wheel_builds_and_installs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fulllora_dist/")}
    tracked = subprocess.run(
        ["git", "ls-files", "fulllora_dist"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert packaged == set(tracked)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(install, check=True, capture_output=True)
    code = "import fulllora_dist; print(fulllora_dist.__file__); fulllora_dist.create_model"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(tmp_path / "site" / "fulllora_dist" / "__init__.py")
    for arguments, code, said in (
        (["--help"], 0, "  study "),
        (["evaluate", "--help"], 0, "usage: fulllora evaluate "),
        (["compare", "a.json", "b.json"], 2, "error: a.json: cannot be read"),
        (["launch", "--config", "c.yaml", "--profile", "mine"], 2, "mine.yaml does not exist; give the path of a YAML"),
        (["evalaute"], 2, "error: fulllora evalaute: unknown command; did you mean evaluate?\n"),
    ):
        script = [sys.executable, str(tmp_path / "site" / "bin" / "fulllora"), *arguments]
        done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done


def test_no_message_sends_who_has_the_wheel_to_a_script_of_the_repository() -> None:
    """But for files that only such a script writes. What a command's module opens with is its --help."""
    commands = {module.partition(":")[0] for module, _ in COMMANDS.values()}
    for path in (ROOT / "fulllora_dist").rglob("*.py"):
        tree = ast.parse(path.read_text())
        help_text = path.parent.name == "commands" and path.stem in commands
        blocks = (ast.FunctionDef, ast.ClassDef) if help_text else (ast.Module, ast.FunctionDef, ast.ClassDef)
        documented = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, blocks) and ast.get_docstring(n)}
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in documented]
        named = {name for text in texts for name in re.findall(r"\b(?:tools|jobs)/\w+\.py", str(text))}
        assert named <= {"tools/benchmark.py", "tools/simulate.py"}, path


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, fulllora_dist; print([m for m in ('torch', 'timm', 'deepspeed', 'mlflow') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_the_readme_s_python_lines_run(tmp_path: Path, monkeypatch) -> None:
    """As printed, but for random weights of a smaller model and our own shards."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(2):
        (tmp_path / "pictures" / str(label)).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / str(label) / f"{i}.png")
    make_shards(tmp_path / "pictures", tmp_path / "shards" / "val", workers=1, progress=False)
    block, loop = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for printed, here in (
        ('"vit_base_patch16_224.augreg2_in21k_ft_in1k"', '"vit_tiny_patch16_224", pretrained=False, num_classes=2'),
        ("num_samples=200", "num_samples=4"),
        ("trainable_fraction=0.05", "trainable_fraction=0.05, image_size=32"),
    ):
        assert printed in block
        block = block.replace(printed, here)
    monkeypatch.chdir(tmp_path)
    names = {"x": torch.rand(2, 3, 32, 32), "y": torch.tensor([0, 1])}
    exec(block, names)
    assert (names["x_adv"] - names["x"]).abs().max() <= 4 / 255 + 1e-7
    assert isinstance(names["model"], fd.AdaptedModel)
    names["optimizer"] = torch.optim.AdamW(p for p in names["model"].parameters() if p.requires_grad)
    names["loader"] = [(names["x"], names["y"])]
    exec(loop, names)
    assert names["metrics"]["loss"].isfinite()


def test_deepspeed_s_launcher_takes_the_printed_commands() -> None:
    """It reads options that stand behind the script too, where they are beginnings of its own (`--num-samples`)."""
    from deepspeed.launcher.runner import parse_args

    commands = []
    files = itertools.chain.from_iterable(ROOT.glob(glob) for glob in ("*.md", "docs/*.md", "*/*.py", "configs/*.yaml"))
    for file in files:
        lines = iter(file.read_text().splitlines())
        for line in lines:
            line = line.lstrip("# ")
            if line.startswith("deepspeed "):
                while line.rstrip().endswith("\\"):
                    line = line.rstrip()[:-1] + next(lines)
                words = shlex.split(line.replace("--num_gpus N", "--num_gpus 2"), comments=True)
                commands.append((file.name, words[1:]))
    assert len(commands) > 10
    for name, command in commands:
        parsed = parse_args(command)
        assert parsed.user_script.endswith(".py"), (name, command)


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fd.__version__
    assert f"\nversion: {fd.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_lock_names_what_the_project_needs() -> None:
    """`make lock` was run after the last change of the dependencies. Addresses would bind it to one index."""
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    locked = {
        canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE)
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["demo"], *extras["docs"], *extras["s3"], *extras["test"]]:
        requirement = Requirement(line)
        if (name := canonicalize_name(requirement.name)) != project["name"]:
            assert requirement.specifier.contains(locked[name], prereleases=True), line
