"""The training run: loop, phases, guard, resume, and what it leaves behind."""
