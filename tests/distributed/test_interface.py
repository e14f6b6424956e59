"""Ranks of two hosts that have addresses of their own: two network namespaces, and a cable between them."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.interface import meet

RANK = """
import json, os, sys, torch
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.comm import start_comm

def refused(port, minutes=1, **names):
    os.environ.update(names, MASTER_PORT=port)
    try:
        start_comm(minutes)
    except UserError as error:
        return str(error)

said = [refused("29601", GLOO_SOCKET_IFNAME="lo")]
os.environ.pop("GLOO_SOCKET_IFNAME")
if os.environ["RANK"] == "1":
    said.append(refused("29602", 0.03, MASTER_ADDR="127.0.0.1"))
os.environ.update(MASTER_ADDR="node0", MASTER_PORT="29603")
comm = start_comm(1)
total = comm.sum(torch.tensor([comm.rank + 1.0])).item()
comm.barrier()
print(json.dumps([said, os.environ["GLOO_SOCKET_IFNAME"], total]))
"""


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two, as hosts node0 and node1; each takes its own name for 127.0.1.1, as Debian does."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    tag = secrets.token_hex(2)
    names = [f"host{i}-{tag}" for i in (0, 1)]
    folders = [Path("/etc/netns", name) for name in names]

    def ip(command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)

    try:
        for i, (name, folder) in enumerate(zip(names, folders, strict=True)):
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 node{i}\n10.77.0.{2 - i} node{1 - i}\n")
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
        ip(f"link add cable0 netns {names[0]} type veth peer name cable1 netns {names[1]}")
        for i, name in enumerate(names):
            ip(f"-n {name} addr add 10.77.0.{i + 1}/24 dev cable{i}")
            ip(f"-n {name} link set cable{i} up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    finally:
        for name, folder in zip(names, folders, strict=True):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


def test_ranks_of_two_hosts_meet_on_the_interface_between_them(namespaces: list[str]) -> None:
    processes = []
    for rank, name in enumerate(namespaces):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node0"}
        command = ["unshare", "--uts", "sh", "-c", f'hostname node{rank}; exec "$@"', "-", sys.executable, "-c", RANK]
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        outputs = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    for rank, (out, _) in enumerate(outputs):
        said, interface, total = json.loads(out.splitlines()[-1])
        assert total == 3.0
        assert interface == f"cable{rank}"
        assert said[0].startswith(
            "GLOO_SOCKET_IFNAME: lo is a loopback interface, but the ranks run on several hosts (node0, node1); set it "
        )
        assert (
            said[1:]
            == [
                "MASTER_ADDR: 127.0.0.1 is 127.0.0.1 on node1, where rank 0 does not listen; set it to an address of "
                "rank 0's host that the other hosts reach"
            ]
            * rank
        )


def test_a_master_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(UserError, match=r"^MASTER_ADDR: no-such-host\.invalid is not reached from \S+ \("):
        meet(0, 2, 0, timedelta(seconds=5))
