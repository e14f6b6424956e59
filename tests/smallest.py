"""The config with nothing but what has no default, for tests of the values in it."""

SMALLEST = """
model: {backbone: vit_tiny_patch16_224.augreg_in21k_ft_in1k}
threat: {eps: 4/255}
method: {name: pgd, steps: 2}
data: {train: shards}
run: {output_dir: out}
"""
