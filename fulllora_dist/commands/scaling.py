"""The tables of a simulated run, and the page docs/scaling.md: three backbones on 8 to 512 GPUs."""

import itertools
import math
from collections.abc import Sequence

from fulllora_dist.commands.cluster_model import Machines, Simulated, requests_an_epoch, simulate
from fulllora_dist.commands.plan_counts import RunCounts, count_run
from fulllora_dist.config.load import load_config
from fulllora_dist.core.errors import UserError

RUNS = (
    ("ViT-L/16", "configs/imagenet_vit_large_pgd3.yaml", ()),
    ("ViT-H/14", "configs/imagenet_vit_huge_pgd3.yaml", ()),
    ("ViT-g/14", "configs/imagenet_vit_huge_pgd3.yaml", ("model.backbone=eva_giant_patch14_224.clip_ft_in1k",)),
)
NODES, GPUS_PER_NODE = 64, 8
UNKNOWN = "data.train=/nowhere"
"""The runs are of ImageNet-1k, whatever data is here."""

HEAD = """# Scaling, simulated

Made by `python tools/simulate.py --page docs/scaling.md`. **None of these runs has been made.** PGD-3 at a global batch
of 1,024 on ImageNet-1k, ten epochs, ZeRO-1, 8 to 512 GPUs, 8 a node. For a config and machines of your own:

```bash
python tools/simulate.py --config configs/imagenet_vit_huge_pgd3.yaml --nodes 64 --gpus-per-node 8 --rates step.json \\
    --network-gbit 3200 --latency-us 8 --bucket-gbit 200 --decode-rate 300 --price 2.5
```

- **Counted** on the meta device: FLOPs and operations of each pass, bytes of gradients, checks of the guard.
- **Measured** (`tests/distributed/test_cluster_model.py`): the collectives of an update and their sizes; their time, on
  1, 2 and 4 gloo ranks of a network with delays, within 15 % of the model's; the requests of an epoch;
  {decode} images a second of a data worker, on a CPU ([performance.md](performance.md#data)).
- **Assumed**: {tflops} TFLOP/s a GPU, whatever the micro-batch; {launch} us to start an operation (`model.compile` has
  fewer); between nodes {network} Gbit/s and {latency} us a message, within a node {local} GB/s and {local_latency} us,
  between hosts {host} us; a bucket of {bucket} Gbit/s, {image} kB an image; {imports} s until the ranks have met.
- **Modelled**: a step is its passes, each at least as long as starting its operations, then the collectives of the
  update (by a ring, all-reduces by a tree where that is faster), which nothing hides. The vote on the host (gloo's
  ring), decoding and the bucket work beside it, and cost what they take longer. The start fetches weights and index
  once a node.
- **Left out**: checkpoints, preemption, stragglers, congestion, the evaluation at the end, and that kernels are slower
  at small batches.

The global batch stays the same, so more GPUs mean fewer images on each, and in the end a step takes as long as the host
takes to start its operations, however few the images are.
"""


def count(config: str, overrides: Sequence[str]) -> RunCounts:
    """Count the run of a config on one node.

    Raises:
        UserError: an invalid setting, or ZeRO-3.
    """
    settings = load_config(config, overrides)
    if settings.distributed.zero_stage == 3:
        raise UserError(
            "distributed.zero_stage: 3 is not simulated, as its gathers overlap with the passes; use 0 to 2"
        )
    return count_run(settings, ranks=1)


def report(counts: RunCounts, nodes: int, gpus_per_node: int, machines: Machines) -> str:
    """The run on each power of two of nodes, as text.

    Raises:
        UserError: not even one node divides the batch.
    """
    runs = simulated(counts, nodes, gpus_per_node, machines)
    epochs = counts.config.optim.epochs * counts.phases.total_steps / counts.phases.total_updates
    gb = counts.images * machines.image_bytes / 1e9
    return "\n".join(
        [
            f"{counts.model.info.name}, {counts.config.method.name}, global batch {counts.config.optim.batch_size}, "
            f"ZeRO-{counts.config.distributed.zero_stage}",
            *_table(runs, machines),
            f"an epoch takes {requests_an_epoch(counts):,} requests and {gb:,.0f} GB from a bucket; the run draws "
            f"{epochs:g} epochs",
            where_it_stops(runs),
        ]
    )


def simulated(counts: RunCounts, nodes: int, gpus_per_node: int, machines: Machines) -> list[Simulated]:
    """The run on each power of two of nodes whose ranks divide the batch."""
    parts = counts.config.optim.batch_size // counts.config.distributed.gradient_accumulation_steps
    numbers = [2**i for i in range(nodes.bit_length()) if 2**i <= nodes]
    fits = [n for n in dict.fromkeys([*numbers, nodes]) if parts % (n * gpus_per_node) == 0]
    if not fits:
        raise UserError(f"optim.batch_size: must be divisible by {gpus_per_node} ranks, got micro-batches of {parts}")
    return [simulate(counts, n, gpus_per_node, machines) for n in fits]


def _table(runs: Sequence[Simulated], machines: Machines) -> list[str]:
    cost = machines.price or machines.egress_price
    lines = [
        "| GPUs | images a GPU | step | passes | of it launching | collectives | waiting for | guard | start | hours | "
        "GPU-hours | efficiency |" + " cost |" * bool(cost),
        "|---" * (12 + bool(cost)) + "|",
    ]
    for run in runs:
        waits = f"{_ms(run.waiting)} {run.waits_for}" if run.waiting > 5e-5 else "-"
        lines.append(
            f"| {run.gpus} | {run.images} | {_ms(run.step)} | {_ms(run.compute)} | {_ms(run.launching)} | "
            f"{_ms(run.exposed)} | {waits} | {run.guard:.0%} | {run.start:.0f} s | {run.hours:.2f} | "
            f"{run.gpu_hours:.1f} | {run.efficiency:.0%} |" + f" {run.cost:,.0f} |" * bool(cost)
        )
    return lines


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def where_it_stops(runs: Sequence[Simulated]) -> str:
    """The last step where a doubling still makes the run at least a third shorter, and what is in the way after it."""
    for before, after in itertools.pairwise(runs):
        if math.log2(before.hours / after.hours) < math.log2(1.5) * math.log2(after.gpus / before.gpus):
            parts = {
                "starting operations": after.launching,
                "the collectives of the updates": after.exposed,
                f"waiting for the {after.waits_for}": after.waiting,
                "the start": after.start * after.step / (3600 * after.hours),
            }
            most = max(parts, key=lambda name: parts[name])
            return (
                f"it stops scaling at {before.gpus} GPUs: {after.gpus} take {after.hours / before.hours:.0%} of the "
                f"time; most of what is lost is {most}"
            )
    return f"it scales to {runs[-1].gpus} GPUs: each doubling makes the run at least a third shorter"


def page(machines: Machines) -> str:
    """The page, as Markdown."""
    numbers = {
        "tflops": machines.flops / 1e12,
        "launch": machines.launch * 1e6,
        "latency": machines.nodes.latency * 1e6,
        "network": machines.nodes.rate * 8 / 1e9,
        "local": machines.local.rate / 1e9,
        "local_latency": machines.local.latency * 1e6,
        "host": machines.host.latency * 1e6,
        "bucket": machines.bucket * 8 / 1e9,
        "decode": machines.decode,
        "image": machines.image_bytes / 1e3,
        "imports": machines.imports,
    }
    parts = [HEAD.format(**{name: f"{number:g}" for name, number in numbers.items()})]
    for name, config, overrides in RUNS:
        counts = count(config, [UNKNOWN, *overrides])
        _, *rows, epoch, stops = report(counts, NODES, GPUS_PER_NODE, machines).split("\n")
        told = " ".join([f"`{config}`", *(f"with `{override}`" for override in overrides)])
        last = f"{epoch[0].upper()}{epoch[1:]}; {stops}."
        parts.append("\n".join([f"## {name}", "", f"{told}:", "", *rows, "", last, ""]))
    return "\n".join(parts)
