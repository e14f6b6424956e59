"""The frozen timm backbone, LNLoRA branches beside its layers, adapter files."""
