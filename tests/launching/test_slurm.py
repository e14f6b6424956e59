"""On a real SLURM, two nodes of one rank each: whatever ends a job, the run ends as the uninterrupted one, bit for
bit."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.launching.conftest import LAUNCH, STEPS, Site
from tests.services.slurm import Cluster, NoSlurm, slurm_cluster

pytestmark = pytest.mark.long
LIMIT = 300
USER_SIGNAL = "SlurmctldParameters=preempt_send_user_signal"
TWO_NODES = ["--nodes", "2", "--gpus-per-node", "1", "--no-gpus", "--config", "config.yaml"]


@pytest.fixture(scope="module")
def cluster(site: Site) -> Iterator[Cluster]:
    try:
        with slurm_cluster() as started:
            site.environment |= started.environment
            yield started
    except NoSlurm as reason:
        if os.environ.get("REQUIRE_SLURM"):
            raise
        pytest.skip(f"SLURM cannot start: {reason}")


@pytest.fixture(scope="module")
def reference(cluster: Cluster, site: Site) -> str:
    """The run that nothing interrupts, and an evaluation after it."""
    site.order()
    evaluated = [f"data.validation={site.folder}/shards", "--evaluate", "--wait"]
    site.launch(*TWO_NODES, "run.output_dir=whole", *evaluated, imports_done=False)
    return "whole"


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"{what} does not come"
        time.sleep(0.2)


def start(site: Site, run: str, *arguments: str, batches: int = 3, seconds: float = 2) -> str:
    """Launch a run of slow steps; its job, once it is in the midst of training."""
    site.order(seconds=seconds)
    said = site.launch(*TWO_NODES, f"run.output_dir={run}", *arguments)
    until(lambda: site.batches(run) >= batches, f"batch {batches} of {run}")
    return said.rpartition("job ")[2].strip()


def finish(cluster: Cluster, site: Site, run: str, job: str, reference: str) -> list[str]:
    """See the run through to its end; the log of its last restarts in lines."""
    site.order()
    until(lambda: fact(cluster, job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED"), f"the end of {run}")
    logs = sorted((site.folder / run / "launches").glob("*/*_0_log.out"))
    log = logs[-1].read_text()
    assert fact(cluster, job, "JobState") == "COMPLETED", log[-3000:]
    ours, theirs = site.adapter(run), site.adapter(reference)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours), "bit for bit"
    return log.splitlines()


def fact(cluster: Cluster, job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S*)", cluster.run("scontrol", "--oneliner", "show", "job", job))
    return found[1] if found else ""


def resumed_at(log: list[str]) -> list[int]:
    return [int(line.split()[3]) for line in log if line.startswith("resuming at batch")]


def test_two_nodes_train_and_an_evaluation_follows(cluster: Cluster, site: Site, reference: str) -> None:
    run = site.folder / reference
    notes = [json.loads(line) for line in (run / "launches" / "001" / "restarts.jsonl").read_text().splitlines()]
    assert [(note["entry"], note["event"]) for note in notes] == [
        ("train", "started"), ("train", "finished"), ("evaluate", "started"), ("evaluate", "finished")
    ]  # fmt: skip
    assert notes[0]["nodes"] == cluster.nodes
    assert json.loads((run / "evaluation_001.json").read_text()) | {"adapter": None} == json.loads(
        (run / "evaluation.json").read_text()
    ) | {"adapter": None}
    said = site.launch("status", reference)
    assert f"checkpoint of batch {STEPS}" in said
    assert said.count("COMPLETED") == 2


def test_a_preempted_run_resumes_where_it_was(cluster: Cluster, site: Site, reference: str) -> None:
    """Every process of the job gets SIGUSR2, the data's workers too; where a cluster does not send it, SIGTERM."""
    job = start(site, "preempted")
    stopped_at = []
    for number, name in enumerate(("SIGUSR2", "SIGTERM"), start=1):
        cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
        until(lambda name=name: f"stopped by {name}" in site.events("preempted"), name)
        stopped_at.append(site.batches("preempted"))
        if number == 1:
            cluster.reconfigure(f"\n{USER_SIGNAL}", "")
            until(lambda: site.batches("preempted") >= stopped_at[0] + 3, "training after the first preemption")
    cluster.reconfigure("\nPreemptMode=REQUEUE", f"\nPreemptMode=REQUEUE\n{USER_SIGNAL}")
    log = finish(cluster, site, "preempted", job, reference)
    assert site.events("preempted") == [
        "started", "stopped by SIGUSR2", "started", "stopped by SIGTERM", "started", "finished"
    ]  # fmt: skip
    assert resumed_at(log) == stopped_at, "no batch is lost"
    assert "Traceback" not in "\n".join(log)


def test_a_run_outlives_its_time_limit(cluster: Cluster, site: Site, reference: str) -> None:
    # on a busy machine a start alone takes most of a minute, and three restarts without a batch end the job
    job = start(site, "limited", "--time", "2", "--signal-seconds", "20", batches=1, seconds=4)
    until(lambda: "stopped by SIGUSR2" in site.events("limited"), "the signal")
    finish(cluster, site, "limited", job, reference)
    assert int(fact(cluster, job, "Restarts")) >= 1


def test_cancel_saves_and_a_requeue_and_a_lost_node_resume(cluster: Cluster, site: Site, reference: str) -> None:
    """One run, three ends of its job that it is not asked about: SIGTERM comes, and SIGKILL some seconds later."""
    job = start(site, "tossed", seconds=4)  # launch.py takes a while
    assert f"job {job} of tossed is RUNNING; cancel it first" in site.launch(
        *TWO_NODES, "run.output_dir=tossed", code=2
    )
    assert f"cancelled job {job}" in site.launch("cancel", "tossed")
    until(lambda: fact(cluster, job, "JobState") == "CANCELLED", "the end of the cancelled job")
    assert site.events("tossed") == ["started", "stopped by SIGTERM"]
    stopped_at = [site.batches("tossed")]

    job = start(site, "tossed", batches=stopped_at[0] + 3)
    cluster.run("scontrol", "requeue", job)
    until(lambda: site.events("tossed", "002").count("started") == 2, "the restart after scontrol requeue")
    stopped_at.append(site.batches("tossed"))
    until(lambda: site.batches("tossed") >= stopped_at[1] + 2, "its training")
    node = cluster.nodes[1]
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    until(lambda: fact(cluster, job, "JobState") == "PENDING", "the requeue after a lost node")
    assert f"job {job}" not in site.launch("status", "tossed").partition("002")[2], "nothing is amiss"
    if "DOWN" in cluster.run("scontrol", "show", "node", node):  # it may be back already
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
    stopped_at.append(site.batches("tossed"))
    log = finish(cluster, site, "tossed", job, reference)
    assert site.events("tossed", "002") == ["started", "stopped by SIGTERM"] * 2 + ["started", "finished"]
    assert resumed_at(log) == stopped_at, "no batch is lost"
    assert [line.split()[3] for line in site.launch("status", "tossed").splitlines()[2:]] == ["CANCELLED", "COMPLETED"]


def test_a_launch_from_inside_an_allocation_is_like_any_other(cluster: Cluster, site: Site) -> None:
    """The job that launches has memory per CPU, tasks and CPUs of its own; srun would take them for the new job's."""
    site.order()
    launch = shlex.join([sys.executable, LAUNCH, *TWO_NODES, "run.output_dir=inside", "--mem", "64M", "--wait"])
    environment = os.environ | site.environment
    done = subprocess.run(
        ["sbatch", "--wait", "--mem-per-cpu=32M", "--ntasks=1", "--cpus-per-task=3", "--output=outer.log", "--wrap",
         f"env | grep SLURM_MEM_PER_CPU=32 && {launch}"],
        cwd=site.folder, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    said = (site.folder / "outer.log").read_text() if (site.folder / "outer.log").exists() else done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "SLURM_MEM_PER_CPU=32\n" in said
    assert site.events("inside") == ["started", "finished"]


def test_a_step_that_cannot_start_tells_why(cluster: Cluster, site: Site) -> None:
    asked = ["--srun=--gres=none_such:1", "--wait"]
    said = site.launch(*TWO_NODES, "run.output_dir=too_big", *asked, code=1)
    reason = r"srun: error: Invalid generic resource \(gres\) specification"
    assert re.search(rf"\njob \d+ \(train\) is FAILED: {reason}\n", said), said
    assert re.search(rf"\njob \d+: {reason}\n", site.launch("status", "too_big"))


def test_a_task_that_fails_tells_the_caller_why_and_ends_the_others(cluster: Cluster, site: Site) -> None:
    for launch, order, reason in (
        ("001", {"fail": [3, 1]}, "task 1: RuntimeError: no more room on the shelf in "),
        ("002", {"kill": [3, 1]}, f"task 1: Killed on {cluster.nodes[1]}\n"),
    ):
        site.order(**order)
        said = site.launch(*TWO_NODES, "run.output_dir=failing", "--wait", code=1)
        job = re.search(r"job (\d+)\n", said)[1]
        assert f"\njob {job} (train) is FAILED: {reason}" in said
        assert f"\njob {job}: {reason}" in site.launch("status", "failing")
        if "fail" in order:
            code = site.folder / "failing" / "launches" / launch / "code"
            assert f"{reason}{code}/paced.py\n" in said, "the job has the launch's own copy"
            assert "no more room on the shelf" in site.launch("logs", "failing", "--task", "1", "--lines", "1")


def test_a_killed_rank_is_started_again_on_another_node_while_the_run_gets_on(cluster: Cluster, site: Site) -> None:
    one_node = [*TWO_NODES, "--nodes", "1", "run.output_dir=killed", "run.checkpoint_every=2"]
    site.order(kill=[5, 0], seconds=0.5)
    job = re.search(r"job (\d+)\n", site.launch(*one_node))[1]
    until(lambda: site.events("killed").count("started") == 2, "the second start")
    nodes = [json.loads(line)["nodes"] for line in restarts(site, "killed")]
    assert nodes == [[name] for name in cluster.nodes], "not where it was killed"
    assert fact(cluster, job, "ExcNodeList") == nodes[0][0]
    until(
        lambda: fact(cluster, job, "JobState") == "FAILED", "the end"
    )  # killed at the same batch, before another save
    assert site.events("killed") == ["started", "started"]
    logs = (site.folder / "killed" / "launches" / "001" / f"{job}_0_log.out").read_text()
    assert resumed_at(logs.splitlines()) == [4]


def restarts(site: Site, run: str) -> list[str]:
    return (site.folder / run / "launches" / "001" / "restarts.jsonl").read_text().splitlines()
