"""The index of shards that are there already: see fulllora_dist/commands/shards.py."""

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.commands.shards import index

if __name__ == "__main__":
    run_entry(index)
