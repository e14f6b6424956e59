"""Adapters in an MLflow store: see fulllora_dist/commands/adapters.py."""

from fulllora_dist.commands.adapters import main
from fulllora_dist.commands.entry import run_entry

if __name__ == "__main__":
    run_entry(main)
