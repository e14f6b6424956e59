"""Used by all packages: errors, randomness, units, atomic files, the base of settings, confidence intervals."""
