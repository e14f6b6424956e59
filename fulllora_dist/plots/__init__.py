"""Figures: examples, robustness curves, training curves, maps of branches."""
