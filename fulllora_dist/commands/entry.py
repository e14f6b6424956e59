"""How a command ends: exit codes, and one line for bad input."""

import os
import sys
from collections.abc import Callable

from fulllora_dist.distributed.failures import exit_answer


def run_entry(main: Callable[[], int | None]) -> None:
    """Run an entry point: a `UserError` becomes one line on stderr and exit code 2, without a traceback; a rank that is
    lost becomes one line and exit code 1, Ctrl-C one line and exit code 130.

    Under a launcher every rank finds the same mistake before the ranks have met: rank 0 speaks for all. Later a
    mistake may be one rank's own, so that rank speaks, with its number.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
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
        os._exit(code)  # no clean-up that could wait for ranks still in a collective
    sys.exit(code or 0)
