"""Over which network interface gloo connects the ranks: the one that routes to MASTER_ADDR.

gloo alone takes the address that the host's own name resolves to. On Debian that is 127.0.1.1, where no other host can
connect to it.
"""

import json
import os
import socket
from datetime import timedelta
from ipaddress import ip_address

import psutil
import torch.distributed as dist

from fulllora_dist.core.errors import UserError

_VARIABLE = "GLOO_SOCKET_IFNAME"
_UNANSWERED = timedelta(minutes=5)  # for a rank of another host that asks its own loopback for rank 0


def meet(rank: int, world: int, local: int, patience: timedelta) -> dist.Store:
    """The ranks' key-value store at MASTER_ADDR and MASTER_PORT. Sets GLOO_SOCKET_IFNAME where the user has not.

    Args:
        local: rank on this host.
        patience: timeout of the store.

    Raises:
        UserError: MASTER_ADDR does not resolve, or is a loopback address on the host of another rank than 0; the user's
            GLOO_SOCKET_IFNAME is missing here, or a loopback interface of several hosts.
        DistNetworkError: see torch.
    """
    master = os.environ["MASTER_ADDR"]
    address = _address_towards(master)
    astray = rank != local and _is_loopback(address)  # or a host with the tasks of several nodes
    try:
        store = next(
            dist.rendezvous("env://", rank, world, timeout=min(patience, _UNANSWERED) if astray else patience)
        )[0]
    except dist.DistError:
        if not astray:
            raise
        raise UserError(
            f"MASTER_ADDR: {master} is {address} on {socket.gethostname()}, where rank 0 does not listen; set it to an "
            "address of rank 0's host that the other hosts reach"
        ) from None
    store.set_timeout(patience)
    if world > 1 and (chosen := _chosen(address, _hosts(store, rank, world, address))):
        os.environ[_VARIABLE] = chosen
    return dist.PrefixStore("default_pg", store)


def _hosts(store: dist.Store, rank: int, world: int, address: str) -> list[tuple[str, str]]:
    """(name, address towards MASTER_ADDR) of each host. Rank 0 alone reads what all ranks say."""
    store.set(f"interface/{rank}", json.dumps((socket.gethostname(), address)))
    if rank == 0:
        said = {tuple(json.loads(one)) for one in store.multi_get([f"interface/{other}" for other in range(world)])}
        store.set("interface/hosts", json.dumps(sorted(said)))
    hosts = [(name, towards) for name, towards in json.loads(store.get("interface/hosts"))]
    store.set(f"interface/read/{rank}", "")
    if rank == 0:  # the store is here, and ends with this rank where it is refused
        store.wait([f"interface/read/{other}" for other in range(world)])
    return hosts


def _chosen(address: str, hosts: list[tuple[str, str]]) -> str:
    """The value of GLOO_SOCKET_IFNAME on this host.

    Args:
        address: of this host towards MASTER_ADDR.
    """
    known = psutil.net_if_addrs()
    given = os.environ.get(_VARIABLE, "")
    for name in filter(None, given.split(",")):
        if name not in known:
            raise UserError(f"{_VARIABLE}: {socket.gethostname()} has no interface {name!r}; it has {', '.join(known)}")
    outside = [towards for _, towards in hosts if not _is_loopback(towards)]
    if not given and len(hosts) > 1 and _is_loopback(address) and outside:  # rank 0's own name, on Debian
        address = _address_towards(outside[0])
    names = given.split(",") if given else [name for name, own in known.items() if address in map(_bare, own)]
    loopback = [name for name in names if any(_is_ip(own) and _is_loopback(_bare(own)) for own in known[name])]
    if len(hosts) > 1 and (loopback or not names):
        shown = f"{loopback[0]} is a loopback interface" if loopback else f"no interface of this host has {address}"
        where = ", ".join(sorted({host for host, _ in hosts})[:3])
        raise UserError(
            f"{_VARIABLE}: {shown}, but the ranks run on several hosts ({where}); set it to the interface that "
            "connects them, such as eth0, or MASTER_ADDR to an address of that one"
        )
    return ",".join(names)


def _is_ip(own: "psutil._ntuples.snicaddr") -> bool:
    return own.family in (socket.AF_INET, socket.AF_INET6)


def _bare(own: "psutil._ntuples.snicaddr") -> str:
    return own.address.partition("%")[0]  # the scope of an IPv6 address


def _is_loopback(address: str) -> bool:
    return ip_address(address).is_loopback


def _address_towards(host: str) -> str:
    """The address of this host from which it reaches another one. Sends nothing."""
    try:
        kind, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR: {host} is not reached from {socket.gethostname()} ({error.strerror or error}); set it to an "
            "address of rank 0's host that the other hosts reach"
        ) from None
