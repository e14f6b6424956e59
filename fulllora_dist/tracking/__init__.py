"""Metrics and artifacts of a run, to local files at once and to MLflow from a thread."""
