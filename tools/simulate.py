"""What a run would take on a cluster: see fulllora_dist/commands/simulate.py."""

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.commands.simulate import main

if __name__ == "__main__":
    run_entry(main)
