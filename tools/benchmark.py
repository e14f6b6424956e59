"""Side-by-side measurements, all arms interleaved in one run.

python tools/benchmark.py step --output FILE    one adversarial step: FullLoRA, peft's LoRA, full finetuning, the bound
python tools/benchmark.py run --output FILE     training by train.py against a plain PyTorch loop on the same images
python tools/benchmark.py data --output FILE    images a second: ours, webdataset, ImageFolder; cost of the plan
python tools/benchmark.py several    several adapters on one backbone: switching, mixed batches, memory
"""

import argparse
import importlib

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.commands.parser import Parser


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=("step", "run", "data", "several"))
    parser.add_argument("settings", nargs=argparse.REMAINDER, help="see --help of each")
    args = parser.parse_args()
    importlib.import_module(f"benchmark_{args.what}").main(args.settings)


if __name__ == "__main__":
    run_entry(main)
