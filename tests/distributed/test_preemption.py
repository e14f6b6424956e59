"""What a process does with the signals of a scheduler, a launcher and a person."""

import ctypes
import os
import signal
import time
from collections.abc import Callable

import pytest

from fulllora_dist.distributed.signals import ECHO_SECONDS, SIGNALS, GracefulStop


def _child(work: Callable[[GracefulStop, Callable[[], None]], None]) -> int:
    """Forks a process that does work(stop, up) with the handlers in place, and waits until it calls `up`."""
    up, told = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with GracefulStop() as stop:
                work(stop, lambda: os.write(told, b".") and None)
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        finally:
            os._exit(code)
    os.read(up, 1)
    os.close(up)
    os.close(told)
    return child


def _code(child: int, within: float = 10.0) -> int:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("it does not end")


def _stuck(stop: GracefulStop, up: Callable[[], None]) -> None:
    """The main thread is away in C, as in a collective whose other ranks do not come."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    with stop.deferred():
        libc.pthread_mutex_lock(mutex)
        up()
        libc.pthread_mutex_lock(mutex)


def _loop(stop: GracefulStop, up: Callable[[], None]) -> None:
    with stop.deferred():
        up()
        while stop.signal is None:
            time.sleep(0.02)
        time.sleep(0.3)  # the step
    os._exit(100 + stop.signal)  # not what leaving at once gives


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_until_the_step_ends(number: signal.Signals) -> None:
    child = _child(_loop)
    os.kill(child, number)
    os.kill(child, number)  # the launcher's copy
    assert _code(child) == 100 + number


def _starting(stop: GracefulStop, up: Callable[[], None]) -> None:
    up()
    time.sleep(30)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_loop_it_ends_at_once(number: signal.Signals) -> None:
    child = _child(_starting)
    os.kill(child, number)
    assert _code(child) == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_ends_it_whatever_it_waits_for(number: signal.Signals) -> None:
    child = _child(_stuck)
    for _ in range(3):
        os.kill(child, number)
        time.sleep(0.05)
    other = signal.SIGTERM if number != signal.SIGTERM else signal.SIGUSR2
    time.sleep(ECHO_SECONDS + 0.1)
    os.kill(child, other)  # SLURM warns with one signal and ends with another: that is the first of its kind
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, number)
    assert _code(child, 3) == 128 + number


def test_handlers_from_before_come_back() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    with GracefulStop():
        assert signal.getsignal(signal.SIGUSR1) != before[signal.SIGUSR1]
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    assert signal.set_wakeup_fd(wakeup) == wakeup
