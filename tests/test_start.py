"""What a start imports: the options of a command wait for no torch, a list of adapters for nothing but MLflow."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torchvision", "timm", "deepspeed", "mlflow", "scipy", "matplotlib")
COMMANDS = [
    ("fulllora_dist/train.py", "--help"),
    ("fulllora_dist/train.py", "--help-settings"),
    ("fulllora_dist/evaluate.py", "--help"),
    ("jobs/launch.py", "--help"),
    *((f"tools/{name}.py", "--help") for name in ("make_shards", "index_shards", "adapters", "compare_evaluations")),
    *((f"tools/{name}.py", "--help") for name in ("where_robustness_sits", "sync_tracking", "backbones")),
    ("tools/benchmark.py", "--help"),
    ("tools/demo.py", "--help"),
    ("fulllora_dist/commands/cli.py", "--help"),
    ("fulllora_dist/commands/cli.py", "study", "--help"),
    ("fulllora_dist/commands/cli.py", "train", "--help"),
]
MEASURE = """
import contextlib, os, runpy, sys
os._exit = sys.exit
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
with contextlib.suppress(SystemExit):
    runpy.run_path(sys.argv[0], run_name="__main__")
print("imported", *sorted(sys.modules))
"""


def _imported(*command: str) -> tuple[set[str], str]:
    """The modules that a command has imported at its end, and what it printed before."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], cwd=ROOT, capture_output=True, text=True)
    printed, _, modules = done.stdout.rpartition("imported ")
    assert modules, done.stderr
    return set(modules.split()), printed


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    modules, printed = _imported(*command)
    assert "usage: " in printed or "optim.lr (default" in printed
    assert not modules.intersection(HEAVY)


def test_help_has_the_options_and_help_settings_the_settings() -> None:
    settings = "optim.lr (default"
    assert settings not in _imported("fulllora_dist/evaluate.py", "--help")[1]
    assert settings in _imported("fulllora_dist/evaluate.py", "--help-settings")[1]


def test_a_list_of_adapters_needs_no_torch(tmp_path: Path) -> None:
    import mlflow

    store = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(store, store)
    client.create_registered_model("mine", {"kind": "fulllora_dist adapter"})
    modules, printed = _imported("tools/adapters.py", "list", "--uri", store)
    assert "mine" in printed
    assert not modules.intersection({"torch", "timm", "deepspeed"})
