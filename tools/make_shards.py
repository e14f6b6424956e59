"""Images -> WebDataset shards + index: see fulllora_dist/commands/shards.py."""

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.commands.shards import make

if __name__ == "__main__":
    run_entry(make)
