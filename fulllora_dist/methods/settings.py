"""Settings of the training methods and their targets. They need no torch, so that a config is checked at once."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fulllora_dist.core.settings import Settings
from fulllora_dist.core.units import Size


class MethodSettings(Settings):
    """Settings of all methods. Subclasses narrow `name` to one value.

    Attributes:
        needs_labels: whether the method needs one label per image, so that images cannot be mixed.
    """

    needs_labels: ClassVar[bool] = False
    name: str
    """Name of the method."""


class CleanFractionSettings(MethodSettings):
    """Settings of the methods whose weight step takes perturbed images alone."""

    clean_fraction: float = Field(0.0, ge=0, lt=1)
    """Fraction of the images that the weight step takes unperturbed, after Kurakin et al. (arXiv 1611.01236): more
    accurate on clean images, less robust."""


class MultiStepSettings(MethodSettings):
    steps: int = Field(3, ge=1)
    """Attack steps, each with one forward and one backward pass."""
    step_size: Size | None = None
    """Step size, for pixels in [0, 1]; null takes 2.5 eps / steps, as Madry et al. do, but at most eps. Like eps, it is
    smaller during threat.eps_warmup_ratio."""
    attention_drop: float = Field(0.0, ge=0, le=1)
    """Fraction of the run's batches during which attention gradients are randomly dropped, at a decreasing rate; 0
    disables it."""
    perturbation_mask: float = Field(0.0, ge=0, le=1)
    """Fraction of the run's batches during which the perturbation of patches is randomly masked, at a decreasing rate;
    0 disables it."""
    mask_patch: int | None = Field(None, ge=1)
    """Side of the masked patches in pixels; null takes the backbone's patch size."""


class SingleStepSettings(MethodSettings):
    step: float = Field(1.0, gt=0)
    """Step size in units of eps."""


class FGSMRSSettings(CleanFractionSettings, SingleStepSettings):
    name: Literal["fgsm_rs"] = "fgsm_rs"
    step: float = Field(1.25, gt=0)
    """Step size in units of eps. The paper's 1.25 was tuned on CIFAR-10; larger steps collapse more easily."""


class FreeSettings(MethodSettings):
    name: Literal["free"] = "free"
    replays: int = Field(4, ge=1)
    """Optimizer updates per batch (m in the paper)."""
    step_size: Size | None = None
    """Step size of the perturbation, for pixels in [0, 1]; null takes eps, as in the paper. Like eps, it is smaller
    during threat.eps_warmup_ratio."""


class MARTSettings(MultiStepSettings):
    needs_labels = True
    name: Literal["mart"] = "mart"
    weight: float = Field(5.0, ge=0)
    """Weight of the divergence (lambda in the paper)."""
    start: Size = 1e-3
    """Standard deviation of the attack's Gaussian start, for pixels in [0, 1]."""


class NFGSMSettings(CleanFractionSettings, SingleStepSettings):
    name: Literal["n_fgsm"] = "n_fgsm"
    noise: float = Field(2.0, ge=0)
    """Radius of the uniform noise in units of eps."""


class PGDSettings(CleanFractionSettings, MultiStepSettings):
    name: Literal["pgd"] = "pgd"
    random_start: bool = True
    """Start at a uniform random point in the ball instead of at the image."""


class StandardSettings(MethodSettings):
    name: Literal["standard"] = "standard"


class TRADESSettings(MultiStepSettings):
    name: Literal["trades"] = "trades"
    beta: float = Field(6.0, ge=0)
    """Weight of the divergence (1 / lambda in the paper); larger is more robust, but less accurate on clean images."""
    start: Size | None = None
    """Standard deviation of a Gaussian start of the attack, for pixels in [0, 1]; null starts uniformly in the ball.
    The paper's code has 0.001, in fp32: the divergence is flat at the image itself, and so near to it the gradient
    depends on rounding, which makes it noise in bf16."""


class TargetSettings(Settings):
    """Mixed images and soft labels. Mixing applies to the attack and the weight step, smoothing to the latter only;
    Free has one backward pass for both."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Fraction of the label that is spread over all classes."""
    mixup: float = Field(0.0, ge=0)
    """alpha of the Beta(alpha, alpha) distribution of the mixup ratio; 0 disables mixup."""
    cutmix: float = Field(0.0, ge=0)
    """alpha of the Beta(alpha, alpha) distribution of the CutMix area; 0 disables CutMix."""
    mix_probability: float = Field(1.0, ge=0, le=1)
    """Fraction of images that are mixed; with both mixup and cutmix, half of them each."""

    @property
    def mixes(self) -> bool:
        """Whether labels become probabilities."""
        return bool(self.mixup or self.cutmix) and self.mix_probability > 0

    @model_validator(mode="after")
    def _agree(self) -> "TargetSettings":
        if self.mix_probability != 1 and not (self.mixup or self.cutmix):
            raise ValueError("mix_probability has no effect without targets.mixup or targets.cutmix; set one of them")
        return self


METHOD_SETTINGS: dict[str, type[MethodSettings]] = {
    settings.model_fields["name"].default: settings
    for settings in (
        FGSMRSSettings,
        FreeSettings,
        MARTSettings,
        NFGSMSettings,
        PGDSettings,
        StandardSettings,
        TRADESSettings,
    )
}
"""Settings of all methods by their `name`, those of plugins included."""
