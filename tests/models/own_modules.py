"""Modules that are not ours: torchvision's and transformers' ViTs, shallow and with random weights, and an own one."""

from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from tests.tiny import CLASSES, SIDE

HALF: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}


def torchvision_vit() -> nn.Module:
    vit = torchvision.models.VisionTransformer(SIDE, 4, 2, 2, 32, 64, num_classes=CLASSES)
    torch.nn.init.normal_(vit.heads.head.weight)  # torchvision's starts at zero
    return vit


def hugging_face_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=SIDE, patch_size=4, num_labels=CLASSES))


class Encoder(nn.Module):
    """torch's own encoder layer, which calls none of its layers in its fused operation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, stride=4)
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.idle = nn.Linear(32, 32)
        self.logged = nn.Linear(32, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder(self.embed(x).flatten(2).transpose(1, 2))
        self.logged(tokens)
        return self.head(tokens.mean(dim=1)) * 2


TARGETS: dict[str, tuple[Any, Any]] = {
    "torchvision": (torchvision_vit, ["mlp.0", "mlp.3", "conv_proj"]),
    "hugging face": (hugging_face_vit, ["q_proj", "k_proj", "v_proj", "fc1", "projection"]),
}
""": how it is made, and layers for branches, the patch embedding's convolution among them."""
