"""The page docs/scaling.md: what simulate.py says of three backbones on 8 to 512 GPUs."""

from fulllora_dist.commands.cluster_model import Machines
from fulllora_dist.commands.simulate import count, report

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
- **Measured** on real ranks (`tests/distributed/test_cluster_model.py`): the collectives of an update and their sizes, and
  their time on 1, 2 and 4 gloo ranks of a network with delays, within a quarter of the model's; the requests of an epoch, of
  a small index. {decode} images a second of a data worker on a CPU ([performance.md](performance.md#data)).
- **Assumed**: {tflops} TFLOP/s a GPU, whatever the micro-batch; {launch} us to start an operation (`model.compile` needs fewer
  operations); between nodes {network} Gbit/s and {latency} us a message, within a node {local} GB/s and {local_latency} us,
  between hosts {host} us; a bucket of {bucket} Gbit/s, {image} kB an image; {imports} s until the ranks have met.
- **Modelled**: a step is its passes, each at least as long as starting its operations, then the collectives of the update
  (by a ring, all-reduces by a tree where that is faster), which nothing hides. The vote on the host (gloo's ring), decoding
  and the bucket work beside it, and cost what they take longer. The start fetches weights and index once a node.
- **Left out**: checkpoints, preemption, stragglers, congestion, the evaluation at the end, slower kernels at small batches.

The global batch stays the same, so more GPUs mean fewer images on each, and in the end a step takes as long as the host
takes to start its operations, however few the images are.
"""


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
