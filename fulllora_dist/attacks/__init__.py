"""Gradient attacks on any model of pixels in [0, 1], and the threat models (Linf, L2, L1) that bound them."""
