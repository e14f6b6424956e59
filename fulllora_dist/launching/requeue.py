"""How a batch script begins and ends: it requeues the job where another start helps.

The script does so because the tasks' container may have no scontrol. Beside the job's logs it keeps, each with the
job's number: start-N, written when this start began, with the lines that the log had before; failures-N, a line for
each failure after which the job was requeued; refused-N, from a task, that another start would not help.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from fulllora_dist.launching.worker import REFUSED, REQUEUE_SIGNALS

MAX_FAILURES = 5
"""Failures of hardware after which a job is requeued: before each, that start must have saved a checkpoint."""

_BEGIN = """here={folder}
rm -f "$here/{refused}$SLURM_JOB_ID"
cat "$here/${{SLURM_JOB_ID}}_0_log.out" 2>/dev/null | wc -l > "$here/start-$SLURM_JOB_ID\""""
_END = """code=$?
# 128 + signal, by which the run ended after saving. SIGTERM is a preemption if SLURM says so, else somebody's wish
case $code in
  {time_is_up}) again=1 ;;
  143) scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]' && again=1 ;;
  0 | 2 | 129 | 130) ;;
  *)  # a GPU, a node or a task failed: again where this start has saved, and nobody ended the job
    failures="$here/failures-$SLURM_JOB_ID" start="$here/start-$SLURM_JOB_ID"
    if [ ! -e "$here/{refused}$SLURM_JOB_ID" ] && [ "$(cat "$failures" 2>/dev/null | wc -l)" -lt {failures} ] &&
      [ -n "$(find {checkpoints} -maxdepth 1 -name '[0-9]*' -newer "$start" 2>/dev/null)" ] &&
      scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
      again=1
      signals='Aborted|Killed|Bus error|Segmentation|Out Of Memory'
      bad=$(tail -n "+$(($(cat "$start") + 1))" "$here/${{SLURM_JOB_ID}}_0_log.out" |
        grep -m1 'srun: error: .*: tasks* ' |
        sed -nE "s/.*srun: error: ([^ :]+): tasks? [^:]*: ($signals).*/\\1/p")
      echo "exit code $code ${{bad:-}}" >> "$failures"
    fi ;;
esac
if [ -n "${{again-}}" ]; then
  trap '' TERM  # by which SLURM ends this script when it requeues the job
  scontrol requeue "$SLURM_JOB_ID"
  excluded=$(scontrol show job "$SLURM_JOB_ID" | sed -nE 's/.*ExcNodeList=([^( ]+).*/\\1/p')
  [ -n "${{bad-}}" ] && scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${{excluded:+$excluded,}}$bad"
fi
exit $code"""


def begin(folder: Path) -> str:
    """The lines before the tasks start.

    Args:
        folder: of the launch, with the logs.
    """
    return _BEGIN.format(folder=shlex.quote(str(folder)), refused=REFUSED)


def end(checkpoints: Sequence[str]) -> str:
    """The lines after the tasks, whose exit code is that of the line before.

    Args:
        checkpoints: local folders where a start saves.
    """
    return _END.format(
        time_is_up=" | ".join(str(128 + number) for number in REQUEUE_SIGNALS),
        failures=MAX_FAILURES,
        checkpoints=" ".join(map(shlex.quote, checkpoints)),
        refused=REFUSED,
    )
