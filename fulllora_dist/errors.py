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
    lost becomes one line and exit code 1.

    Under a launcher every rank finds the same mistake before the ranks have met: rank 0 speaks for all. Later a
    mistake may be one rank's own, so that rank speaks, with its number.
    """
    try:
        code = main()
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        met = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
        if rank and isinstance(error, SharedUserError):
            time.sleep(1)  # the launcher ends all ranks as soon as one has: rank 0 speaks for all, and first
        elif rank == 0 or met:
            print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # no clean-up that could wait for ranks still in a collective
    except RuntimeError as error:
        from fulllora_dist.distributed.ranks import lost_contact

        line = lost_contact(error)
        if line is None:
            raise
        print(f"error on rank {os.environ.get('RANK', '0')}: {line}", file=sys.stderr, flush=True)
        os._exit(1)
    sys.exit(code or 0)
