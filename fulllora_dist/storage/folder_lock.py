"""One process at a time in a folder: a lock file with a heartbeat, which holds on NFS, too.

The file `NAME.<number>` says who holds it, and its holder renews its time while it lives. Of several at once one alone
can make it (O_EXCL, on NFS from version 3 on); flock is not needed. Whoever finds that the holder is gone makes the
file of the next number and deletes the old one. A holder is gone

- on the same machine if its process is;
- if it belongs to the same SLURM job before it was requeued;
- elsewhere if the file is not renewed for `STALE_SECONDS`. Times are all the file system's: hosts' clocks may differ.
"""

import contextlib
import json
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

from fulllora_dist.core.errors import UserError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 90.0


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock.

    Attributes:
        host, pid: of the process.
        machine: the host since it booted, and its namespace of process ids, in which `pid` means something.
        started: when the process did, in the machine's own unit.
        job, restart: of SLURM, None and 0 outside of it.
        since: when it took the lock, in seconds since 1970 by the host's clock; for people.
    """

    host: str
    pid: int
    machine: str
    started: str
    job: str | None
    restart: int
    since: float

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            started=_started(os.getpid()) or "",
            job=os.environ.get("SLURM_JOB_ID"),
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            since=time.time(),
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {datetime.fromtimestamp(self.since):%Y-%m-%d %H:%M:%S}"


class FolderLock:
    """The right to write in a folder.

    Args:
        path: of the lock files, without their number, e.g. `output/run.lock`.
        setting: what names the folder, for messages.
        say: prints a line for people.
    """

    def __init__(self, path: Path, setting: str, say: Callable[[str], None]):
        self._path, self._setting, self._say = path, setting, say
        self._held: Path | None = None
        self._released = threading.Event()

    def check(self) -> None:
        """See that no other process holds the lock. Waits for a heartbeat of a holder on another machine; otherwise
        takes no time, and changes nothing.

        Raises:
            UserError: a process holds it; the message names it.
        """
        self._judge(self._files())

    def acquire(self) -> None:
        """Take the lock, and renew it until `release`.

        Raises:
            UserError: another process holds it, or the folder cannot be written; nothing is changed.
        """
        me = Holder.here()
        while True:
            files = self._files()
            gone = self._judge(files)
            number = max(files, default=0) + 1
            mine = self._numbered(number)
            try:
                made = _create(mine, me)
            except OSError as error:
                raise UserError(f"{self._setting}: {self._path.parent}: {error.strerror}") from None
            others = {other: stat for other, stat in self._files().items() if other != number}
            if made and others.items() <= files.items():
                break
            if made:  # others make one, too, having seen another state: neither may win by chance
                mine.unlink(missing_ok=True)
            time.sleep(random.uniform(0.01, 0.1))
        for old in files:
            self._numbered(old).unlink(missing_ok=True)
        if gone is not None:
            self._say(gone)
        self._held = mine
        threading.Thread(target=self._renew, args=(mine, me), name="lock", daemon=True).start()

    def release(self) -> None:
        """Give it back, if this process holds it."""
        self._released.set()
        if self._held is not None:
            with contextlib.suppress(OSError):
                self._held.unlink()
            self._held = None

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _files(self) -> dict[int, tuple[int, int]]:
        """The lock files by their numbers: inode and time, which tell a file from a later one of its name."""
        prefix, files = self._path.name + ".", {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for name in os.listdir(self._path.parent):
                number = name.removeprefix(prefix)
                if name.startswith(prefix) and number.isdecimal():
                    with contextlib.suppress(FileNotFoundError):
                        stat = self._numbered(int(number)).stat()
                        files[int(number)] = stat.st_ino, stat.st_mtime_ns
        return files

    def _judge(self, files: Collection[int]) -> str | None:
        """None without a holder, a line if the newest one is gone.

        Raises:
            UserError: it is not.
        """
        if not files:
            return None
        file = self._numbered(max(files))
        holder = _read(file)
        if holder is None and not file.exists():
            return None
        reason = self._gone(holder, file)
        if reason is not None:
            return f"taking over {self._path.parent} from {holder or file.name}: {reason}"
        if holder is None:
            raise UserError(f"{self._setting}: {self._path.parent} is in use by another process, which {file} is of")
        end = f"scancel {holder.job}" if holder.job else f"kill {holder.pid} on {holder.host}"
        raise UserError(
            f"{self._setting}: {self._path.parent} is in use by {holder}; wait until it ends, stop it ({end}), or "
            "choose another folder"
        )

    def _gone(self, holder: Holder | None, file: Path) -> str | None:
        """Why the holder is no more; None if it is alive."""
        me = Holder.here()
        if holder is not None and holder.job is not None and (holder.job == me.job and holder.restart < me.restart):
            return "SLURM has requeued the job"
        if holder is not None and holder.machine == me.machine:
            return None if _started(holder.pid) == holder.started else "the process is gone"
        try:
            return self._wait_for_heartbeat(holder, file)
        except FileNotFoundError:
            return "it has just ended"
        except OSError as error:
            raise UserError(f"{self._setting}: {self._path.parent}: {error.strerror}") from None

    def _wait_for_heartbeat(self, holder: Holder | None, file: Path) -> str | None:
        renewed = _modified(file)
        age = _now(self._path.parent) - renewed
        watched, told = time.monotonic(), False
        while (silent := age + time.monotonic() - watched) < STALE_SECONDS:
            if not told and time.monotonic() - watched > 1:
                told = True
                self._say(f"{self._path.parent} is held by {holder or file.name}; waiting for a sign of life")
            time.sleep(0.5)
            if _modified(file) != renewed:
                return None
        return f"no heartbeat for {silent:.0f} s"

    def _renew(self, held: Path, me: Holder) -> None:
        """Renew the file while the process lives. If another has taken over, as this one was not heard of for long,
        end at once: both would write."""
        renewed = time.time()  # goes on while the machine sleeps
        while not self._released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a server that does not answer may do so next time
                if not held.exists() and not self._released.is_set():
                    taken = next(filter(None, (_read(self._numbered(number)) for number in self._files())), None)
                    if taken is not None or time.time() - renewed > STALE_SECONDS:
                        by = taken or "another process"
                        line = f"error: {self._path.parent}: taken over by {by}; this process ends without saving\n"
                        os.write(2, line.encode())
                        os._exit(1)
                    _create(held, me)  # somebody tidied up
                os.utime(held)
                renewed = time.time()


def _create(path: Path, holder: Holder) -> bool:
    """Make the file; False if it is there already. Its content comes a moment later."""
    try:
        file = open(path, "x")  # noqa: SIM115
    except FileExistsError:
        return False
    try:
        with file:
            file.write(json.dumps(asdict(holder)) + "\n")
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> Holder | None:
    """None for a file that is gone, or still without its content after half a second."""
    for _ in range(5):
        try:
            return Holder(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            time.sleep(0.1)
    return None


def _modified(path: Path) -> float:
    """Its time of modification; of an opened file, as NFS answers for others from a cache."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime


def _now(folder: Path) -> float:
    """The time by the clock of the folder's file system."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def _machine() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process started; None if there is none. In ticks since boot where /proc says it: unlike a time of day,
    that does not move with the clock."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if os.path.exists("/proc/self/stat"):
        return None
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None
