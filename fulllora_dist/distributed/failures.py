"""How an exception ends a rank: the line to print and the exit code."""

import errno
import os
import re
import socket
import sys
import time

import psutil

from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.core.messages import redacted

_DISK = {errno.ENOSPC, errno.EDQUOT}
_PATHS = {errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EROFS}
"""Of what only whoever starts the command can mend."""


def exit_answer(error: Exception) -> tuple[str | None, int] | None:
    """The line for stderr and the exit code with which an entry point answers an exception.

    The line is None if another rank prints it; the result is None if the exception should print its traceback."""
    rank = int(os.environ.get("RANK", "0"))
    if isinstance(error, UserError):
        initialized = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
        if rank and isinstance(error, SharedUserError):
            time.sleep(1)  # the launcher kills all ranks once one exits, so rank 0 must print the message first
        elif rank == 0 or initialized:
            return (f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}"), 2
        return None, 2
    if isinstance(error, OSError) and error.errno in _DISK | _PATHS:
        where = f"{redacted(error.filename)}: " if error.filename else ""
        full = "; free space and re-run the same command" if error.errno in _DISK else ""
        return f"error{f' on rank {rank}' if rank else ''}: {where}{error.strerror}{full}", 1 if full else 2
    if isinstance(error, RuntimeError):
        line = lost_contact(error)
        if line is not None:
            return f"error on rank {rank}: {line}", 1
    return None


# messages of gloo, in a plain RuntimeError, when another rank is gone or does not respond
_LOST = re.compile(
    r"(Connection closed by peer \S+\d|Connection reset by peer|Timed out waiting \d+ms|Application timeout)"
)


def lost_contact(error: BaseException) -> str | None:
    """One line if `error` means that another rank is gone or does not answer, else None; names it if it ran on this
    machine."""
    import torch.distributed as dist  # deferred: every command imports this file, also those that do not need torch

    from fulllora_dist.distributed.comm import processes
    from fulllora_dist.distributed.watchdog import named

    reason = _LOST.search(str(error))
    if reason is None and not isinstance(error, dist.DistError):
        return None
    ended = [rank for rank, (host, pid) in enumerate(processes()) if host == socket.gethostname() and not _lives(pid)]
    known = named() or "another rank has died or does not answer"
    which = f"rank {', '.join(map(str, ended))} has died" if ended else known
    cause = reason[1] if reason else str(error).split("\n")[0][:200]
    return f"{which} ({cause}); re-run the same command to resume from the newest checkpoint"


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
