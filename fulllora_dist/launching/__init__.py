"""Runs as jobs of a cluster, through submitit: `jobs/launch.py` is their command line."""
