"""Worker processes that end when their parent ends or tells them to, and not before.

A scheduler signals every process of a job. A worker (or the fork server) that dies of that takes the main process along
while it is saving; one that outlives a killed main process keeps memory for good. Neither torch nor
concurrent.futures sees to this under a fork server: torch's watchdog asks for a new parent id, which never comes.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext

_MAIN_DECIDES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def fork_server(*preload: str) -> ForkServerContext:
    """The start method for workers. The server imports `preload` once and its forks share it; it takes effect in the
    first call of a process. "__main__" is what every worker would import otherwise."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *preload])
    return context


@contextmanager
def signals_held() -> Iterator[None]:
    """Processes that are started inside begin with the signals of a job blocked, so there is no moment, not even
    while they import, when one can kill them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _MAIN_DECIDES)
    try:
        resource_tracker.ensure_running()  # unblocks SIGINT and SIGTERM when it starts: block once more
        signal.pthread_sigmask(signal.SIG_BLOCK, _MAIN_DECIDES)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def settle_in() -> None:
    """First thing in a worker: obey only the parent, and end when it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "not in a worker"

    def await_end() -> None:
        parent.join()
        os._exit(1)

    def await_order() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
            pass
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=await_end, daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # nothing but sigwaitinfo takes it from here on
        threading.Thread(target=await_order, daemon=True).start()
    else:  # macOS cannot tell who sent it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
