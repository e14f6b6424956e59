"""launch.py without a cluster: what it would submit, the other executors, and what it refuses."""

import json
import os
import re
import runpy
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from submitit import JobEnvironment

from fulllora_dist.commands.launch import given, launch_arguments
from fulllora_dist.config.load import load_config
from fulllora_dist.core.errors import UserError
from fulllora_dist.launching.folder import launching, make_folder
from fulllora_dist.launching.jobs import run_jobs
from fulllora_dist.launching.report import find_runs
from fulllora_dist.launching.resources import Resources, minutes, read_profile, resources
from fulllora_dist.launching.submit import submit
from fulllora_dist.launching.worker import join_ranks
from tests.launching.conftest import LAUNCH, ROOT, STEPS, Site

CONFIG = ["--config", "config.yaml"]
TAG = "vit_small_patch32_384.augreg_in21k_ft_in1k"


def test_dry_run_shows_the_batch_scripts_and_submits_nothing(site: Site) -> None:
    """A profile below the command line; the evaluation waits for the training's success."""
    profile = {"partition": "gpu", "mem": "400G", "sbatch": {"exclusive": True}, "srun": ["--mpi=none"]}
    (site.folder / "site.yaml").write_text(yaml.safe_dump(profile))
    said = site.launch(
        *CONFIG, "run.output_dir=unused", "--nodes", "2", "--gpus-per-node", "4", "--profile", "site.yaml", "--dry-run",
        "--partition", "big", "--time", "1-12", "--sbatch", "reservation=mine", "--srun=--container-image=some image",
        "data.validation=shards", "--evaluate", "--attacks clean,pgd100x5 --num-samples 5",
    )  # fmt: skip
    train, evaluate = said.split("#!/bin/bash")[1:]
    flags = set(re.findall(r"#SBATCH --(\S+)", train))
    assert flags >= {
        "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=2", "partition=big", "mem=400G", "exclusive",
        "reservation=mine", "time=2160", "signal=USR2@120", "requeue", "open-mode=append",
    }  # fmt: skip
    (srun,) = re.findall(r"^srun .*$", train, re.MULTILINE)
    for part in (
        "--kill-on-bad-exit=1",
        "--wait=1800",
        "--cpus-per-task=2",
        "--mpi=none",
        "'--container-image=some image'",
    ):
        assert f" {part} " in srun
    code = site.folder / "unused" / "launches" / "NEXT" / "code"
    assert f' env PYTHONSAFEPATH=1 PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}" ' in srun
    assert "#SBATCH --dependency=afterok:TRAIN" in evaluate
    assert "#SBATCH --kill-on-invalid-dep=yes" in evaluate
    assert not (site.folder / "unused").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes: Input should be greater than or equal to 1 (got '0')"),
        (["--time", "soon"], "--time: must be a time such as 240, 4:00:00 or 1-12:00:00 (got 'soon')"),
        (["--time", "1", "--signal-seconds", "60"], "--signal-seconds: 60 leave nothing of --time 1 minutes"),
        (["--profile", "nowhere"], "--profile: "),
        (["--gpus-per-node", "3"], "optim.batch_size must be a multiple of 3 (3 ranks"),
        (["optim.lr=-1"], "command line: optim.lr: "),
        (["--evaluate"], "data.validation is not set"),
        (["--evaluate", "optim.lr=1"], "--evaluate: 'optim.lr=1' is not an option of evaluate.py; put settings before"),
        (["--evaluate", "--attacks 'clean"], '--evaluate: "--attacks \'clean" is not a command line (No closing'),
        (["--executor", "local", "--setup", "module load cuda"], "--setup: --executor local has no batch script"),
        (["run.output_dir=a:b"], "run.output_dir: a:b: ':' would end the folder's name"),
        (
            [
                "--setup",
                "export HF_HUB_OFFLINE=1",
                "model.pretrained=true",
                "model.model_kwargs={}",
                "model.backbone=" + TAG,
            ],
            f"model.backbone: the jobs have HF_HUB_OFFLINE=1, and the hub's cache here has no weights of {TAG}; run",
        ),
        (["data.train=/nowhere"], "data.train: /nowhere/index.safetensors: no index there"),
        (["--executor", "local", "--nodes", "2"], "--nodes: --executor local has one machine, not 2"),
        (["--executor", "debug", "--gpus-per-node", "2"], "--gpus-per-node: --executor debug runs one task"),
    ],
)
def test_bad_input_is_refused_before_anything_is_queued(
    site: Site, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(site.folder)
    plain = ["plugins=[]", "method=pgd", "run.output_dir=unused"]
    monkeypatch.setattr("sys.argv", ["launch.py", *CONFIG, *plain, *arguments])
    with pytest.raises(UserError, match="^" + re.escape(message)):
        runpy.run_path(LAUNCH)["main"]()
    assert not list(site.folder.glob("unused*")), "nothing is queued, nothing is left"


def test_a_mistake_is_one_line_and_exit_code_2(site: Site) -> None:
    said = site.launch(*CONFIG, "run.output_dir=unused", "--executor", "slurm", "--nodes", "3", code=2)
    assert said.startswith("error: optim.batch_size must be a multiple of 3 (3 ranks")
    assert len(said.splitlines()) == 1


def test_settings_of_sbatch_take_the_place_of_ours(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(site.folder)
    plain = ["plugins=[]", "method=pgd", "run.output_dir=unused", "data.validation=shards", "--dry-run", "--evaluate="]
    asked = ["dependency=singleton", "nice=7", "requeue=false", "exclusive=false", "open_mode=truncate"]
    options = [part for name in asked for part in ("--sbatch", name)]
    monkeypatch.setattr("sys.argv", ["launch.py", *CONFIG, *plain, *options])
    runpy.run_path(LAUNCH)["main"]()
    train, evaluate = (
        re.findall(r"#SBATCH --(\S+)", text) for text in capsys.readouterr().out.split("#!/bin/bash")[1:]
    )
    assert [flag for flag in train if re.match("nice|requeue|exclusive|open|dep", flag)] == [
        "dependency=singleton", "nice=7", "open-mode=truncate"
    ]  # fmt: skip
    assert "dependency=afterok:TRAIN,singleton" in evaluate


def test_settings_that_contradict_the_saved_run_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.folder)
    settings = ["plugins=[]", "method=pgd", "run.output_dir=saved"]
    saved = load_config("config.yaml", [*settings, "optim.lr=0.5"]).model_dump(mode="json")
    checkpoint = site.folder / "saved" / "checkpoints" / "00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text(json.dumps({"format_version": 1, "config": saved}))
    monkeypatch.setattr("sys.argv", ["launch.py", *CONFIG, *settings])
    with pytest.raises(UserError, match=r"saved holds a run with optim.lr=0.5, got 0.001"):
        runpy.run_path(LAUNCH)["main"]()


def test_a_launch_that_fails_leaves_nothing(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No srun; then a plugin that is gone; then a disk that is read-only for one file."""
    monkeypatch.chdir(site.folder)
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = [*CONFIG, "plugins=[]", "method=pgd", f"run.output_dir={tmp_path}/run"]
    with pytest.raises(UserError, match="srun not found; submit on a login node"):
        submit(load_config("config.yaml", settings[2:]), settings, Resources(), "slurm", [])
    assert not (tmp_path / "run").exists()
    config = load_config("config.yaml", settings[2:]).model_copy(update={"plugins": ("/nowhere/gone.py",)})
    with pytest.raises(FileNotFoundError), launching(config.run.output_dir):
        make_folder(config)
    monkeypatch.setattr("fulllora_dist.launching.submit.write_record", lambda *_: os.mkdir("/nowhere/at/all"))
    with pytest.raises(FileNotFoundError):
        submit(load_config("config.yaml", settings[2:]), settings, Resources(), "debug", [])
    assert os.listdir(tmp_path / "run") == []
    (tmp_path / "run" / "launches").mkdir()
    with pytest.raises(UserError, match="no run here was launched"):
        find_runs(str(tmp_path))


def test_launches_of_one_run_take_turns(tmp_path: Path) -> None:
    second = threading.Event()

    def launch() -> None:
        with launching(str(tmp_path)):
            second.set()

    thread = threading.Thread(target=launch)
    with launching(str(tmp_path)):
        thread.start()
        assert not second.wait(0.3)
    assert second.wait(10), "also where the first one failed and took the folder away"
    thread.join()
    assert os.listdir(tmp_path) == []


def test_a_run_that_was_never_launched_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here was launched; give a run's output folder"):
        find_runs(str(tmp_path))


def test_profiles_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--profile: partitoin is not a setting; did you mean partition\?"):
        resources({"partitoin": "gpu"}, {})
    with pytest.raises(UserError, match=r"--profile: sbatch: .*\(got 'exclusive'\)"):
        resources({"sbatch": "exclusive"}, {})
    with pytest.raises(UserError, match=r"known: example, or the path of a YAML file"):
        read_profile("nowhere", str(ROOT / "jobs" / "profiles"))
    (tmp_path / "time.yaml").write_text("time: 4:00:00")
    assert resources(read_profile(str(tmp_path / "time.yaml"), ""), {}).time == 240, "YAML's own number is 14400"
    (tmp_path / "list.yaml").write_text("- gpu")
    with pytest.raises(UserError, match=r"list.yaml is a list; it must contain settings, key: value"):
        read_profile(str(tmp_path / "list.yaml"), "")


def test_help_is_of_the_command_line() -> None:
    """What it says can be typed: no value of a profile, and no name of a unit that is not one."""
    said = " ".join(launch_arguments().format_help().split())
    for part in (
        "--gpus-per-node N ", "--nodes N ", "--cpus-per-task N ", "--sbatch NAME[=VALUE] ", "--srun OPTION ",
        "--no-gpus request no GPUs",
        "--sbatch reservation=mine --sbatch exclusive", "--srun=--container-image=image.sqsh",
    ):  # fmt: skip
        assert part in said
    for part in ("null", "false", "{reservation", "[--container"):
        assert part not in said
    typed = launch_arguments().parse_args(
        [
            *CONFIG, "--sbatch", "reservation=mine", "--sbatch", "exclusive", "--srun=--container-image=image.sqsh",
            "--no-gpus",
        ]
    )  # fmt: skip
    asked = resources({}, given(typed))
    assert (asked.sbatch, asked.srun) == ({"reservation": "mine", "exclusive": True}, ("--container-image=image.sqsh",))
    assert not asked.gpus


def test_the_example_profile_is_valid() -> None:
    profile = read_profile("example", str(ROOT / "jobs" / "profiles"))
    assert resources(profile, {"nodes": "2"}) == Resources(**profile, nodes=2)


def test_times_are_slurm_s() -> None:
    texts = ("90", "90:30", "4:00:00", "4:00:01", "1-12", "1-12:30", "2-0:0:0")
    assert [int(minutes(text)) for text in texts] == [90, 91, 240, 241, 2160, 2190, 2880]  # type: ignore[call-overload]


def test_the_debug_executor_takes_the_same_path_in_one_process(site: Site) -> None:
    site.order()
    said = site.launch(*CONFIG, "run.output_dir=debug", "optim.epochs=1", "--executor", "debug")
    assert "job DEBUG_" in said
    assert site.events("debug") == ["started", "finished"]
    assert "COMPLETED" in site.launch("status", "debug")
    assert (site.folder / "debug" / "adapter" / "adapter.safetensors").exists()
    (site.folder / "orders.json").write_text('{"fail": [0, 0]}')
    said = site.launch(*CONFIG, "run.output_dir=broken", "optim.epochs=1", "--executor", "debug", code=1)
    assert said.splitlines()[-1].startswith("failed: RuntimeError: no more room on the shelf")


def test_jobs_use_their_own_copy_of_the_code_wherever_they_are_launched(site: Site) -> None:
    """In the repository's root, and with its package in PYTHONPATH."""
    site.order()
    output = site.folder / "rooted"
    config = ["--config", str(site.folder / "config.yaml"), f"plugins=[{site.folder}/paced.py]"]
    site.launch(
        *config, f"run.output_dir={output}", "optim.epochs=1", "--executor", "local", "--no-gpus", "--wait", cwd=ROOT
    )
    launch = output / "launches" / "001"
    note = json.loads((launch / "restarts.jsonl").read_text().splitlines()[0])
    assert note["code"] == str(launch / "code" / "fulllora_dist")


@pytest.mark.long
def test_a_local_run_is_cancelled_resumed_and_requeued(site: Site) -> None:
    """Two ranks in the background: the code and config of the launch, SIGTERM from cancel, SIGUSR2 near the time limit,
    and what is left of a killed one."""
    site.order(seconds=3)
    store = f"tracking.uri=sqlite:///{site.folder}/mlflow.db"
    two = [*CONFIG, "--executor", "local", "--gpus-per-node", "2", "--no-gpus"]
    run = [*two, "run.output_dir=local", "tracking.enabled=true", store]
    site.launch(*run, imports_done=False)
    wait_for(site, 2)
    snapshot = site.folder / "local" / "launches" / "001"
    note = json.loads((snapshot / "restarts.jsonl").read_text())
    assert note["event"] == "started", "launch.py does not wait for it"
    assert note["code"] == str(snapshot / "code" / "fulllora_dist")
    assert (snapshot / "code" / "paced.py").read_text() == (site.folder / "paced.py").read_text()
    assert re.fullmatch(r"[0-9a-f]{40}", json.loads((snapshot / "code.json").read_text())["commit"])
    assert site.launch(*run, code=2).startswith("error: run.output_dir: job ")
    assert "cancelled job" in site.launch("cancel", "local")
    until_over(site)
    assert site.events("local") == ["started", "stopped by SIGTERM"]
    assert "CANCELLED" in site.launch("status", "local")

    site.launch(*run)
    wait_for(site, site.batches("local") + 2)
    (job,) = [job for job in run_jobs(str(site.folder / "local")) if job.alive]
    tasks = psutil.Process(int(job.id)).children()
    for task in tasks:
        task.send_signal(signal.SIGUSR2)
    deadline = time.monotonic() + 120
    while site.events("local", "002").count("started") < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert site.events("local", "002") == ["started", "stopped by SIGUSR2", "started"]
    wait_for(site, site.batches("local") + 1)
    controller = psutil.Process(int(job.id))
    for process in [controller, *controller.children(recursive=True)]:
        process.kill()
    until_over(site)
    assert "says RUNNING, but no job of this run is alive: it was killed" in site.launch("status", "local")

    site.order()
    assert "job" in site.launch(*run, "--wait")
    said = site.launch("status", "local")
    assert "COMPLETED" in said
    assert f"checkpoint of batch {STEPS}" in said
    assert "RUNNING" not in said
    assert "Job completed successfully" in site.launch("logs", "local", "--task", "1")


def wait_for(site: Site, batches: int) -> None:
    deadline = time.monotonic() + 120
    while site.batches("local") < batches:
        assert time.monotonic() < deadline, f"batch {batches} does not come"
        time.sleep(0.2)


def until_over(site: Site) -> None:
    deadline = time.monotonic() + 60
    while any(job.alive for job in run_jobs(str(site.folder / "local"))):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_ranks_and_a_port_of_their_own_come_from_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 5 of 2 nodes with 4 tasks each; the MASTER_PORT of the shell would be that of all its jobs."""
    ports = set()
    for job in range(55_554_000, 55_554_100):
        scheduler = {
            "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": job, "SLURM_NTASKS": 8, "SLURM_JOB_NUM_NODES": 2,
            "SLURM_NODEID": 1, "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_PROCID": 5, "SLURM_LOCALID": 1,
            "MASTER_ADDR": "elsewhere", "MASTER_PORT": 1, "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0,
            "LOCAL_WORLD_SIZE": 1, "CUDA_VISIBLE_DEVICES": "0,1,2,3",
        }  # fmt: skip
        for name, value in scheduler.items():
            monkeypatch.setenv(name, str(value))
        join_ranks(JobEnvironment())
        names = ("MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES")
        assert [os.environ[name] for name in names] == ["gpu07", "5", "8", "1", "0,1,2,3"]
        ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 100
    assert max(ports) < 32_768, "from there on, ports of outgoing connections are taken at any time"
