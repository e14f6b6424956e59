"""Several adapters on one backbone: what switching costs, and what they take in memory.

    python tools/benchmark.py several --backbone vit_base_patch16_224 --adapters 4 --batch 32

Forward passes of the same batch, all arms interleaved in one run, fp32, random weights:

    alone      one adapter loaded alone: what there is to reach
    one        the same adapter chosen for the whole batch: what a switch costs
    turns      another adapter at each call
    mixed      samples of all adapters in one batch
    parts      the same, by a call for each adapter with its own samples

Memory: bytes of tensors of the backbone, and of one adapter; a model of its own for each takes both each time.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fulllora_dist.commands.parser import Parser
from fulllora_dist.models.adapt import create_model
from fulllora_dist.models.adapter_file import save_adapter
from fulllora_dist.models.multi_adapter import MultiAdapter
from fulllora_dist.registry.address import load


def megabytes(tensors: dict[str, Tensor]) -> float:
    return sum(tensor.nbytes for tensor in tensors.values()) / 1e6


def main(argv: list[str]) -> None:
    """Run the arms and print their ratios."""
    parser = Parser(prog="benchmark.py several", description=__doc__)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"pretrained": False, "num_classes": 1000, "image_size": args.image_size, "head": "frozen"}
    with tempfile.TemporaryDirectory() as folder:
        model = create_model(args.backbone, **settings)
        names = [f"adapter{i}" for i in range(args.adapters)]
        for name in names:
            for parameter in model.trainable().values():
                torch.nn.init.normal_(parameter, std=0.02)
            save_adapter(model, f"{folder}/{name}")
        trained = model.trainable()
        alone = load(f"{folder}/{names[0]}").to(device)
        several = MultiAdapter({name: f"{folder}/{name}" for name in names}).to(device).eval()
    x = torch.rand(args.batch, 3, args.image_size, args.image_size, device=device)
    choice = [names[i % len(names)] for i in range(args.batch)]
    turn = itertools.cycle(names)

    def parts() -> None:
        for name in names:
            several(x[[i for i, one in enumerate(choice) if one == name]], name)

    arms: dict[str, Callable[[], object]] = {
        "alone": lambda: alone(x),
        "one": lambda: several(x, names[0]),
        "turns": lambda: several(x, next(turn)),
        "mixed": lambda: several(x, choice),
        "parts": parts,
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with torch.inference_mode():
        for i in range(args.rounds + 1):
            for name, arm in arms.items():
                start = time.perf_counter()
                arm()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if i:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
            print(f"round {i} of {args.rounds}", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    one = megabytes(dict(trained))
    frozen = megabytes(dict(alone.state_dict())) - one
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **{key: getattr(args, key) for key in ("backbone", "image_size", "batch", "adapters")},
        "seconds": medians,
        "ratio_to_alone": {name: median / medians["alone"] for name, median in medians.items()},
        "backbone_mb": frozen,
        "adapter_mb": one,
        "together_mb": megabytes(dict(several.state_dict())),
        "apart_mb": args.adapters * (frozen + one),
    }
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{args.backbone}, {args.image_size} pixels, batch {args.batch}, {args.adapters} adapters, {result['device']}"
    )
    for name, median in medians.items():
        print(f"{name:<7} {1000 * median:8.1f} ms  {median / medians['alone']:.2f} of alone")
    print(f"memory: {result['together_mb']:.1f} MB together, {result['apart_mb']:.1f} MB as {args.adapters} models")
