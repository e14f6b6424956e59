"""Runs on a cluster: see fulllora_dist/commands/launch.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # its own repository, whatever else is installed

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.commands.launch import main

if __name__ == "__main__":
    run_entry(main)
