"""What every room may use: errors, randomness, units, atomic files, the base of settings, intervals."""
