"""Real ranks and scripts for tests.

Importing torch, timm, deepspeed and mlflow takes longer than most tests run. A server process does it once and forks
the ranks of every call; it computes nothing itself, so that its forks are safe, and what a test does to a rank ends
with it.
"""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import pkgutil
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.scripts import Launched, Order, run_script

GRACE = 30  # seconds that the server gets beyond the ranks' own limit


class RankError(AssertionError):
    """A rank raised, died or took too long; the message holds its traceback."""


class RankServer:
    """Forks ranks on demand: `run(world, work, *args)`, and scripts: `launch(script, *arguments)`."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name="rank-server")
        self._process.start()
        theirs.close()

    def run(
        self,
        world: int,
        work: Callable[..., Any],
        *args: Any,
        timeout: float = 120,
        prepare: Callable[..., Any] | None = None,
    ) -> list[Any]:
        """`work(ranks, *args)` on `world` ranks; what they return, in rank order.

        Args:
            work, prepare: importable by name.
            timeout: seconds until the ranks are killed; each prints where it hangs.
            prepare: called as prepare(*args) in the server; then it is work(ranks, made, *args), and the ranks share
                the memory of what was made.

        Raises:
            RankError: a rank raised, died or took too long.
        """
        self._pipe.send(("ranks", world, work, args, timeout, prepare))
        if not self._pipe.poll(timeout + GRACE + (600 if prepare else 0)):
            self.close()
            raise RankError("the rank server does not answer")
        outcome = self._pipe.recv()
        if isinstance(outcome, str):
            raise RankError(outcome)
        return [pickle.loads(result) for result in outcome]

    def launch(
        self,
        script: str | Path,
        *arguments: str | Path,
        ranks: int = 1,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 240,
    ) -> Launched:
        """Start `python script arguments...`, as a launcher starts it on so many ranks, with all imports done.

        Args:
            ranks: 1 is a plain process, without RANK and the like in its environment.
            cwd, env: the caller's if left out.
            timeout: seconds until a rank ends; it prints where it hangs.
        """
        order = Order(
            script=str(script),
            arguments=tuple(map(str, arguments)),
            ranks=ranks,
            cwd=str(cwd or os.getcwd()),
            env=dict(os.environ if env is None else env),
            timeout=timeout,
        )
        self._pipe.send(("script", order))
        return Launched(order, self._pipe.recv())

    def close(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


PRELOADED = (
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "aiobotocore.session",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # all of torch.compile, for a decorator
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "matplotlib.pyplot",
    "mlflow.store.tracking.sqlalchemy_store",
    "s3fs",
    "scipy.stats",
    "setuptools",  # DeepSpeed asks for it later
    "timm",
)
"""What the package and DeepSpeed import where it is needed."""


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is pytest's
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "MPLBACKEND": "agg"}
    import torch

    import fulllora_dist

    modules = [found.name for found in pkgutil.walk_packages(fulllora_dist.__path__, "fulllora_dist.")]
    for name in PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):  # older versions lack some
            importlib.import_module(name)
    for name in modules:
        importlib.import_module(name)
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    while True:
        try:
            kind, *request = pipe.recv()
        except EOFError:  # pytest is gone
            return
        with contextlib.suppress(ChildProcessError):  # scripts that have ended
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if kind == "script":
            pipe.send(run_script(*request))
            continue
        try:
            outcome: list[bytes] | str = _fork(*request)
        except BaseException:
            outcome = traceback.format_exc()
        pipe.send(outcome)


def _fork(
    world: int, work: Callable[..., Any], args: tuple, timeout: float, prepare: Callable[..., Any] | None
) -> list[bytes] | str:
    from fulllora_dist.distributed.comm import free_port

    made = (prepare(*args),) if prepare else ()
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world, port, timeout, theirs, work, (*made, *args)))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout + GRACE / 2)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[bytes] | str:
    """Every rank's result, or the traceback of the first that fails: the others may wait for it forever. A rank that
    died comes before those that failed for it."""
    results: dict[int, bytes] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            return f"ranks {[pipes.index(p) for p in waiting]} took too long"  # type: ignore[arg-type]
        failed = None
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                fine, results[rank] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                return f"rank {rank} died, or took too long (its stderr says where)"
            if not fine and failed is None:
                failed = f"rank {rank}:\n{pickle.loads(results[rank])}"
        if failed is not None:
            return failed
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, world: int, port: int, timeout: float, pipe: Connection, work: Callable[..., Any], args: tuple
) -> None:
    from fulllora_dist.distributed.comm import start_comm

    faulthandler.dump_traceback_later(timeout, exit=True)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in names.items()}
    try:
        # plain pickle copies tensors; a pipe of torch's would pass handles that die with the rank
        fine, result = True, pickle.dumps(work(start_comm(), *args))
    except BaseException:
        fine, result = False, pickle.dumps(traceback.format_exc())
    pipe.send((fine, result))
    os._exit(0)
