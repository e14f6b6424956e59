"""A model of a run on a cluster: what was counted of it, and what its machines are said to do a second.

A step is, on each rank, its passes, one after the other; then the collectives of the update, which nothing hides, as
DeepSpeed's bucket of gradients is full only when the backward pass ends. The vote on the host, the data workers and the
bucket work beside the step, and cost what they take longer than it. `tests/distributed/test_cluster_model.py` compares
the collectives with those of real ranks, and their times with ranks on a slow network.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from fulllora_dist.commands.plan_counts import RunCounts
from fulllora_dist.data.plan import CHUNK, WINDOW
from fulllora_dist.models.flops import PassCost
from fulllora_dist.training.guard import batches_of_check
from fulllora_dist.training.phases import Phase

VOTE = 4
"""Numbers of the vote of a batch (training/requests.py), of 8 bytes."""
INDEX_BYTES = 66
"""Of an image in the index: 85 MB for ImageNet-1k."""


@dataclass(frozen=True)
class Network:
    """A network of ranks.

    Attributes:
        latency: seconds of a message one way.
        rate: bytes a second that a rank, or the ranks of a node together, send.
        asks: whether a message of several numbers waits for the receiver first, as gloo's do: two messages for one.
        trees: whether an all-reduce may go by a tree instead of a ring, as NCCL chooses.
    """

    latency: float
    rate: float
    asks: bool = False
    trees: bool = False

    def all_reduce(self, size: float, world: int, count: int = 2) -> float:
        """Seconds of an all-reduce of `count` numbers, `size` bytes, over `world` ranks."""
        ring = self._ring(2, size, world, count)
        tree = 2 * math.ceil(math.log2(world)) * self.latency + 2 * size / self.rate
        return min(ring, tree) if self.trees else ring

    def all_gather(self, size: float, world: int) -> float:
        """Seconds until all ranks have `size` bytes, of which each had its part."""
        return self._ring(1, size, world, 2)

    def _ring(self, rounds: int, size: float, world: int, count: int) -> float:
        return rounds * ((world - 1) * self._hop(count) + size * (world - 1) / world / self.rate)

    def _hop(self, count: int) -> float:
        return self.latency * (2 if self.asks and count > 1 else 1)


class Collective(NamedTuple):
    """One of an update: its kind, and how many fp32 numbers it is over."""

    kind: str
    numbers: int


def collectives(stage: int, trainable: int) -> list[Collective]:
    """What DeepSpeed does for an update at ZeRO 0 to 2, in order: all gradients at once, the gradient's norm or whether
    it is finite, from stage 1 on both; there each rank then gives the others what it has updated, in two groups: the
    parameters that decay, and the others.

    Args:
        trainable: number of trainable numbers.
    """
    reduced = [Collective("all_reduce", trainable)] + [Collective("all_reduce", 1)] * (1 if stage == 0 else 2)
    return reduced + ([] if stage == 0 else [Collective("all_gather", trainable // 2)] * 2)


def update_seconds(stage: int, trainable: int, world: int, network: Network) -> float:
    """Seconds of an update's collectives."""
    if world == 1:
        return 0.0
    times = {"all_reduce": network.all_reduce, "all_gather": lambda size, world, _: network.all_gather(size, world)}
    return sum(times[kind](4 * numbers, world, numbers) for kind, numbers in collectives(stage, trainable))


@dataclass(frozen=True)
class Machines:
    """What the machines do; nothing here is measured unless it is given.

    Attributes:
        flops: FLOP/s of a rank in training, and of its guard.
        launch: seconds that the host takes to start an operation.
        nodes, local, host: networks of the GPUs between and within nodes, and of the hosts.
        bucket: bytes a second that the bucket gives all nodes together.
        decode: images a second of a data worker.
        image_bytes: of an image in the bucket.
        imports: seconds from a job's start until the ranks have met.
        price, egress_price: of a GPU's hour, and of 10**9 bytes from the bucket.
    """

    flops: float
    launch: float
    nodes: Network
    local: Network
    host: Network
    bucket: float
    decode: float
    image_bytes: float
    imports: float
    price: float = 0.0
    egress_price: float = 0.0


class Simulated(NamedTuple):
    """A run on so many GPUs; seconds of a step are means over the run.

    Attributes:
        images: of a rank's micro-batch.
        compute: of the passes.
        launching: how much of it the device waits for the host to start operations.
        exposed: of the collectives of the updates.
        waiting: for the vote, the data workers or the bucket, whichever is last.
        waits_for: which that is.
        guard: share of the run that the guard takes.
        efficiency: GPU-hours if all passes went at `Machines.flops`, relative to those of the run.
    """

    gpus: int
    images: int
    step: float
    compute: float
    launching: float
    exposed: float
    waiting: float
    waits_for: str
    guard: float
    start: float
    hours: float
    gpu_hours: float
    efficiency: float
    cost: float


def simulate(counts: RunCounts, nodes: int, gpus_per_node: int, machines: Machines) -> Simulated:
    """A run of what was counted (on any number of ranks) on `nodes` x `gpus_per_node`."""
    config, world = counts.config, nodes * gpus_per_node
    batch, accumulation = config.optim.batch_size, config.distributed.gradient_accumulation_steps
    network = machines.nodes if nodes > 1 else machines.local
    stage, trainable = config.distributed.zero_stage, counts.model.report.trainable
    update = update_seconds(stage, trainable, world, network)
    beside = {
        "vote": machines.host.all_reduce(8 * VOTE, world, VOTE) if world > 1 else 0.0,
        "decoding": batch / world / (max(1, config.data.num_workers) * machines.decode),
        "bucket": batch * machines.image_bytes / machines.bucket,
    }
    sums = dict.fromkeys(("compute", "launching", "exposed", "waiting"), 0.0)
    late: dict[str, float] = dict.fromkeys(beside, 0.0)
    for phase in counts.phases.phases:
        steps = phase.end - phase.first
        compute, bare = _passes(counts, phase, batch // world // accumulation, accumulation, machines)
        exposed = phase.method.updates_per_batch * update
        last = max(beside, key=lambda name: beside[name])
        waiting = max(0.0, beside[last] - compute - exposed)
        late[last] += steps * waiting
        for name, seconds in (("compute", compute), ("launching", compute - bare), ("exposed", exposed)):
            sums[name] += steps * seconds
        sums["waiting"] += steps * waiting
    total = counts.phases.total_steps
    trained = sums["compute"] + sums["exposed"] + sums["waiting"]
    guard = _guard_seconds(counts, world, machines)
    start = _start_seconds(counts, nodes, machines)
    hours = (start + trained + guard) / 3600
    ideal = counts.flops(counts.checkpointing) / machines.flops / 3600
    egress = config.optim.epochs * counts.images * machines.image_bytes / 1e9 * _drawn(counts)
    return Simulated(
        gpus=world,
        images=batch // world // accumulation,
        step=trained / total,
        compute=sums["compute"] / total,
        launching=sums["launching"] / total,
        exposed=sums["exposed"] / total,
        waiting=sums["waiting"] / total,
        waits_for=max(late, key=lambda name: late[name]),
        guard=guard / (3600 * hours),
        start=start,
        hours=hours,
        gpu_hours=hours * world,
        efficiency=ideal / (hours * world),
        cost=hours * world * machines.price + egress * machines.egress_price,
    )


def requests_an_epoch(counts: RunCounts) -> int:
    """GETs of an epoch from a bucket: one for each chunk, and one more where a lane or a window begins within one."""
    return counts.config.optim.batch_size + math.ceil(counts.images / CHUNK * (1 + 1 / WINDOW))


def _drawn(counts: RunCounts) -> float:
    """Share of its epochs that a run draws: Free draws a batch for several updates."""
    return counts.phases.total_steps / counts.phases.total_updates


def _passes(counts: RunCounts, phase: Phase, images: int, accumulation: int, machines: Machines) -> tuple[float, float]:
    """Seconds of the passes of a batch on a rank, and without waiting for the host."""
    attack, step = counts.costs(phase, counts.checkpointing)
    attacks, forward_alone = phase.method.attack_passes()
    seen = phase.method.images_in_weight_step
    forward = PassCost(attack.forward_flops, attack.forward_flops, 0, 0, attack.operations // 3)
    slow = fast = 0.0
    for number, cost, each in (
        (attacks, attack, images),
        (forward_alone, forward, images),
        (phase.method.updates_per_batch, step, seen * images),
    ):
        computed = each * cost.flops / machines.flops
        slow += accumulation * number * max(computed, cost.operations * machines.launch)
        fast += accumulation * number * computed
    return slow, fast


def _guard_seconds(counts: RunCounts, world: int, machines: Machines) -> float:
    config = counts.config
    if config.data.held_out is None:
        return 0.0
    size, batches = batches_of_check(config.guard.num_samples, world, config.evaluation.batch_size)
    attack, _ = counts.costs(counts.phases.phases[-1], "off")
    passes = (1 + (config.optim.ema_decay > 0)) * batches * (config.guard.steps + 1)
    checks = math.ceil(counts.phases.total_steps / config.guard.every)
    return checks * passes * max(size * attack.flops / machines.flops, attack.operations * machines.launch)


def _start_seconds(counts: RunCounts, nodes: int, machines: Machines) -> float:
    """Until the first step: imports, index and fp32 weights once a node from the bucket, and the first windows."""
    report = counts.model.report
    weights = 4 * (report.total - sum(size for _, size in report.trained))
    fetched = nodes * (weights + INDEX_BYTES * counts.images)
    windows = counts.config.optim.batch_size * CHUNK * machines.image_bytes
    return machines.imports + (fetched + windows) / machines.bucket
