"""A SLURM cluster on loopback: Debian's munged, slurmdbd with MariaDB, slurmctld and a slurmd for each virtual node.

`python tests/services/slurm.py COMMAND ...` runs a command in a fresh one, e.g. `bash` for a look around. All state is
in a temporary folder that SLURM_CONF names; nothing is left of it in the end, root is not needed but for the packages:
`python tests/services/slurm.py --install`.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurmdbd", "munge", "mariadb-server")
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db", "sbatch")
NODES = 2
CPUS, MEMORY = 8, 1000  # that each node claims to have, in MB
GRACE = 30
"""Seconds between the signal of a preemption and its end."""
_SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class NoSlurm(Exception):
    """The cluster cannot start here; the message says why."""


def install() -> None:
    """Debian's packages, without the daemons that they would start for the whole machine."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", "-qq", *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    finally:
        if ours:
            policy.unlink()


class Cluster:
    """A running cluster. Partition `main` is the default and gives way to `high`; a preempted job is requeued.

    Attributes:
        environment: what a client needs to reach it.
        nodes: their names.
        folder: configuration, state and logs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        # names that resolve to loopback wherever we are: rank 0's node is where the other ranks look for it
        self.nodes = [f"127.0.0.{i + 1}" for i in range(NODES)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _SEARCH}
        self._started: list[subprocess.Popen] = []

    def run(self, *command: str) -> str:
        """The output of a SLURM command.

        Raises:
            CalledProcessError: it failed.
        """
        done = subprocess.run(
            command, env=os.environ | self.environment, check=True, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip()

    def reconfigure(self, old: str, new: str) -> None:
        """Change slurm.conf of the running cluster."""
        path = self.folder / "slurm.conf"
        assert old in path.read_text(), old
        path.write_text(path.read_text().replace(old, new))
        self.run("scontrol", "reconfigure")

    def start(self) -> None:
        """Raises:
        NoSlurm: a daemon does not come up.
        """
        folder, socket_path = self.folder, self.folder / "munge.socket"
        for name in ("state", "spool", "log"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(64))
        paths = {"key-file": key, "socket": socket_path, "pid-file": folder / "munged.pid"}
        paths |= {"log-file": folder / "log" / "munged.log", "seed-file": folder / "munge.seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in paths.items()))
        self._await("munged", lambda: self._fine("munge", "-S", str(socket_path), "-n"))
        from fulllora_dist.distributed.comm import free_port  # --install and --help need nothing but Python

        database, dbd, *ports = (free_port() for _ in range(NODES + 3))
        self._configure(socket_path, dbd, ports)
        self._start_accounting(socket_path, database, dbd)
        self._daemon("slurmctld", "-D", "-c")
        self._await("slurmctld", lambda: " is UP" in self._said("scontrol", "ping"))
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-N", node)
        self._await("slurmd", lambda: self._said("sinfo", "-h", "-N", "-p", "main").count("idle") == NODES)

    def stop(self) -> None:
        """End the jobs, then the daemons, the last one first."""
        self._said("scancel", "--user", getpass.getuser())
        deadline = time.monotonic() + 20
        while self._said("squeue", "-h", "-t", "running,completing") and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self._started):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in Path("/proc").glob("[0-9]*"):  # a slurmstepd outlives its slurmd
            try:
                if os.readlink(process / "cwd").startswith(str(self.folder)):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:
                continue

    def _daemon(self, *command: str) -> None:
        with open(self.folder / "log" / f"{len(self._started)}_{command[0]}.out", "w") as log:
            self._started.append(
                subprocess.Popen(
                    command,
                    env=os.environ | self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a Ctrl-C is for the tests: they end it in order
                )
            )

    def _await(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            if time.monotonic() > deadline or self._started[-1].poll() is not None:
                log = next((self.folder / "log").glob(f"*{what}.out")).read_text()[-500:]
                raise NoSlurm(f"{what} does not come up: {' '.join(log.split())}")
            time.sleep(0.1)

    def _said(self, *command: str) -> str:
        try:
            return self.run(*command)
        except (OSError, subprocess.SubprocessError):
            return ""

    def _fine(self, *command: str) -> bool:
        return bool(self._said(*command))

    def _configure(self, munge: Path, dbd: int, ports: Sequence[int]) -> None:
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        # cred_expire: how long a requeued job waits for its next start. FirstJobId: submitit takes jobs by their number
        text = f"""
            ClusterName=test
            SlurmctldHost={host}(127.0.0.1)
            SlurmctldPort={ports[0]}
            SlurmUser={getpass.getuser()}
            SlurmdUser={getpass.getuser()}
            AuthType=auth/munge
            AuthInfo=socket={munge},cred_expire=5
            StateSaveLocation={folder}/state
            SlurmdSpoolDir={folder}/spool/%n
            SlurmctldPidFile={folder}/slurmctld.pid
            SlurmdPidFile={folder}/slurmd.%n.pid
            SlurmctldLogFile={folder}/log/slurmctld.log
            SlurmdLogFile={folder}/log/slurmd.%n.log
            CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            SelectType=select/cons_tres
            SelectTypeParameters=CR_Core
            JobAcctGatherType=jobacct_gather/none
            SlurmdParameters=config_overrides
            ReturnToService=2
            FirstJobId={int(time.time()) % 60_000_000}
            KillWait=10
            SchedulerParameters=sched_interval=2,sched_min_interval=50000,batch_sched_delay=0,bf_interval=2
            PreemptType=preempt/partition_prio
            PreemptMode=REQUEUE
            SlurmctldParameters=preempt_send_user_signal
            AccountingStorageType=accounting_storage/slurmdbd
            AccountingStorageHost=127.0.0.1
            AccountingStoragePort={dbd}
            AccountingStoragePass={munge}
            PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime={GRACE}
            PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
            """
        for name, port in zip(self.nodes, ports[1:], strict=True):
            text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            text += f"CPUs={CPUS} RealMemory={MEMORY} State=UNKNOWN\n"
        (folder / "slurm.conf").write_text("\n".join(line.strip() for line in text.strip().splitlines()) + "\n")
        version = tuple(int(part) for part in self.run("sinfo", "--version").split()[-1].split(".")[:2])
        if version >= (23, 11):  # which load a plugin for cgroups unless told not to; older ones do not know the word
            (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")

    def _start_accounting(self, munge: Path, database: int, dbd: int) -> None:
        folder, user = self.folder, getpass.getuser()
        here = ["--no-defaults", f"--user={user}", f"--datadir={folder}/db"]
        by_socket = ["--auth-root-authentication-method=socket", f"--auth-root-socket-user={user}", "--skip-test-db"]
        if not self._fine("mariadb-install-db", *here, *by_socket):
            raise NoSlurm("mariadb-install-db failed")
        server = [f"--socket={folder}/db.socket", "--bind-address=127.0.0.1", f"--port={database}", "--skip-log-bin"]
        small = ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-lock-wait-timeout=900"]
        self._daemon("mariadbd", *here, *server, *small, "--skip-name-resolve")
        sql = ["mariadb", "--no-defaults", f"--socket={folder}/db.socket", "--user", user, "--execute"]
        self._await("mariadbd", lambda: self._fine(*sql, "select 1"))
        password = os.urandom(12).hex()
        self.run(*sql, f"create user slurm@127.0.0.1 identified by '{password}'")
        self.run(*sql, "grant all on slurm_acct_db.* to slurm@127.0.0.1")
        settings = {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={munge}",
            "DbdHost": socket.gethostname().partition(".")[0],
            "DbdAddr": "127.0.0.1",
            "DbdPort": dbd,
            "SlurmUser": user,
            "CommunicationParameters": "NoInAddrAny",
            "LogFile": f"{folder}/log/slurmdbd.log",
            "PidFile": f"{folder}/slurmdbd.pid",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "127.0.0.1",
            "StoragePort": database,
            "StorageUser": "slurm",
            "StoragePass": password,
        }
        path = folder / "slurmdbd.conf"
        path.touch(mode=0o600)
        path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        self._daemon("slurmdbd", "-D")
        self._await("slurmdbd", lambda: self._fine("sacctmgr", "-i", "add", "cluster", "test"))


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """A cluster while it is entered.

    Raises:
        NoSlurm: it cannot start here.
    """
    missing = [program for program in PROGRAMS if shutil.which(program, path=_SEARCH) is None]
    if missing:
        raise NoSlurm(f"{', '.join(missing)} not installed; as root: python tests/services/slurm.py --install")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main(command: Sequence[str]) -> int:
    """Run `command` in a cluster, or install what one needs."""
    if list(command) == ["--install"]:
        install()
        return 0
    with slurm_cluster() as cluster:
        return subprocess.run(command, env=os.environ | cluster.environment, check=False).returncode


if __name__ == "__main__":
    if sys.argv[1:2] in ([], ["--help"], ["-h"]):
        sys.exit(__doc__)
    try:
        sys.exit(main(sys.argv[1:]))
    except NoSlurm as reason:
        sys.exit(f"error: {reason}")
