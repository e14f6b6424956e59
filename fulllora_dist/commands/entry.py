"""Entry points of commands: exit codes and one-line error messages."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fulllora_dist.distributed.failures import exit_answer
from fulllora_dist.distributed.launcher import is_main_process


class _Told(KeyboardInterrupt):
    """Ctrl-C whose line is printed already."""


@contextmanager
def on_interrupt(kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C inside says at once what is kept and how to go on, and ends the command when what was under way is
    cleared up; a second one does not wait for that."""

    def tell(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if is_main_process():
            print(f"interrupted: {kept()}", file=sys.stderr, flush=True)
        raise _Told

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # a job's, which also knows about requeuing
        yield
        return
    signal.signal(signal.SIGINT, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_entry(main: Callable[[], int | None]) -> None:
    """Run an entry point. A `UserError` prints one line to stderr without a traceback and exits with code 2; a lost
    rank prints one line and exits with code 1, Ctrl-C with code 130.

    Under a launcher all ranks hit the same error before the process group is set up, so that only rank 0 prints it.
    Later an error may be of a single rank, which then prints it with its number.
    """
    try:
        code = main()
    except KeyboardInterrupt as interrupt:
        if is_main_process() and not isinstance(interrupt, _Told):
            print("interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)
    except Exception as error:
        answer = exit_answer(error)
        if answer is None:
            raise
        line, code = answer
        if line is not None:
            print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)  # skips clean-up, which could wait for ranks still in a collective
    sys.exit(code or 0)
