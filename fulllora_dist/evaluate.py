"""The script that launchers start: `deepspeed fulllora_dist/evaluate.py --config FILE`; see commands/evaluate.py."""

import sys
from pathlib import Path

# run as a script, this folder heads sys.path, where its modules would hide others
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.commands.evaluate import main

if __name__ == "__main__":
    run_entry(main)
