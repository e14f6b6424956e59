"""tools/where_robustness_sits.py: two ranks equal one, on after a kill, and what it refuses."""

import importlib.util
import json
import os
import signal
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from cases import ARCHITECTURE, SIDE
from safetensors.torch import save_file
from torch import Tensor

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.evaluation.attacks import EvalAttack, Outcome
from tests.ranks import RankError, RankServer
from tests.tiny import stir

TOOL = Path(__file__).parents[2] / "tools" / "where_robustness_sits.py"
BACKBONE = "vit_tiny_patch16_224.augreg_in21k"
BATCHES, VARIANTS = 5, 1 + 1 + 7 + 3
EPS = 1 / 255


@pytest.fixture(scope="module")
def experiment(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.yaml, and adapters of two ways to finetune."""
    folder = tmp_path_factory.mktemp("experiment")
    model = {"num_classes": 3, "image_size": SIDE, "model_kwargs": ARCHITECTURE, "mean": [0.5] * 3, "std": [0.5] * 3}
    bare = fd.create_model(BACKBONE, pretrained=False, finetune="full", **model)
    save_file(bare.backbone.state_dict(), folder / "backbone.safetensors")
    model["checkpoint_path"] = str(folder / "backbone.safetensors")
    for finetune in ("fulllora", "full", "head"):
        settings = {"rank": 2} if finetune == "fulllora" else {}
        adapted = stir(fd.create_model(BACKBONE, finetune=finetune, **model, **settings))
        fd.save_adapter(adapted, str(folder / finetune))
    config = {
        "model": {"backbone": BACKBONE, **model},
        "threat": {"eps": EPS},
        "method": "pgd",
        "data": {"train": "not-there", "validation": shards, "crop_pct": 1.0, "num_workers": 0},
        "run": {"output_dir": str(folder / "run"), "seed": 7},
        "evaluation": {"attacks": ["clean", "autoattack"], "eps": ["8/255"], "batch_size": 5},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("where_robustness_sits", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _measure(
    comm: Comm, experiment: Path, output: Path, more: list[str], log: Path | None = None, kill: int = 0
) -> str | None:
    """The tool on this rank: what it refuses. Pieces are written down; at the n-th one rank 1 ends."""
    right, count = EvalAttack.outcome, 0

    def logged(attack: EvalAttack, *args: object, **kwargs: Tensor) -> Outcome:
        nonlocal count
        count += 1
        if comm.rank == 1 and count == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        result = right(attack, *args, **kwargs)  # type: ignore[arg-type]
        if log is not None:
            with open(log, "a") as file:
                file.write(f"{comm.rank} {attack.name}\n")
        return result

    EvalAttack.outcome = logged  # type: ignore[method-assign, assignment]
    adapter = ["--adapter", str(experiment / "fulllora")] if "--adapter" not in more else []
    arguments = ["--config", str(experiment / "config.yaml"), *adapter, "--output", str(output), *more]
    try:
        _tool().main(arguments)
    except UserError as error:
        return str(error)
    return None


def test_two_ranks_equal_one_also_after_a_kill(server: RankServer, experiment: Path, tmp_path: Path) -> None:
    files = [tmp_path / name / "where.json" for name in ("one", "two", "killed")]
    logs = [tmp_path / name for name in ("log1", "log2", "log3", "log4")]
    more = ["--attack", "pgd2"]
    server.run(1, _measure, experiment, files[0], more, logs[0])
    server.run(2, _measure, experiment, files[1], more, logs[1])
    with pytest.raises(RankError):
        server.run(2, _measure, experiment, files[2], more, logs[2], 20)
    assert not files[2].exists()
    server.run(2, _measure, experiment, files[2], more, logs[3])

    one, two, killed = (json.loads(file.read_text()) for file in files)
    assert one == two == killed
    assert all(file.with_suffix(".png").stat().st_size > 10_000 for file in files)
    assert sorted(path.name for path in files[2].parent.iterdir()) == ["where.json", "where.png"]
    assert (one["n"], one["eps"], list(one["intact"]), len(one["off"])) == (24, EPS, ["clean", "pgd2"], VARIANTS - 1)
    right = [[group["attacks"][name]["correct"] for group in one["off"]] for name in ("clean", "pgd2")]
    assert len({tuple(correct) for correct in right[0]}) > 4, "variants differ, or equality shows little"
    assert right[0] != right[1]

    done = [log.read_text().splitlines() for log in logs]
    assert [len(lines) for lines in done[:2]] == [2 * BATCHES * VARIANTS] * 2
    assert {line.split()[0] for line in done[1]} == {"0", "1"}
    assert len(done[2]) >= 20
    assert 0 <= len(done[2]) + len(done[3]) - 2 * BATCHES * VARIANTS <= 2, "all that was done counts"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--adapter", "{folder}/full"],
            "adapter: finetune: full has no branches; give an adapter of ",
        ),
        (
            ["--adapter", "{folder}/head"],
            "adapter: finetune: head has no branches; give an adapter of ",
        ),
        (["--adapter", "{folder}/nowhere"], "has no adapter.json; give the folder adapter/ of a run"),
        (["--by", "layer"], "--by: 'layer' is unknown; known: component, block, branch"),
        (
            ["--attack", "clean"],
            "--attack: clean; clean is always measured, name one that changes images",
        ),
        (["--attack", "pdg10"], "unknown attack 'pdg10'"),
        (["--num-samples", "0"], "evaluation.num_samples: "),
        (["data.validation=null"], "data.validation is not set"),
    ],
)
def test_refused_in_one_line(
    server: RankServer, experiment: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    more = [word.format(folder=experiment) for word in more]
    (found,) = server.run(1, _measure, experiment, tmp_path / "where.json", more)
    assert message in found
    assert "\n" not in found
    assert not list(tmp_path.iterdir())
