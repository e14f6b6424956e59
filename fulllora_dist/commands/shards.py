"""Making and indexing shards: `fulllora shards` and `fulllora index`."""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fulllora_dist.commands.entry import on_interrupt
from fulllora_dist.commands.parser import Parser

MAKE = """Images -> WebDataset shards + index, on disk or in a bucket.

    fulllora shards ILSVRC2012_img_train.tar s3://bucket/imagenet/train --workers 16 \\
        --holdout 10 --holdout-dst s3://bucket/imagenet/held_out
    fulllora shards ILSVRC2012_img_val.tar s3://bucket/imagenet/val --split-name val \\
        --labels ILSVRC2012_devkit_t12.tar.gz
    fulllora shards images/train shards/train

SRC is a folder with a subfolder of JPEGs, PNGs or WebPs for each class, an uncompressed tar of such a folder, or an
uncompressed tar of one tar a class. With --labels the images may lie anywhere in SRC. Every image is decoded once
and every finished shard is re-read, so what is written is readable. The index comes last; re-run the same command to
resume after an interruption.
"""
INDEX = """Existing WebDataset shards -> one index, on disk or in a bucket.

    fulllora index shards/train
    fulllora index 's3://bucket/imagenet/train/train-{000000..001281}.tar' --workers 16
    fulllora index 'https://host/set/{000..127}.tar' --output index/ --classes names.txt --label-field y

Each shard is read once, from its first to its last byte, and refused by name and offset unless it is a complete, plain
tar of samples with one image (.jpg, .jpeg, .png, .webp) and one label (.cls, or a field of .json), every key once.
Other members are passed over. What was read survives an interruption: re-run the same command for the other shards.
The index comes last.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=MAKE)
    parser.add_argument("source", metavar="SRC", help="image folder, or a tar of one, or a tar of tars")
    parser.add_argument("destination", metavar="DST", help="folder, s3:// or gs:// for shards and index")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="classes of images that lie in no class folders: ImageNet's development kit, a csv, or lines 'name class'",
    )
    parser.add_argument("--split-name", default="train", help="shards are called NAME-000000.tar ... (default: train)")
    parser.add_argument(
        "--image-size",
        type=int,
        help="resize the shorter side, crop the centre and re-encode (default: keep the bytes as they are)",
    )
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument(
        "--classes",
        metavar="A,B,...|FILE|N",
        help="take only these classes, labels in this order: names, or a file with one a line; or how many, where they "
        "are named by numbers (default: all, in numeric order if all are numbers, else in text order)",
    )
    parser.add_argument("--limit", type=int, help="take only so many images, balanced over the classes")
    parser.add_argument(
        "--skip", type=int, default=0, help="leave out the images that --limit SKIP takes, to make a disjoint set"
    )
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE|N",
        help="share of each class, or images of each class, to hold out, to choose checkpoints on",
    )
    parser.add_argument(
        "--holdout-dst", dest="holdout_destination", metavar="DST2", help="folder for the held-out shards"
    )
    parser.add_argument(
        "--max-bad-samples",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to so many images that cannot be decoded; more are an error that names them (default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a summary")
    return parser


def make() -> None:
    """Make shards as the command line says."""
    args = make_parser().parse_args()
    from fulllora_dist.core.messages import redacted
    from fulllora_dist.data.shards.make import make_shards  # --help need not wait for torch

    args.classes = None if args.classes is None else _classes(args.classes, one=True)
    kept = f"what is finished is kept in {redacted(args.destination)}; re-run the same command to resume"
    with on_interrupt(lambda: kept):
        result = _run(make_shards, args)
    if result is None:
        return
    for split in result["splits"]:
        print(
            f"{split['folder']}: {split['samples']} images of {len(result['classes'])} classes in {split['shards']} "
            f"shards, {split['bytes'] / 1e6:.1f} MB, index {split['index_hash'][:12]}"
        )
    if result["skipped_files"]:
        print(f"skipped {result['skipped_files']} files that are not images")
    if result["unreadable"]:
        print(f"left out {len(result['unreadable'])} unreadable images: {', '.join(result['unreadable'])}")
    for note in result["notes"]:
        print(note)


def _run(function: Callable[..., dict[str, Any]], args: argparse.Namespace) -> dict[str, Any] | None:
    """What `function` returns for the arguments of the same names, timed; None where that is printed as JSON."""
    arguments = vars(args)
    as_json = arguments.pop("json")
    start = time.monotonic()
    result = function(**arguments)
    result["seconds"] = round(time.monotonic() - start, 2)
    if not as_json:
        return result
    print(json.dumps(result))
    return None


def _classes(text: str, *, one: bool = False) -> int | list[str]:
    """A number, a file of names, names with commas between, or, where it may be so, `one` name."""
    if text.isdecimal():
        return int(text)
    if not os.path.isfile(text) and ("," in text or one):
        return text.split(",")
    from fulllora_dist.data.shards.classes import read_classes

    return read_classes(Path(text))


def index_parser() -> argparse.ArgumentParser:
    parser = Parser(description=INDEX)
    parser.add_argument(
        "shards",
        metavar="URL",
        nargs="+",
        help="path, s3://, gs://, http(s)://; {000..127} and {a,b} are expanded, * and folders are listed (not over "
        "http). The order given is that of the sample ids",
    )
    parser.add_argument(
        "--output", metavar="WHERE", help="folder, URL or FILE.safetensors of the index (default: the shards' folder)"
    )
    parser.add_argument(
        "--classes",
        metavar="A,B,...|FILE|N",
        help="the classes' names in label order, which labels may be then too, or a file with one a line; or how many "
        "there are (default: as many as the labels say)",
    )
    parser.add_argument(
        "--image-field",
        metavar="EXT",
        help="the member that is the image (png, input.jpg), where a sample has several or none is called jpg, jpeg, "
        "png or webp",
    )
    parser.add_argument("--label-field", default="label", help="field of .json members (default: label)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a summary")
    return parser


def index() -> None:
    """Index shards as the command line says."""
    args = index_parser().parse_args()
    from fulllora_dist.data.shards.indexing import index_shards  # --help need not wait for fsspec

    args.classes = None if args.classes is None else _classes(args.classes)
    with on_interrupt(lambda: "shards that were read are not read again; re-run the same command to resume"):
        result = _run(index_shards, args)
    if result is None:
        return
    print(
        f"{result['index']}: {result['samples']} samples of {result['classes']} classes in {result['shards']} shards, "
        f"{result['bytes'] / 1e6:.1f} MB, index {result['index_hash'][:12]}"
    )
    if result["reused_shards"]:
        print(f"{result['reused_shards']} shards had been read by an earlier call")
    if result["empty_classes"]:
        print(f"{result['empty_classes']} classes have no samples")
    if result["skipped_members"]:
        print(f"passed over {result['skipped_members']} members that belong to no sample")
