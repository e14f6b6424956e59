"""The difference between two evaluations: see fulllora_dist/commands/compare.py."""

from fulllora_dist.commands.compare import main
from fulllora_dist.commands.entry import run_entry

if __name__ == "__main__":
    run_entry(main)
