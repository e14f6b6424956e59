"""This process among the others of the run: rank, device, and the few collectives that are not the engine's."""

import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fulllora_dist.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """Where this process stands.

    Attributes:
        rank, world: of this process, over all nodes.
        device: where the model lives.
        control: a gloo group for small host-side messages, which costs no synchronisation with the GPU.
    """

    rank: int
    world: int
    device: torch.device
    control: Any

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def max(self, number: int) -> int:
        """The largest number that any rank has. Every rank must ask."""
        if self.world == 1:
            return number
        vote = torch.tensor([number])
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.control)
        return int(vote.item())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on the host; exact for integers."""
        values = values.detach().cpu().clone()
        if self.world > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def gather(self, value: torch.Tensor) -> list[torch.Tensor] | None:
        """Equally shaped host tensors of all ranks in rank order, on rank 0 alone."""
        value = value.detach().cpu().contiguous()
        if self.world == 1:
            return [value]
        parts = [torch.empty_like(value) for _ in range(self.world)] if self.is_main else None
        dist.gather(value, parts, group=self.control)
        return parts

    def union(self, items: list[Any]) -> list[Any]:
        """The items of all ranks in rank order, on every rank. Cheap where there are none."""
        if self.world == 1 or not self.max(len(items)):
            return list(items)
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, items, group=self.control)
        return [item for part in parts for item in part]

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)


def is_main_process() -> bool:
    """Whether this is rank 0, also before the ranks have met."""
    return int(os.environ.get("RANK", "0")) == 0


def start_ranks() -> Ranks:
    """Join the ranks that the launcher started, or be the only one under plain `python`.

    NCCL where there are GPUs (one a local rank), else gloo. Call once a process.

    Raises:
        UserError: the launcher's variables are incomplete, or there are more local ranks than GPUs.
    """
    try:
        rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK: {error}; a launcher sets them to integers") from None
    if world > 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise UserError("MASTER_ADDR and MASTER_PORT are not set, but WORLD_SIZE is over 1; start with `deepspeed`")
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        torch.backends.cudnn.allow_tf32 = False  # else the patch embedding's fp32 convolution keeps 10 bits
        visible = torch.cuda.device_count()
        local = local if visible > 1 or local == 0 else 0  # a scheduler may show each task only its own GPU
        if local >= visible:
            raise UserError(f"LOCAL_RANK {local} has no GPU: {visible} are visible; start fewer ranks a node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local)}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    control = dist.new_group(backend="gloo") if device.type == "cuda" else dist.group.WORLD
    return Ranks(rank, world, device, control)


def stop_ranks() -> None:
    """Leave, so that no rank waits for this one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
