"""Images a second through one worker, and what the epoch plan costs at the size of ImageNet.

    OMP_NUM_THREADS=1 python tools/benchmark.py data --output data.json

Arms, each with one worker process that reads, decodes, crops (RandomResizedCrop 224, bicubic), flips and batches the
same images to uint8:

    ours         data/loader.py's TrainStream
    webdataset   as its documentation shows it: WebDataset().shuffle().decode("pil").to_tuple().map_tuple(), torchvision
    imagefolder  torchvision's ImageFolder behind a DataLoader

once from disk and, but for imagefolder, once over HTTP from a server of its own process that answers late (webdataset
reads http through curl). Rounds are interleaved; a rate is the median of its rounds, a ratio that of the rates. With
the default batch a worker has as many slots as in a batch of 4,096 on 64 ranks of 8 workers. What comes first is
skipped: there ours fetches its windows, and webdataset fills its shuffle buffer. The CPU time of all processes of an
arm is given too: on a machine with other work it is what can be compared.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.loader import TrainStream
from fulllora_dist.data.shards.indexing import index_shards
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.data.transforms import TrainTransform

HERE = Path(__file__).resolve().parent
SIZE = 224
AREA = (0.08, 1.0)


def source_images(source: Path) -> list[bytes]:
    """JPEGs of a tar; generated ones of ImageNet's usual size and weight where it is absent."""
    if source.is_file():
        with tarfile.open(source) as tar:
            files = [
                tar.extractfile(member)
                for member in tar.getmembers()
                if member.name.lower().endswith((".jpg", ".jpeg"))
            ]
            return [file.read() for file in files if file is not None]
    print(f"{source} does not exist: using generated images", file=sys.stderr)
    rng = np.random.default_rng(0)
    images = []
    for _ in range(100):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        grain = rng.integers(-12, 13, (375, 500, 3))
        buffer = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
        images.append(buffer.getvalue())
    return images


def lay_out(data: list[bytes], count: int, folder: Path) -> tuple[Path, Path]:
    """(image folder, folder of shards) of `count` images, repeated from `data` under keys of their own."""
    images = folder / "images"
    for i in range(count):
        path = images / f"class{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < len(data):
            path.write_bytes(data[i])
        else:
            path.hardlink_to(images / f"class{i % len(data) % 10}" / f"{i % len(data):06d}.jpg")
    make_shards(images, folder / "shards", samples_per_shard=250, workers=1, progress=False)
    return images, folder / "shards"


@contextlib.contextmanager
def latency_server(folder: Path, seconds: float) -> Iterator[str]:
    command = [sys.executable, str(HERE / "latency_server.py"), str(folder), str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.communicate()


def torchvisions() -> Callable[[Image.Image], torch.Tensor]:
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=AREA, interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


def same(value: Any) -> Any:
    return value


def through_ours(shards: str, batch: int) -> Iterable[Any]:
    transform = TrainTransform(SIZE, "crop", crop_scale=AREA, interpolation="bicubic")
    return (b.images for b in TrainStream(shards, batch_size=batch, transform=transform, seed=0, workers=1))


def through_webdataset(shards: list[str], batch: int) -> Iterable[Any]:
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(torchvisions(), same)
    )
    return (images for images, _ in DataLoader(dataset, batch_size=batch, num_workers=1))


def through_imagefolder(folder: Path, batch: int) -> Iterable[Any]:
    dataset = ImageFolder(str(folder), torchvisions())
    return (images for images, _ in DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=1))


class Measured(NamedTuple):
    """Of one arm: images a second, CPU ms an image (all processes of the arm), MB resident in the worker."""

    rate: float
    cpu_ms: float
    rss_mb: float


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Of these and of their children that have ended (curl)."""
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def measured(arm: Callable[[], Iterable[Any]], skip: int, count: int) -> Measured:
    """One round, once `skip` images have gone by."""
    me = psutil.Process()
    before = {process.pid for process in me.children(recursive=True)}
    stream = iter(arm())
    while skip > 0:
        skip -= len(next(stream))
    new = [process for process in me.children(recursive=True) if process.pid not in before]
    workers = [process for process in new if process.name() != "curl" and process.memory_info().rss > 100e6]
    start, cpu, seen = time.perf_counter(), cpu_seconds([me, *workers]), 0
    while seen < count:
        images = next(stream)
        assert images.shape[1:] == (3, SIZE, SIZE)
        assert images.dtype == torch.uint8
        seen += len(images)
    seconds = time.perf_counter() - start
    resident = max(worker.memory_info().rss for worker in workers) / 1e6
    return Measured(seen / seconds, 1000 * (cpu_seconds([me, *workers]) - cpu) / seen, resident)


def medians(arms: dict[str, Callable[[], Iterable[Any]]], args: argparse.Namespace, what: str) -> dict[str, Measured]:
    rounds: dict[str, list[Measured]] = {name: [] for name in arms}
    for i in range(args.rounds):
        for name, arm in arms.items():
            result = measured(arm, skip=args.skip, count=args.count)
            rounds[name].append(result)
            figures = f"{result.rate:.1f} images/s, {result.cpu_ms:.2f} ms CPU"
            print(f"{what}, round {i + 1} of {args.rounds}, {name}: {figures}", file=sys.stderr)
    return {name: Measured(*map(statistics.median, zip(*values, strict=True))) for name, values in rounds.items()}


def plan_cost() -> dict[str, float]:
    """Of one machine: 8 of 64 ranks, 8 workers each; in a process of its own that has nothing else in memory."""
    command = [sys.executable, str(HERE / "plan_cost.py")]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main(argv: list[str]) -> None:
    """Run all arms, print a table, write the file."""
    parser = Parser(prog="benchmark.py data", description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument(
        "--images",
        type=Path,
        default=HERE.parent.parent / "shared/data/imagenet-natural-100.tar",
        help="tar of JPEGs at natural size (default: %(default)s; generated ones where it is absent)",
    )
    parser.add_argument("--samples", type=int, default=4096, help="images in the shards (default: 4096)")
    parser.add_argument("--count", type=int, default=1024, help="images that one measurement counts (default: 1024)")
    parser.add_argument("--skip", type=int, default=512, help="images before that (default: 512)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--latency", type=float, default=0.04, help="of each answer over HTTP, in seconds (default: 0.04)"
    )
    args = parser.parse_args(argv)
    if args.output is not None and not args.output.absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: its folder does not exist")
    torch.set_num_threads(1)

    result: dict[str, Any] = {"plan": plan_cost()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images, shards = lay_out(source_images(args.images), args.samples, folder)
        names = [shard.url for shard in Index.load(shards).shards]
        disk = medians(
            {
                "ours": lambda: through_ours(str(shards), args.batch),
                "webdataset": lambda: through_webdataset([str(shards / name) for name in names], args.batch),
                "imagefolder": lambda: through_imagefolder(images, args.batch),
            },
            args,
            "disk",
        )
        with latency_server(shards, args.latency) as url:
            remote = [f"{url}/{name}" for name in names]
            index_shards(remote, str(folder), progress=False)
            late = medians(
                {
                    "ours": lambda: through_ours(str(folder), args.batch),
                    "webdataset": lambda: through_webdataset(remote, args.batch),
                },
                args,
                f"{1000 * args.latency:.0f} ms",
            )
    result |= {
        "arms": {name: arm.rate for name, arm in disk.items()},
        "arms_latency": {name: arm.rate for name, arm in late.items()},
        "ratio_disk": disk["ours"].rate / disk["webdataset"].rate,
        "ratio_latency": late["ours"].rate / late["webdataset"].rate,
        "cpu_ms": {name: arm.cpu_ms for name, arm in disk.items()},
        "cpu_ms_latency": {name: arm.cpu_ms for name, arm in late.items()},
        "rss_mb_per_worker": disk["ours"].rss_mb,
        "rss_mb": {name: arm.rss_mb for name, arm in disk.items()},
        "plan_seconds": result["plan"]["seconds"],
        "plan_mb": result["plan"]["mb"],
        "settings": {key: value for key, value in vars(args).items() if key not in ("output", "images")},
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2))
    print(f"{'':<12} {'disk':>18} {f'{1000 * args.latency:.0f} ms':>18}   of one worker")
    for name, arm in disk.items():
        cells = [f"{arm.rate:.0f}/s {arm.cpu_ms:.2f} ms"]
        if name in late:
            cells.append(f"{late[name].rate:.0f}/s {late[name].cpu_ms:.2f} ms")
        print(f"{name:<12} " + " ".join(f"{cell:>18}" for cell in cells))
    print(f"ours / webdataset: {result['ratio_disk']:.2f} from disk, {result['ratio_latency']:.2f} over HTTP")
    print(f"a worker of ours: {result['rss_mb_per_worker']:.0f} MB resident")
    print(
        f"plan of ImageNet, 64 ranks x 8 workers: {result['plan_seconds']:.2f} s, {result['plan_mb']:.0f} MB a machine"
    )
