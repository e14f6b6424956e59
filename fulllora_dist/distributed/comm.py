"""Communication between the ranks of a run: rank, device, and the few collectives outside the engine."""

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.distributed.interface import meet
from fulllora_dist.distributed.launcher import ranks
from fulllora_dist.models.precision import convolve_in_full_fp32

T = TypeVar("T")

FLIGHT_RECORDS = "TORCH_FR_DUMP_TEMP_FILE"  # environment variable: path of torch's flight records, less the rank

# (host, process id) of every rank, to name the one that died; empty before the process group is set up
_processes: list[tuple[str, int]] = []


class Counters:
    """Named integer counters shared by all ranks, initially 0.

    Args:
        store: key-value store of the ranks; None for a single rank.
    """

    def __init__(self, store: dist.Store | None):
        self._store = store
        self._own: dict[str, int] = {}

    def add(self, name: str, amount: int) -> int:
        """Atomically add `amount` and return the result."""
        if self._store is not None:
            return self._store.add(name, amount)
        self._own[name] = self._own.get(name, 0) + amount
        return self._own[name]


@dataclass(frozen=True)
class Comm:
    """The position of this process among the ranks, and collectives over them.

    Attributes:
        rank, world: global rank and number of ranks.
        device: the device of the model.
        control: a gloo group for small host-side messages, without GPU synchronisation.
        patience: timeout of collectives.
    """

    rank: int
    world: int
    device: torch.device
    control: Any
    patience: timedelta = timedelta(minutes=30)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def max_each(self, numbers: Sequence[int]) -> list[int]:
        """The element-wise maximum over all ranks. One collective."""
        return self.start_max_each(numbers)()

    def start_max_each(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Start a `max_each` and return at once; the returned function waits for its result. What the ranks do until
        then hides the time that it takes."""
        vote = torch.tensor(numbers, dtype=torch.int64)
        if self.world == 1:
            return vote.tolist
        work = dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def result() -> list[int]:
            work.wait()
            return vote.tolist()

        return result

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on the host; exact for integers."""
        values = values.detach().cpu().clone()
        if self.world > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def gather(self, value: torch.Tensor) -> list[torch.Tensor] | None:
        """Gather host tensors of equal shape in rank order; None on all ranks but rank 0."""
        value = value.detach().cpu().contiguous()
        if self.world == 1:
            return [value]
        parts = [torch.empty_like(value) for _ in range(self.world)] if self.is_main else None
        dist.gather(value, parts, group=self.control)
        return parts

    def all_gather_list(self, items: list[Any]) -> list[Any]:
        """The items of all ranks in rank order, on every rank. Cheap if all lists are empty."""
        if self.world == 1 or not self.max_each([len(items)])[0]:
            return list(items)
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, items, group=self.control)
        return [item for part in parts for item in part]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def broadcast_tensors(self, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Rank 0's host tensors on every rank."""
        if self.world == 1:
            return tensors or {}
        shapes = self.broadcast({name: (t.shape, t.dtype) for name, t in (tensors or {}).items()})
        received = tensors or {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        for name in shapes:
            received[name] = received[name].contiguous()
            dist.broadcast(received[name], src=0, group=self.control)
        return received

    def run_on_rank0(self, call: Callable[[], T], failing: str = "") -> T | None:
        """Return `call()` on rank 0; the other ranks wait and get None.

        Args:
            failing: prefix of the message if it fails with an OSError.

        Raises:
            SharedUserError: on every rank, if `call` raises a UserError or an OSError.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = call()
            except UserError as reason:
                error = str(reason)
            except OSError as reason:
                error = f"{failing} ({reason.strerror or reason})"
        error = self.broadcast(error)
        if error is not None:
            raise SharedUserError(error)
        return result

    def run_on_all(self, call: Callable[[], T]) -> T:
        """Return `call()`, which is the same work on every rank, so that bad input is said once.

        Raises:
            SharedUserError: on every rank, if `call` raises a UserError on any; the message is that of the first.
        """
        reason, result = None, None
        try:
            result = call()
        except UserError as error:
            reason = str(error)
        reasons = self.all_gather_list([reason])
        failed = [f"on rank {rank}: {text}" if rank else text for rank, text in enumerate(reasons) if text is not None]
        if failed:
            raise SharedUserError(failed[0])
        return cast(T, result)

    def limit_waiting(self, patience: timedelta | None = None) -> None:
        """Apply `patience`, if not given this one's, to the collectives of all process groups from now on: DeepSpeed
        creates its own with torch's default timeout."""
        groups = dist.distributed_c10d
        set_timeout = getattr(groups, "set_timeout", None) or groups._set_pg_timeout
        for group in groups._world.pg_map:
            set_timeout(patience or self.patience, group)

    def counters(self) -> Counters:
        """Create new counters at zero. Rank 0 serves them, so it must not exit before all ranks are done counting."""
        if self.world == 1:
            return Counters(None)
        host = os.environ["MASTER_ADDR"]  # of rank 0
        options: dict[str, Any] = {"timeout": self.patience, "wait_for_workers": False}
        served = dist.TCPStore(host, 0, is_master=True, **options) if self.is_main else None
        port = self.broadcast(served and served.port)
        return Counters(served or dist.TCPStore(host, port, is_master=False, **options))

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)


def processes() -> list[tuple[str, int]]:
    """(host, process id) of every rank; empty before `start_comm`."""
    return _processes


def hosts() -> list[str]:
    """The host of every rank; only this one before `start_comm`."""
    return [host for host, _ in _processes] or [socket.gethostname()]


def start_comm(timeout_minutes: float | None = None, recorder: str | None = None) -> Comm:
    """Join the ranks that the launcher started, or run as the only one under plain `python`.

    Uses NCCL with one GPU per local rank, or gloo without GPUs. Call once per process.

    Args:
        timeout_minutes: timeout of collectives; 30 if None.
        recorder: the path, less the rank, to which NCCL's flight recorder writes the newest collectives of each rank
            when one of them has timed out.

    Raises:
        UserError: the launcher's variables are incomplete, its port is in use, the hosts do not reach each other
            (`interface.meet`), or there are more local ranks than GPUs.
    """
    rank, world, local = ranks()
    if rank >= world:
        raise UserError(f"RANK must be >= 0 and < WORLD_SIZE={world}, got {rank}; start with `deepspeed` or `torchrun`")
    if world > 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise UserError("MASTER_ADDR and MASTER_PORT are not set, but WORLD_SIZE is over 1; start with `deepspeed`")
    port = os.environ.get("MASTER_PORT", "29500")
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT: must be a port such as 29500, got {port!r}")
    patience = timedelta(minutes=timeout_minutes or 30)
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        convolve_in_full_fp32()  # else the patch embedding's fp32 convolution keeps 10 bits
        visible = torch.cuda.device_count()
        if "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
            local = 0  # a scheduler shows each task only its own GPU
        if local >= visible:
            raise UserError(
                f"LOCAL_RANK must be below the number of visible GPUs ({visible}), got {local}; "
                "start fewer ranks per node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local)}
        backend = "nccl" if device.type == "cuda" else "gloo"
        if recorder is not None and world > 1:
            _record_collectives(recorder)
        try:
            # one plain process needs no port, and leaves no address behind for what it starts
            store = meet(rank, world, local, patience) if "MASTER_ADDR" in os.environ else dist.HashStore()
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(_port_in_use()) from None
    control: Any = dist.new_group(backend="gloo", timeout=patience) if device.type == "cuda" else dist.group.WORLD
    _processes[:] = [(socket.gethostname(), os.getpid())] * world
    if world > 1:
        dist.all_gather_object(_processes, _processes[rank], group=control)
    return Comm(rank, world, device, control, patience)


def _record_collectives(path: str) -> None:
    """Switch on torch's flight recorder, but for what the user's variables say."""
    older = {"TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE", FLIGHT_RECORDS: "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"}
    wanted = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1", FLIGHT_RECORDS: path}
    for name, value in wanted.items():
        if older.get(name, name) not in os.environ:
            os.environ.setdefault(name, value)


def _port_in_use() -> str:
    port = os.environ["MASTER_PORT"]
    line = f"MASTER_PORT: port {port} of {socket.gethostname()} is in use by another program, such as another run"
    if "SUBMITIT_EXECUTOR" in os.environ:
        return f"{line}; it follows from the job's number, so launch again for another one"
    return f"{line}; choose another one: deepspeed --master_port N, torchrun --master-port N"


def stop_comm() -> None:
    """Leave the process group, so that no rank waits for this one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A free TCP port of 127.0.0.1, below the ephemeral range, so that a rank's connections do not take it before it is
    used."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def local_launcher(ranks: int) -> list[str]:
    """The command prefix that runs a script on `ranks` ranks of this machine, on a free port."""
    if ranks == 1:
        return [sys.executable]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    return [str(deepspeed), "--num_gpus", str(ranks), "--master_port", str(free_port())]
