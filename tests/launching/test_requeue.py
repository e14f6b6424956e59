"""The shell lines by which a batch script requeues its job, run by bash with a scontrol that notes what it is asked."""

import os
import subprocess
from pathlib import Path

import pytest

from fulllora_dist.launching.requeue import MAX_FAILURES, begin, end

SCONTROL = """#!/bin/bash
case $1 in show) echo "JobState=$STATE PreemptTime=None ExcNodeList=$EXCLUDED" ;; *) echo "$@" >> "$NOTES" ;; esac
"""
SAVED = "sleep 0.01; mkdir -p checkpoints/00000100"
NODE = "echo 'srun: error: n7: task 3: Aborted (core dumped)'; echo 'srun: error: n8: task 4: Killed'"
AGAIN = ["requeue 7"]


@pytest.mark.parametrize(
    ("tasks", "state", "asked"),
    [
        (f"{SAVED}; {NODE}; (exit 137)", "RUNNING", ["requeue 7", "update JobId=7 ExcNodeList=n[1-2],n7"]),
        (f"{SAVED}; echo 'srun: error: n7: task 0: Exited with exit code 1'; (exit 1)", "RUNNING", AGAIN),
        (f"{NODE}; (exit 134)", "RUNNING", []),  # no progress
        (f"{SAVED}; (exit 2)", "RUNNING", []),
        (f"{SAVED}; touch refused-7; (exit 137)", "RUNNING", []),  # exit code 2 of the task that srun did not report
        (f"{SAVED}; (exit 143)", "RUNNING", []),
        (f"{SAVED}; (exit 137)", "CANCELLED", []),
        (f"{SAVED}; (exit 0)", "RUNNING", []),
        ("(exit 140)", "RUNNING", AGAIN),  # SIGUSR2
    ],
)
def test_a_job_is_requeued_where_another_start_helps(tmp_path: Path, tasks: str, state: str, asked: list[str]) -> None:
    assert run(tmp_path, tasks, state, excluded="n[1-2]") == asked


def test_failures_of_hardware_are_counted_and_logs_of_earlier_starts_name_no_node(tmp_path: Path) -> None:
    for start in range(MAX_FAILURES + 1):
        saved = SAVED.replace("00000100", f"{start:08d}")
        asked = run(tmp_path, f"{saved}; {NODE if start == 0 else ':'}; (exit 134)", "RUNNING")
        assert asked == [*AGAIN, "update JobId=7 ExcNodeList=n7"][: 2 if start == 0 else start < MAX_FAILURES]
    assert len((tmp_path / "failures-7").read_text().splitlines()) == MAX_FAILURES


def run(folder: Path, tasks: str, state: str, excluded: str = "(null)") -> list[str]:
    """What the script asks of scontrol."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "scontrol").write_text(SCONTROL)
    (folder / "bin" / "scontrol").chmod(0o755)
    notes = folder / "notes"
    notes.write_text("")
    environment = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "STATE": state,
        "NOTES": str(notes),
        "EXCLUDED": excluded,
    }
    with open(folder / "7_0_log.out", "a") as log:
        script = "\n".join([begin(folder), tasks, end([str(folder / "checkpoints")])])
        subprocess.run(["bash", "-c", script], cwd=folder, env=environment, stdout=log, timeout=20)
    return notes.read_text().splitlines()
