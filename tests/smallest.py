"""What configs of tests share: one with nothing but what has no default, and a tiny model."""

SMALLEST = """
model: {backbone: vit_tiny_patch16_224.augreg_in21k_ft_in1k}
threat: {eps: 4/255}
method: {name: pgd, steps: 2}
data: {train: shards}
run: {output_dir: out}
"""

TINY_MODEL = """
model:
  backbone: vit_tiny_patch16_224
  pretrained: false
  num_classes: 3
  image_size: 16
  model_kwargs: {{patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}
adapter: {{rank: 2}}
"""
"""The beginning of a config of three classes of images of 16 pixels, for `str.format`."""
