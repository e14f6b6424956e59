"""Adapters in MLflow's model registry: published, promoted, rolled back, loaded."""
