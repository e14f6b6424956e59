"""Entry points of commands: exit codes and one-line error messages."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fulllora_dist.distributed.failures import exit_answer


@contextmanager
def on_interrupt(kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C inside says what is `kept` and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept()) from None


def run_entry(main: Callable[[], int | None]) -> None:
    """Run an entry point. A `UserError` prints one line to stderr without a traceback and exits with code 2; a lost
    rank prints one line and exits with code 1, Ctrl-C with code 130.

    Under a launcher all ranks hit the same error before the process group is set up, so that only rank 0 prints it.
    Later an error may be of a single rank, which then prints it with its number.
    """
    try:
        code = main()
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr, flush=True)
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
