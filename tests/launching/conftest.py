"""A tiny run to launch, whose pace the tests command."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.launching.jobs import run_jobs
from tests.ranks import RankServer
from tests.smallest import TINY_MODEL

ROOT = Path(__file__).parents[2]
LAUNCH = str(ROOT / "jobs" / "launch.py")
STEPS = 24

CONFIG = (
    TINY_MODEL
    + """\
threat: {{eps: 8/255}}
method: {{name: paced, steps: 2}}
plugins: [paced.py]
data: {{train: {folder}/shards, augment: flip, num_workers: 1}}
optim: {{lr: 1.0e-3, batch_size: 8, epochs: 4, ema_decay: 0.9}}
run: {{output_dir: unset, checkpoint_every: 100, log_every: 1}}
evaluation: {{attacks: [clean], num_samples: 12}}
tracking: {{enabled: false}}
"""
)


class Site:
    """A folder to launch from.

    Attributes:
        folder: with config.yaml.
        environment: of the launches and their jobs.
    """

    def __init__(self, folder: Path, server: RankServer):
        self.folder, self.server = folder, server
        self.environment = {
            "ORDERS": str(folder / "orders.json"),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(ROOT),
        }

    def order(self, **orders: Any) -> None:
        """What the steps do from now on."""
        temporary = self.folder / "orders.tmp"
        temporary.write_text(json.dumps(orders))
        os.replace(temporary, self.folder / "orders.json")

    def launch(
        self,
        *arguments: str,
        code: int | None = 0,
        timeout: float = 240,
        cwd: Path | None = None,
        imports_done: bool = True,
    ) -> str:
        """launch.py's stdout and stderr.

        Args:
            imports_done: in a forked process; False is a new interpreter.
        """
        done: subprocess.CompletedProcess
        cwd, environment = cwd or self.folder, os.environ | self.environment
        if imports_done:
            done = self.server.launch(LAUNCH, *arguments, cwd=cwd, env=environment, timeout=timeout).wait()
        else:
            done = subprocess.run(
                [sys.executable, LAUNCH, *arguments],
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,  # the debug executor opens a debugger on what fails
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        said = done.stdout + done.stderr
        assert code is None or done.returncode == code, said[-3000:]
        return said

    def events(self, run: str, launch: str = "001") -> list[str]:
        """The events of a launch's restarts, in order."""
        path = self.folder / run / "launches" / launch / "restarts.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["event"] for line in lines]

    def batches(self, run: str) -> int:
        """How many batches were trained on."""
        path = self.folder / run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def adapter(self, run: str) -> dict[str, Tensor]:
        return load_file(self.folder / run / "adapter" / "adapter.safetensors")


@pytest.fixture(scope="session")
def site(rank_server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """With shards of 48 coloured noise images."""
    folder = tmp_path_factory.mktemp("site")
    rng = np.random.default_rng(0)
    for label in range(3):
        (folder / "pictures" / f"class{label}").mkdir(parents=True)
        for i in range(16):
            pixels = rng.integers(0, 128, (16, 16, 3), dtype=np.uint8)
            pixels[..., label] += 100
            Image.fromarray(pixels).save(folder / "pictures" / f"class{label}" / f"{i}.png")
    make_shards(folder / "pictures", folder / "shards", workers=1, progress=False)
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    shutil.copy(Path(__file__).with_name("paced.py"), folder)
    yield Site(folder, rank_server)
    for launches in folder.glob("*/launches"):  # what a failed test left running in the background
        for job in run_jobs(str(launches.parent)):
            if job.alive:
                job.cancel()
