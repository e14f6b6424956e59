"""WebDataset shards that are there -> one index, on disk or in a bucket.

    python tools/index_shards.py shards/train
    python tools/index_shards.py 's3://bucket/imagenet/train/train-{000000..001281}.tar' --workers 16
    python tools/index_shards.py 'https://host/set/{000..127}.tar' --output index/ --classes names.txt --label-field y

Each shard is read once, from its first to its last byte, and refused by name and offset unless it is a complete, plain
tar of samples with one picture (.jpg, .jpeg, .png, .webp) and one label (.cls, or a field of .json), every key once.
What was read survives an interruption: the same command goes on with the other shards. The index comes last.
"""

import argparse
import json
import os
import time
from pathlib import Path

from fulllora_dist.data.indexing import index_shards
from fulllora_dist.errors import UserError, run_entry


def _classes(text: str) -> int | list[str]:
    if text.isdecimal():
        return int(text)
    try:
        return [line.strip() for line in Path(text).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {text}: a number, or a file with one class name a line, is right") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "shards",
        metavar="URL",
        nargs="+",
        help="path, s3://, gs://, http(s)://; {000..127} and {a,b} are spelt out, * and folders are listed (but over "
        "http). The order given is that of the sample ids",
    )
    parser.add_argument(
        "--output", metavar="WHERE", help="folder, URL or FILE.safetensors of the index (default: the shards' folder)"
    )
    parser.add_argument(
        "--classes",
        metavar="N|FILE",
        help="number of classes, or a file with their names in label order, one a line (default: as many as occur)",
    )
    parser.add_argument("--label-field", default="label", help="field of .json members (default: label)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a summary")
    return parser


def main() -> None:
    args = _parser().parse_args()
    start = time.monotonic()
    result = index_shards(
        args.shards,
        args.output,
        classes=None if args.classes is None else _classes(args.classes),
        label_field=args.label_field,
        workers=args.workers,
    )
    result["seconds"] = round(time.monotonic() - start, 2)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{result['index']}: {result['samples']} samples of {result['classes']} classes in {result['shards']} shards, "
        f"{result['bytes'] / 1e6:.1f} MB, index {result['index_hash'][:12]}"
    )
    if result["reused_shards"]:
        print(f"{result['reused_shards']} shards had been read by an earlier call")
    if result["empty_classes"]:
        print(f"{result['empty_classes']} classes have no samples")


if __name__ == "__main__":
    run_entry(main)
