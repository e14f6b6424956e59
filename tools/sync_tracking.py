"""Send to MLflow what a run has not sent itself: see fulllora_dist/commands/sync.py."""

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.commands.sync import main

if __name__ == "__main__":
    run_entry(main)
