"""train.py, of which a rank hangs in its third batch: RANK_THAT_HANGS, and HOW it does so; or, if that is
"evaluation", evaluate.py, in its first item. The watchdog is quick."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fulllora_dist.commands import evaluate, train
from fulllora_dist.commands.entry import run_entry
from fulllora_dist.distributed import watchdog
from fulllora_dist.evaluation.evaluator import Evaluator
from fulllora_dist.training.phases import Phases

_step, _result = Phases.step, Evaluator._result


def endless_loop() -> None:
    while True:
        pass


def _hang(how: str) -> None:
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "loop":
        endless_loop()
    if how == "collective":
        import torch.distributed as dist

        dist.barrier()
    if how == "worker":
        for child in psutil.Process().children(recursive=True):
            if child.ppid() != os.getpid():  # the fork server's, not itself
                child.suspend()


def _hanging(self, engine, batch, step):
    if os.environ["RANK"] == os.environ["RANK_THAT_HANGS"]:
        if step == 2:
            time.sleep(0.5)  # for the checkpoint
            _hang(os.environ["HOW"])
        if os.environ["HOW"] == "slow":
            time.sleep(1.5)
    return _step(self, engine, batch, step)


def _hanging_item(self, predict, item, batch):
    if os.environ["RANK"] == os.environ["RANK_THAT_HANGS"]:
        os.environ["RANK_THAT_HANGS"] = "none any more"
        before = watchdog._watching._number
        while watchdog._watching._number < before + 2:  # it has said that it evaluates
            time.sleep(0.01)
        _hang("stop")
    return _result(self, predict, item, batch)


if __name__ == "__main__":
    watchdog.BEAT_S, watchdog.WARN_S = 0.1, 1.0
    Phases.step, Evaluator._result = _hanging, _hanging_item
    run_entry(evaluate.main if os.environ["HOW"] == "evaluation" else train.main)
