"""Scripts of the repository in forked processes that have imported everything already (ranks.py forks them)."""

import atexit
import contextlib
import faulthandler
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Order:
    """A command line: `python script arguments...` on so many ranks.

    Attributes:
        env: all of it.
        timeout: seconds until a rank ends.
        folder: of what the ranks print, and their exit codes.
    """

    script: str
    arguments: tuple[str, ...]
    ranks: int
    cwd: str
    env: Mapping[str, str]
    timeout: float
    folder: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="launched-"))


class Launched:
    """A script that runs; the session of processes has the number `pid`."""

    def __init__(self, order: Order, pid: int):
        self.order, self.pid = order, pid

    def stdout(self, rank: int | None = None) -> str:
        """What has been printed so far, of all ranks in their order or of one."""
        return self._read("stdout", rank)

    def stderr(self, rank: int | None = None) -> str:
        return self._read("stderr", rank)

    def _read(self, stream: str, rank: int | None) -> str:
        ranks = range(self.order.ranks) if rank is None else (rank,)
        files = [Path(self.order.folder, f"{stream}-{rank}") for rank in ranks]
        return "".join(file.read_text() for file in files if file.exists())

    def poll(self) -> int | None:
        """The exit code, of ranks the first that is not 0, of a killed session -9; None while it runs."""
        codes = Path(self.order.folder, "codes")
        if not codes.exists() and self._alive():
            return None
        return next((code for code in json.loads(codes.read_text()) if code), 0) if codes.exists() else -signal.SIGKILL

    def _alive(self) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        return False

    def rank(self, rank: int) -> psutil.Process:
        """Its process."""
        return psutil.Process(int(Path(self.order.folder, f"pid-{rank}").read_text()))

    def kill(self) -> None:
        """SIGKILL to every process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while self._alive():
            time.sleep(0.01)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """The end, with the streams of all ranks."""
        deadline = time.monotonic() + self.order.timeout + 30
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"{self.order.script} took too long:\n{self.stderr()[-3000:]}")
            time.sleep(0.01)
        command = [self.order.script, *self.order.arguments]
        return subprocess.CompletedProcess(command, code, self.stdout(), self.stderr())


def run_script(order: Order) -> int:
    """Fork it; the number of the process that waits for its ranks."""
    pid = os.fork()
    if pid:
        return pid
    try:
        _launcher(order)
    finally:
        os._exit(1)


def _launcher(order: Order) -> None:
    from fulllora_dist.distributed.comm import free_port

    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is sent to all is for the ranks
    launched = {"WORLD_SIZE": order.ranks, "LOCAL_WORLD_SIZE": order.ranks, "MASTER_ADDR": "127.0.0.1"}
    launched["MASTER_PORT"] = free_port()
    pids = []
    for rank in range(order.ranks):
        pid = os.fork()
        if pid == 0:
            names = launched | {"RANK": rank, "LOCAL_RANK": rank} if order.ranks > 1 else {}
            os.environ.clear()
            os.environ.update(order.env)
            os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
            os.environ |= {name: str(value) for name, value in names.items()}
            _run(order, rank)
        Path(order.folder, f"pid-{rank}").write_text(str(pid))
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    temporary = Path(order.folder, "codes.tmp")
    temporary.write_text(json.dumps(codes))
    temporary.rename(temporary.with_suffix(""))


def _run(order: Order, rank: int) -> None:
    """What the interpreter does with a script, from its first line to the exit."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{order.folder}/{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, stream)
        os.close(file)
    faulthandler.dump_traceback_later(order.timeout, exit=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(order.cwd)
    sys.argv = [order.script, *order.arguments]
    sys.path[0] = str(Path(order.script).resolve().parent)
    try:
        runpy.run_path(order.script, run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = 1 if isinstance(end.code, str) else end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
