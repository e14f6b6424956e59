"""Robust accuracy, and whether to believe it."""
