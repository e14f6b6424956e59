"""A model with an adapter, from pixels in [0, 1] to logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fulllora_dist.attacks.arguments import check_images, check_range, pixel_range
from fulllora_dist.attacks.victim import logits_of
from fulllora_dist.core.errors import UserError
from fulllora_dist.models.as_built import AsBuilt
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.families import Family
from fulllora_dist.models.original import Original
from fulllora_dist.models.placement import PlacementReport
from fulllora_dist.models.settings import Finetune, Precision, Qkv
from fulllora_dist.models.training_record import TrainingRecord

FIRST_BATCH_TOLERANCE = 0.5
"""How far pixels of a model's first batch may be outside [0, 1]: less than any normalisation takes them, and more than
a resize or a little noise does."""
WITH_BRANCHES = ("fulllora", "lora")


@dataclass(frozen=True)
class AdapterSpec:
    """How a backbone is adapted, as stored in an adapter file.

    Attributes:
        finetune: fulllora (branches with LN), lora (without), full, head or layernorm.
        rank: rank of every branch; None without branches.
        alpha: branches are scaled by alpha / rank.
        placement: components with a branch, from `COMPONENTS`.
        qkv: "separate", one branch each for q, k and v, or "shared", one for the fused projection.
        patch_norm_eps: eps of the LN over flattened patches, in squared units of the normalised pixels.
        head: "frozen", "trained" or "adapted".
        seed: seed of the branches' A.
        target_modules: which layers have a branch, in place of `placement`, as `adapt` was given them; None for a timm
            model of a family.
        blocks: numbers of the blocks with branches, see `Family.depths`; None for all.
        train_norms: whether the backbone's own LayerNorms train beside the branches.
    """

    finetune: Finetune
    rank: int | None
    alpha: float | None
    placement: tuple[str, ...]
    qkv: Qkv
    patch_norm_eps: float
    head: Literal["frozen", "trained", "adapted"]
    seed: int
    target_modules: str | tuple[str, ...] | None = None
    blocks: tuple[int, ...] | None = None
    train_norms: bool = False


class AdaptedModel(nn.Module):
    """pixels [B, 3, H, W] in [0, 1], fp32 -> logits [B, classes], fp32.

    Images of integers, of another shape, and a first batch far outside [0, 1] raise a UserError. Later batches are not
    looked at, as this would make each pass wait for the device.

    Attributes:
        backbone: the timm model, or what `adapt` was given, branches in place, under its own keys.
        family, info: the backbone's family and description.
        spec: how it is adapted.
        report: placement of the branches and number of trainable parameters.
        precision: precision of the blocks.
        pixels_checked: whether the first batch has been looked at; set it where pixels outside [0, 1] are meant.
        record: what is known of its training: class names, crop, threat model; set by `load`.
        as_built, original: what the backbone was built as, and what adapting changed of it.
        taken_off: "unload" or "merge", once that has taken the adapter off; None before.

    Example:
        model = fd.create_model("vit_base_patch16_224.augreg2_in21k_ft_in1k")
        logits = model(x)  # x [B, 3, 224, 224] in [0, 1]
        optimizer = torch.optim.AdamW(model.trainable().values(), lr=2e-3)
    """

    mean: Tensor
    std: Tensor
    pixels_checked = False

    def __init__(
        self,
        backbone: nn.Module,
        family: Family,
        info: BackboneInfo,
        spec: AdapterSpec,
        report: PlacementReport,
        precision: Precision,
        original: Original,
    ):
        super().__init__()
        self.backbone = backbone
        self.family = family
        self.info = info
        self.spec = spec
        self.report = report
        self.precision = precision
        self.original = original
        self.taken_off: Literal["unload", "merge"] | None = None
        self.record = TrainingRecord()
        self._trainable = tuple(n for n, p in backbone.named_parameters() if p.requires_grad)
        self.as_built = AsBuilt.of(backbone, {*self._trainable, *self.statistics()}, original.attributes)
        device = next(backbone.parameters()).device
        self.register_buffer("mean", torch.tensor(info.mean, device=device).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(info.std, device=device).view(1, 3, 1, 1), persistent=False)
        self.register_load_state_dict_pre_hook(_accept_timm_keys)

    def forward(self, pixels: Tensor) -> Tensor:
        return logits_of(self.backbone(self._normalised(pixels)))

    def forward_features(self, pixels: Tensor) -> Tensor:
        """As timm's: what the head pools, e.g. [B, N, D] of a ViT.

        Raises:
            UserError: the backbone has no `forward_features`.
        """
        features = getattr(self.backbone, "forward_features", None)
        if features is None:
            raise UserError(f"forward_features: {self.info.name} has none; it is a method of timm's models")
        return features(self._normalised(pixels))

    def _normalised(self, pixels: Tensor) -> Tensor:
        check_images(pixels, "pixels", channels=3)
        if not self.pixels_checked:
            self._check_first(pixels)
        return (pixels.to(self.mean.dtype) - self.mean) / self.std

    def _check_first(self, pixels: Tensor) -> None:
        """Refuse normalised images and those of 0..255, by the first batch that has numbers."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or pixels.is_meta:
            return
        try:
            low, high = pixel_range(pixels)
        except RuntimeError:  # within vmap, or of a FakeTensor
            return
        try:
            check_range(low, high, "pixels", FIRST_BATCH_TOLERANCE)
        except UserError as error:
            raise UserError(f"{error}; where they are meant, set model.pixels_checked = True") from None
        self.pixels_checked = True

    @property
    def num_classes(self) -> int:
        """Number of outputs."""
        return self.info.num_classes

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, and as a fraction of backbone and head."""
        trainable, total = self.report.trainable, self.report.total
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,} || backbone params: {total:,} || trainable%: {share:.4f}")

    def train(self, mode: bool = True) -> "AdaptedModel":
        """Set training mode, except for BatchNorm, which keeps the statistics of the backbone.

        Batch statistics would change the backbone, and make the result depend on how a batch is split over ranks.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the blocks in the backward pass instead of storing them.

        Raises:
            UserError: the model does not support activation checkpointing.
        """
        if self.family.checkpointing:
            self.backbone.set_grad_checkpointing(enabled)  # type: ignore[operator]
        elif enabled:
            raise UserError(
                f"distributed.activation_checkpointing: {self.info.name} of the family {self.family.name} does not "
                "support it; set it to off"
            )

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by their names in the backbone, also while an attack has frozen them.

        Raises:
            UserError: the adapter was taken off.
        """
        self.check_adapted("trainable")
        parameters = dict(self.backbone.named_parameters())
        return {name: parameters[name] for name in self._trainable}

    def held(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """{name: (dtype, shape)} of the trainable tensors as the model was built, also while ZeRO-3 has them."""
        return {name: self.as_built.tensors[name] for name in self._trainable}

    def statistics(self) -> dict[str, Tensor]:
        """The backbone's buffers, which are stored with a whole model (finetune: full), else nothing."""
        if self.spec.finetune != "full":
            return {}
        parameters = dict(self.backbone.named_parameters())
        return {name: tensor for name, tensor in self.backbone.state_dict().items() if name not in parameters}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; keys of timm, without `backbone.`, are accepted too.

        Raises:
            UserError: `strict` is false and not a single tensor fits.
        """
        result = super().load_state_dict(state_dict, strict, assign)
        if state_dict and len(result.unexpected_keys) >= len(state_dict):
            raise UserError(
                f"load_state_dict: none of its {len(state_dict)} tensors is one of the model's, e.g. "
                f"{next(iter(state_dict))}; the model has names such as {next(iter(self.state_dict()))}"
            )
        return result

    def check_adapted(self, what: str) -> None:
        """Raises UserError, naming the function `what`: `unload` or `merge` has taken the adapter off."""
        if self.taken_off is not None:
            raise UserError(f"{what}: {self.taken_off} has taken the adapter off this model; adapt or load it again")

    def check_savable(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Check that an adapter file would bring back this very model.

        Args:
            state: trained tensors to save instead of the model's own.

        Raises:
            UserError: it would not; the message says what changed since the model was created.
        """
        self.check_adapted("save_adapter")
        given = self.info.module is not None
        self.as_built.check(self.backbone, given)
        for name in ("mean", "std"):
            now, then = getattr(self, name).flatten().tolist(), torch.tensor(getattr(self.info, name)).tolist()
            if now != then:
                raise UserError(
                    f"save_adapter: the model's {name} is {now}, and was {then} when it was created; give {name} to "
                    f"{'adapt' if given else 'create_model'}"
                )
        check_tensors(self.held(), self.trainable() if state is None else state)

    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        """Set the adapter's tensors.

        Raises:
            UserError: names or shapes differ from this model's.
        """
        set_tensors(self.trainable(), state)


def check_tensors(expected: Mapping[str, tuple[torch.dtype, torch.Size]], state: Mapping[str, Tensor]) -> None:
    """Check the tensors of an adapter.

    Args:
        expected: {name: (dtype, shape)}.

    Raises:
        UserError: names, shapes or dtypes differ, or values are not finite.
    """
    if wrong := sorted(expected.keys() ^ state.keys()):
        raise UserError(f"adapter: {wrong[0]} is {'missing' if wrong[0] in expected else 'not in this model'}")
    for name, (dtype, shape) in expected.items():
        tensor = state[name]
        if tensor.shape != shape:
            raise UserError(f"adapter: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise UserError(f"adapter: {name} must be {dtype}, got {tensor.dtype}")
        if count := int((~torch.isfinite(tensor)).sum()):
            raise UserError(
                f"adapter: {count} of {tensor.numel()} values of {name} are not finite; take an adapter from before "
                "the training diverged"
            )


def set_tensors(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Set a model's tensors to those of an adapter.

    Raises:
        UserError: names or shapes differ.
    """
    if wrong := sorted(own.keys() ^ state.keys()):
        raise UserError(f"adapter: {wrong[0]} is {'missing' if wrong[0] in own else 'not in this model'}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UserError(f"adapter: {name} must have shape {tuple(tensor.shape)}, got {tuple(state[name].shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _accept_timm_keys(model: nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
    """Let a timm checkpoint, whose keys lack the prefix `backbone.`, load strictly into the adapted model."""
    own = prefix + "backbone."
    if any(key.startswith(own) for key in state_dict):
        return
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[own + key.removeprefix(prefix)] = state_dict.pop(key)
