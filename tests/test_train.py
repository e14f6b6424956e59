"""train.py as users start it: under the deepspeed launcher, killed, interrupted, resumed, and as one plain process.

`start` is the real launcher; `launch` runs the same script on forked ranks, without the imports' half a minute.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file

from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.distributed.comm import free_port, local_launcher
from tests.ranks import RankServer
from tests.smallest import TINY_MODEL

ROOT = Path(__file__).parents[1]
TRAIN = str(ROOT / "fulllora_dist" / "train.py")
LIMIT = 240

CONFIG = (
    TINY_MODEL
    + """\
threat: {{eps: 8/255, eps_warmup_ratio: 0.1}}
method: {{name: free, replays: 2}}
data: {{train: {data}, validation: {data}, augment: flip, num_workers: 1}}
optim: {{lr: 1.0e-3, batch_size: 8, epochs: 60, ema_decay: 0.9}}
run: {{output_dir: unset, checkpoint_every: 20, log_every: 5}}
evaluation: {{attacks: [clean, pgd3], num_samples: 12}}
tracking: {{uri: "sqlite:///{folder}/mlflow.db"}}
"""
)
STEPS = 60 * 6 // 2  # 48 images in batches of 8, two updates a batch


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config file over shards of 48 coloured noise images."""
    folder = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    for label in range(3):
        (folder / "pictures" / f"class{label}").mkdir(parents=True)
        for i in range(16):
            pixels = rng.integers(0, 128, (16, 16, 3), dtype=np.uint8)
            pixels[..., label] += 100
            Image.fromarray(pixels).save(folder / "pictures" / f"class{label}" / f"{i}.png")
    make_shards(folder / "pictures", folder / "shards", workers=1, progress=False)
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(data=folder / "shards", folder=folder))
    return path


def start(config: Path, *settings: str, ranks: int = 2) -> subprocess.Popen:
    return subprocess.Popen(
        [*local_launcher(ranks), TRAIN, "--config", str(config), *settings],
        cwd=config.parent,  # the repository is not the working directory
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen, code: int | None = 0) -> str:
    output, _ = process.communicate(timeout=LIMIT)
    if code is not None:
        assert process.returncode == code, output[-3000:]
    return output


def launch(server: RankServer, config: Path, *settings: str, ranks: int = 1, code: int = 0) -> str:
    done = server.launch(TRAIN, "--config", config, *settings, ranks=ranks, cwd=config.parent).wait()
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def wait_for_state(output: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if any(int(p.name) >= step for p in (output / "checkpoints").glob("[0-9]*")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of batch {step} in {output}")


def rank_process(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    children = psutil.Process(launcher.pid).children(recursive=True)
    return next(c for c in children if f"--local_rank={rank}" in c.cmdline() and TRAIN in c.cmdline())


@pytest.mark.long
def test_a_killed_and_interrupted_run_ends_like_the_uninterrupted_one(rank_server: RankServer, config: Path) -> None:
    folder = config.parent
    whole = launch(rank_server, config, f"run.output_dir={folder}/whole", ranks=2)
    assert "Traceback" not in whole
    assert "clean" in whole, "the table of the final evaluation"

    output = folder / "broken"
    launched = start(config, f"run.output_dir={output}")
    wait_for_state(output, 40)
    rank_process(launched, 1).send_signal(signal.SIGKILL)
    end(launched, code=None)
    assert launched.returncode != 0
    assert not (output / "adapter").exists()

    for number, after in ((signal.SIGINT, 80), (signal.SIGTERM, 120)):
        launched = start(config, f"run.output_dir={output}")
        wait_for_state(output, after)
        os.killpg(launched.pid, number)  # Ctrl-C, or a scheduler: the launcher and the ranks get it, workers too
        interrupted = end(launched, code=None)
        assert launched.returncode != 0
        assert "run_entry" not in interrupted, "no traceback of ours (the launcher, interrupted too, prints its own)"
        assert "re-run the same command to resume from here" in interrupted
        stopped_at = max(int(p.name) for p in (output / "checkpoints").iterdir())
        assert after <= stopped_at < STEPS

    resumed = end(start(config, f"run.output_dir={output}"))
    assert f"resuming at batch {stopped_at} of {STEPS}" in resumed
    ours, theirs = (load_file(folder / name / "adapter" / "adapter.safetensors") for name in ("broken", "whole"))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours), "bit for bit"
    assert json.loads((output / "evaluation.json").read_text())["n"] == 12

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(5, STEPS + 1, 5)), "no point doubled, none missing"

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("fulllora").experiment_id
    runs = [r for r in client.search_runs([experiment]) if r.data.tags["output"] == str(output)]
    assert len(runs) == 1, "one MLflow run over all restarts"
    assert runs[0].info.status == "FINISHED"
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    assert [point.step for point in history] == steps
    assert {file.path for file in client.list_artifacts(runs[0].info.run_id)} >= {"adapter", "config.yaml"}


def test_one_plain_process_trains_what_two_ranks_train(rank_server: RankServer, config: Path) -> None:
    folder = config.parent
    short = ["optim.epochs=4", "method=pgd", "tracking.enabled=false"]
    end(start(config, f"run.output_dir={folder}/two", *short))
    said = launch(rank_server, config, f"run.output_dir={folder}/one", *short, "data.num_workers=3")
    assert said.count("data.num_workers=3: 1 would keep up") == 1
    speeds = [json.loads(line) for line in (folder / "one" / "metrics.jsonl").read_text().splitlines()]
    speeds = [line for line in speeds if "speed/step_seconds" in line]
    assert all(0 < line["speed/decode_ms"] < 50 and "speed/mfu" not in line for line in speeds), "no peak of a CPU"
    one, two = (load_file(folder / name / "adapter" / "adapter.safetensors") for name in ("one", "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    again = launch(rank_server, config, f"run.output_dir={folder}/one", *short)
    assert "resuming at batch 24 of 24" in again, "a finished run is not trained again"


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_is_one_line_and_exit_code_2(rank_server: RankServer, config: Path, ranks: int) -> None:
    wrong = ["run.output_dir=x", "optim.batch_size=7", "data.train=/nowhere"]
    said_by_one_line(launch(rank_server, config, *wrong, ranks=ranks, code=2), ranks)


@pytest.mark.long
def test_the_launcher_passes_the_exit_code_on(config: Path) -> None:
    wrong = ["run.output_dir=x", "optim.batch_size=7", "data.train=/nowhere"]
    said_by_one_line(end(start(config, *wrong), code=2), 2)


def said_by_one_line(output: str, ranks: int) -> None:
    line = "data.train: /nowhere/index.safetensors: no index there; fulllora shards"
    if ranks == 2:
        line = "optim.batch_size must be a multiple of 2 (2 ranks"
    assert output.count(f"error: {line}") == 1, "rank 0 speaks for all"
    assert output.count("error: ") == 1
    assert "Traceback" not in output


def test_another_run_in_the_output_folder_is_not_overwritten(rank_server: RankServer, config: Path) -> None:
    settings = [f"run.output_dir={config.parent}/mine", "optim.epochs=1", "method=standard", "tracking.enabled=false"]
    launch(rank_server, config, *settings)
    output = launch(rank_server, config, *settings, "optim.lr=0.5", code=2)
    assert "holds a run with optim.lr=0.001, got 0.5" in output


def test_an_estimate_does_not_wait_for_a_store(rank_server: RankServer, config: Path) -> None:
    nowhere = f"data.validation=http://127.0.0.1:{free_port()}/val"
    output = launch(rank_server, config, nowhere, "run.output_dir=unused", "--dry-run", code=2)
    assert "(tried for 0 s)" in output


def test_check_estimates_without_training(rank_server: RankServer, config: Path) -> None:
    output = launch(rank_server, config, "run.output_dir=unused", "--dry-run")
    assert (
        "free at 16 pixels, linf eps = 8/255: 2 forward, 2 backward passes a batch; 180 batches, 360 updates" in output
    )
    assert "180 batches, 360 optimizer updates on 48 images" in output
    assert not (config.parent / "unused").exists()
