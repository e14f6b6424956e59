"""Other models, whose adversarial examples the evaluated one gets: the attacks `transfer:ADAPTER`."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fulllora_dist.attacks.victim import Victim
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.class_names import match_classes
from fulllora_dist.evaluation.attack_names import AttackName
from fulllora_dist.evaluation.entering import outputs_of
from fulllora_dist.evaluation.trained import classes_of

Sources = Mapping[str, nn.Module]
"""By the ADAPTER of their attacks: fp32 pixels [B, 3, H, W] in [0, 1] -> logits [B, classes]."""


class _Reordered(nn.Module):
    """A model with its outputs in another's order."""

    def __init__(self, model: nn.Module, outputs: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("outputs", outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, self.outputs]


def load_sources(attacks: Sequence[str], load: Callable[[str], nn.Module]) -> dict[str, nn.Module]:
    """The models that these attacks need.

    Args:
        attacks: names.
        load: a model by what stands behind `transfer:`.
    """
    return {attack.source: load(attack.source) for attack in AttackName.parse_all(attacks) if attack.kind == "transfer"}


def match_source(source: nn.Module, predict: nn.Module, pixels: Tensor, data: Sequence[str], name: str) -> nn.Module:
    """A source, moved to the device of the images, with its outputs in the evaluated model's order.

    Args:
        pixels: [1, 3, H, W], an image of the evaluation.
        data: class names of the data.
        name: of the attack, for messages.

    Raises:
        UserError: it does not take such images, or has other classes.
    """
    try:
        model = Victim(source).to(pixels.device)
        ours, theirs = outputs_of(predict, pixels), outputs_of(model, pixels)
        if ours != theirs:
            raise UserError(f"it has {theirs} outputs, the evaluated model {ours}")
        match = match_classes(
            classes_of(source, data), classes_of(predict, data), model_is="it", data_is="the evaluated model"
        )
    except UserError as error:
        raise UserError(f"evaluation.attacks: {name}: {error}") from None
    return model if match.outputs is None else _Reordered(model, torch.from_numpy(match.outputs).to(pixels.device))
