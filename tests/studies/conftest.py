"""A study of the real train.py and evaluate.py on tiny images, in forked processes."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.studies.plan import Run, Study
from fulllora_dist.studies.processes import Job
from fulllora_dist.studies.report import Report
from fulllora_dist.studies.runner import Options, Runner
from fulllora_dist.studies.verify import Call
from tests.ranks import RankServer
from tests.scripts import Launched
from tests.smallest import TINY_MODEL

CONFIG = (
    TINY_MODEL
    + """\
threat: {{eps: 8/255}}
method: n_fgsm
data: {{train: {data}/train, validation: {data}/val, augment: flip, num_workers: 0}}
optim: {{lr: 1.0e-3, batch_size: 8, epochs: 2}}
run: {{output_dir: unset, log_every: 1, checkpoint_every: 4}}
evaluation: {{gradient_masking_samples: 0, batch_size: 10}}
tracking: {{enabled: false}}
"""
)
STUDY = """
name: tiny
config: {folder}/config.yaml
choose: {{data: {folder}/held_out, attack: pgd2}}
seeds: [0, 1]
evaluations:
  - {{attacks: [clean, pgd3]}}
arms:
  fulllora: {{label: FullLoRA, tries: {{optim.lr: [1e-5, 3e-2]}}}}
  again: {{label: the same, like: fulllora}}
comparisons:
  - {{arm: again, against: fulllora, attack: pgd3, margin: 0.2,
     power: {{disagreement: 0.1, seed_sd: 0.0, image_correlation: 0.2, power: 0.5}}}}
output_dir: {folder}/runs
results_dir: {folder}/results
page: {folder}/page.md
"""


class Process:
    """A script of the rank server as a child process."""

    def __init__(self, launched: Launched):
        self._launched = launched

    @property
    def returncode(self) -> int | None:
        return self._launched.poll()

    def poll(self) -> int | None:
        return self._launched.poll()

    def send_signal(self, sig: int, /) -> None:
        self._launched.rank(0).send_signal(sig)

    def wait(self) -> int:
        return self._launched.wait().returncode


@dataclass
class Launcher:
    """Starts the steps of runs; the first training is killed after its first checkpoint, as for lack of memory.

    Attributes:
        steps: (run, step) in the order in which they were started.
    """

    server: RankServer
    kill_first: bool = False
    steps: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, run: Run, step: str, command: Sequence[str], ranks: int, environment: Mapping[str, str]) -> Job:
        launched = self.server.launch(*command, ranks=ranks, env={**environment, "PATH": "/usr/bin:/bin"})
        self.steps.append((run.name, step))
        if self.kill_first and len(self.steps) == 1:
            deadline = time.monotonic() + 60
            while not list(Path(run.output_dir, "checkpoints").glob("[0-9]*")):
                assert time.monotonic() < deadline, launched.stderr()
                time.sleep(0.01)
            launched.kill()
        log = Path(f"{run.output_dir}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        return Job(run, step, Process(launched), log)


@dataclass
class Tiny:
    """The study in a folder."""

    folder: Path
    launcher: Launcher
    said: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        return str(self.folder / "study.yaml")

    def study(self, text: str | None = None) -> Study:
        Path(self.path).write_text(STUDY.format(folder=self.folder) if text is None else text)
        return Study(self.path)

    def run(self, study: Study) -> int:
        runner = Runner(study, Options(), self.said.append, lambda: Report(study).write(), self.launcher)  # type: ignore[arg-type, return-value]
        runner.check()
        return runner.run()


def call_on(server: RankServer) -> Call:
    """evaluate.py for `verify`, in a forked process."""

    def call(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        return server.launch(*command, env=environment).wait()

    return call


def write_images(folder: Path, per_class: int, seed: int) -> None:
    """Each class with a colour of its own under noise, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    for label in range(3):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 200, (16, 16, 3), dtype=np.uint8)
            pixels[..., label] += 55
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i}.png")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, rank_server: RankServer) -> tuple[Tiny, int]:
    """The study after its only call, and its exit code."""
    folder = tmp_path_factory.mktemp("study")
    for name, per_class in (("train", 16), ("held_out", 8), ("val", 10)):
        write_images(folder / "images" / name, per_class, seed=per_class)
        make_shards(folder / "images" / name, folder / name, workers=1, progress=False)
    (folder / "config.yaml").write_text(CONFIG.format(data=folder))
    (folder / "page.md").write_text("# By hand\n\nWords.\n")
    tiny = Tiny(folder, Launcher(rank_server, kill_first=True))
    return tiny, tiny.run(tiny.study())
