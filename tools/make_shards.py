"""Pictures -> WebDataset shards + index, on disk or in a bucket.

    python tools/make_shards.py ILSVRC2012_img_train.tar s3://bucket/imagenet/train --workers 16 \\
        --holdout 10 --holdout-dst s3://bucket/imagenet/holdout
    python tools/make_shards.py ILSVRC2012_img_val.tar s3://bucket/imagenet/val --split-name val \\
        --labels ILSVRC2012_devkit_t12.tar.gz
    python tools/make_shards.py pictures/train shards/train

SRC is a folder with a subfolder of JPEGs, PNGs or WebPs for each class, an uncompressed tar of such a folder, or an
uncompressed tar of one tar a class. With --labels the pictures may lie anywhere in SRC. Every picture is decoded once
and every finished shard is re-read, so what is written is readable. The index comes last; after an interruption the
same command goes on with what is missing.
"""

import argparse
import json
import os
import time

from fulllora_dist.data.write import make_shards
from fulllora_dist.errors import run_entry


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="image folder, or a tar of one, or a tar of tars")
    parser.add_argument("destination", metavar="DST", help="folder, s3:// or gs:// for shards and index")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="classes of pictures that no folder tells: ImageNet's development kit, or lines 'name class'",
    )
    parser.add_argument("--split-name", default="train", help="shards are called NAME-000000.tar ... (default: train)")
    parser.add_argument(
        "--image-size",
        type=int,
        help="resize the shorter side, cut out the centre and encode anew (default: keep the bytes as they are)",
    )
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument(
        "--classes",
        type=lambda text: text.split(","),
        metavar="A,B,...",
        help="take only these class folders, labels in this order (default: all, sorted)",
    )
    parser.add_argument("--limit", type=int, help="take only so many pictures, balanced over the classes")
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE|N",
        help="share of each class, or pictures of each class, to hold out, to choose checkpoints on",
    )
    parser.add_argument("--holdout-dst", metavar="DST2", help="folder for the held-out shards")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a summary")
    return parser


def main() -> None:
    args = _parser().parse_args()
    start = time.monotonic()
    result = make_shards(
        args.source,
        args.destination,
        labels=args.labels,
        split_name=args.split_name,
        image_size=args.image_size,
        samples_per_shard=args.samples_per_shard,
        workers=args.workers,
        classes=args.classes,
        limit=args.limit,
        holdout=args.holdout,
        holdout_destination=args.holdout_dst,
    )
    result["seconds"] = round(time.monotonic() - start, 2)
    if args.json:
        print(json.dumps(result))
        return
    for split in result["splits"]:
        print(
            f"{split['folder']}: {split['samples']} pictures of {len(result['classes'])} classes in {split['shards']} "
            f"shards, {split['bytes'] / 1e6:.1f} MB, index {split['index_hash'][:12]}"
        )
    if result["skipped_files"]:
        print(f"skipped {result['skipped_files']} files that are no pictures")


if __name__ == "__main__":
    run_entry(main)
