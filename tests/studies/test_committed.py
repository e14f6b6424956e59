"""The committed results of studies: their tables are what they say, and rows evaluated again get the same verdicts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fulllora_dist.commands import study
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.studies.plan import Study
from fulllora_dist.studies.results import read_result
from fulllora_dist.studies.verify import verify
from tests.ranks import RankServer
from tests.studies.conftest import Launcher, Tiny, call_on

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "results"
STUDIES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES)
def test_the_page_is_made_from_the_results(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert study.main(["report", path, "--check"]) == 0, f"run fulllora study report {path}"


def rows() -> list[str]:
    """One of each of three arms, whose adapters are there."""
    arms: dict[tuple[str, str], str] = {}
    for path in sorted(RESULTS.glob("*.json")):
        found = read_result(path)
        if found["adapter_kept"]:
            arms.setdefault((found["study"], found["arm"]), path.stem)
    return list(arms.values())[:3]


@pytest.mark.long
def test_rows_get_their_verdicts_again(rank_server: RankServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real images with the real ViT-Ti/16."""
    names = rows()
    if not names or not DATA.is_dir():
        pytest.skip("no committed results with adapters" if DATA.is_dir() else f"no {DATA}")
    monkeypatch.chdir(ROOT)
    for name in names:
        evaluations = verify(name, "results", call_on(rank_server))
        assert evaluations
        for found in evaluations:
            assert found.n >= 50
            assert found.passed, found


@pytest.mark.long
def test_a_study_of_real_images(tmp_path: Path, rank_server: RankServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A try and a run in forked processes; then by the command itself nothing is left, and a row is evaluated again."""
    if not DATA.is_dir():
        pytest.skip(f"no {DATA}")
    monkeypatch.chdir(tmp_path)
    archive, held_out = DATA / "imagenette224-train.tar", tmp_path / "held_out"
    make_shards(
        archive, tmp_path / "train", limit=100, holdout=2, holdout_destination=held_out, workers=1, progress=False
    )
    make_shards(DATA / "imagenette224-val1000.tar", tmp_path / "val", limit=50, workers=1, progress=False)
    overrides = f"model.checkpoint_path={DATA}/vit_tiny_patch16_224.safetensors, method=n_fgsm, optim.epochs=2"
    (tmp_path / "study.yaml").write_text(
        f"""
name: real
config: {ROOT}/configs/imagenette_vit_tiny.yaml
overrides: [{overrides}, optim.batch_size=40, run.log_every=1, evaluation.gradient_masking_samples=0,
  data.train=train, data.validation=val, tracking=none]
choose: {{data: held_out, attack: pgd1}}
seeds: [0]
evaluations: [{{attacks: [clean, pgd3]}}]
arms: {{fulllora: {{label: FullLoRA}}}}
output_dir: runs
page: page.md
"""
    )
    tiny = Tiny(tmp_path, Launcher(rank_server))
    assert tiny.run(Study("study.yaml")) == 0, tiny.said
    command = [sys.executable, "-m", "fulllora_dist.commands.cli", "study"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "study.yaml"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "study.yaml: nothing left\n")
    assert "| FullLoRA | 4.68%, rank 5 |" in Path("page.md").read_text()
    done = subprocess.run([*command, "verify", "real-fulllora-seed0"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("real-fulllora-seed0: validation: pgd3: 50 images, as committed\n")
