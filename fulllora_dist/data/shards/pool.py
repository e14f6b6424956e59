"""Jobs over processes that end with this one."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.workers import fork_server, settle_in, signals_held

J = TypeVar("J")
R = TypeVar("R")


def run_jobs(function: Callable[[J], R], jobs: Sequence[J], workers: int, done: Callable[[J], object]) -> list[R]:
    """`[function(job) for job in jobs]` over `workers` processes (1: in this one); `done(job)` is called after each.

    Raises:
        UserError: a worker died. What `function` raises: at once, after the jobs that were already running.
    """
    if workers == 1 or len(jobs) < 2:
        results = []
        for job in jobs:
            results.append(function(job))
            done(job)
        return results
    context = fork_server(function.__module__)
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=settle_in) as pool:
        with signals_held():
            futures = {pool.submit(function, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                done(futures[future])
        except BrokenProcessPool as error:
            raise UserError("a worker died (out of memory?); re-run the same command to resume") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]
