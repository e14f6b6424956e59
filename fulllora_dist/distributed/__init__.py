"""Ranks, DeepSpeed's engine at any ZeRO stage, the learning rate schedule, signals."""
