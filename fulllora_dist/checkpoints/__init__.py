"""Checkpoints of a run: their format on a disk or in a bucket, and which are kept."""
