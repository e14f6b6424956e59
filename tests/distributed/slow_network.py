"""Ranks on a network as slow as a test wants: each in a network namespace of its own, with a tun device whose packets a
switch in the test's process delays. Needs root and /dev/net/tun, but neither netem nor a bridge."""

import ctypes
import fcntl
import heapq
import os
import select
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
MTU = 9000


def unavailable() -> str | None:
    """Why there are no such networks here; None if there are."""
    if os.geteuid():
        return "a network namespace needs root"
    if not os.path.exists("/dev/net/tun"):
        return "no /dev/net/tun"
    probe = "unshare --net sh -c 'ip tuntap add mode tun name probe0 && ip link set lo up'"
    done = subprocess.run(probe, shell=True, capture_output=True, text=True)
    return None if done.returncode == 0 else f"no network namespaces: {done.stderr.strip()}"


class Switch:
    """Passes packets between the ranks that have joined, each `delay` seconds late and at most `rate` bytes a second
    from each of them. Use as a context manager.

    Args:
        address: path of its unix socket.
    """

    def __init__(self, address: Path, delay: float, rate: float):
        self._delay, self._rate = delay, rate
        self._ports: dict[int, int] = {}  # last byte of the address -> descriptor
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen()
        self._ends = False
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "Switch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends = True
        self._thread.join()
        self._listener.close()
        for port in self._ports.values():
            os.close(port)

    def _serve(self) -> None:
        late: list[tuple[float, int, int, bytes]] = []
        free: dict[int, float] = {}
        number = 0
        while not self._ends:
            wait = min(0.05, max(0.0, late[0][0] - time.monotonic())) if late else 0.05
            for ready in select.select([self._listener, *self._ports.values()], [], [], wait)[0]:
                if ready is self._listener:
                    connection, _ = self._listener.accept()
                    host, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
                    self._ports[host[0]] = descriptors[0]
                    connection.sendall(b"!")
                    connection.close()
                    continue
                packet = os.read(ready, 1 << 16)
                if packet[0] >> 4 == 4 and packet[19] in self._ports:
                    sent = free[ready] = max(free.get(ready, 0.0), time.monotonic()) + len(packet) / self._rate
                    number += 1
                    heapq.heappush(late, (sent + self._delay, number, self._ports[packet[19]], packet))
            while late and late[0][0] <= time.monotonic():
                *_, port, packet = heapq.heappop(late)
                os.write(port, packet)


def join(address: Path, rank: int) -> None:
    """Move the calling thread to a network of its own, on the switch. Process groups made from now on are there."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", b"tun0", IFF_TUN | IFF_NO_PI))
    host = rank + 1
    for command in (
        "ip link set lo up",
        f"ip addr add 10.78.0.{host}/24 dev tun0",
        f"ip link set tun0 mtu {MTU} txqueuelen 10000 up",
    ):
        subprocess.run(command.split(), check=True)
    Path("/proc/thread-self/net")  # the settings below are the namespace's
    Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").write_text("0")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(address))
        socket.send_fds(connection, [bytes([host])], [tun])
        connection.recv(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "tun0"
