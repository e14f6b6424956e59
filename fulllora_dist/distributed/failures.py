"""What an exception means for this rank: the line it prints, and its exit code."""

import os
import re
import socket
import sys
import time

import psutil

from fulllora_dist.core.errors import SharedUserError, UserError


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
        line = lost_contact(error)
        if line is not None:
            return f"error on rank {rank}: {line}", 1
    return None


# what gloo says, in a plain RuntimeError, when another rank has gone or does not come
_LOST = re.compile(
    r"(Connection closed by peer \S+\d|Connection reset by peer|Timed out waiting \d+ms|Application timeout)"
)


def lost_contact(error: BaseException) -> str | None:
    """One line where `error` means that another rank is gone or does not answer; which, if it ran on this machine."""
    import torch.distributed as dist  # every command imports this file, also those that need no torch

    from fulllora_dist.distributed.comm import processes

    reason = _LOST.search(str(error))
    if reason is None and not isinstance(error, dist.DistError):
        return None
    ended = [rank for rank, (host, pid) in enumerate(processes()) if host == socket.gethostname() and not _lives(pid)]
    which = f"rank {', '.join(map(str, ended))} has died" if ended else "another rank has died or does not answer"
    said = reason[1] if reason else str(error).split("\n")[0][:200]
    return f"{which} ({said}); re-run the same command to resume from the newest checkpoint"


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
