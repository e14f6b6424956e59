"""The one exception that users cause, and how an entry point answers it."""

import os
import sys
import time
from collections.abc import Callable


class UserError(ValueError):
    """Bad input. The message is one line that names the setting or file and says what would be right."""


class SharedUserError(UserError):
    """One that every rank finds at the same moment, after they have met."""


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


def exit_answer(error: Exception) -> tuple[str | None, int] | None:
    """How an entry point ends by an exception: the line for stderr, None where another rank says it, and the exit code.
    None for one that deserves its traceback."""
    rank = int(os.environ.get("RANK", "0"))
    if isinstance(error, UserError):
        met = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
        if rank and isinstance(error, SharedUserError):
            time.sleep(1)  # the launcher ends all ranks as soon as one has: rank 0 speaks for all, and first
        elif rank == 0 or met:
            return (f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}"), 2
        return None, 2
    if isinstance(error, RuntimeError):
        from fulllora_dist.distributed.ranks import lost_contact

        line = lost_contact(error)
        if line is not None:
            return f"error on rank {rank}: {line}", 1
    return None
