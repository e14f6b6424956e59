"""Every setting of a run, typed, with its meaning under it.

`config_file.py` reads a YAML file and the command line into a `Config`; `--help` prints this page.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fulllora_dist.attacks.threat import Norm
from fulllora_dist.methods import METHODS, MethodSettings
from fulllora_dist.methods.targets import TargetSettings
from fulllora_dist.models.finetune import Finetune, Head, Precision
from fulllora_dist.models.placement import COMPONENTS, Component
from fulllora_dist.pixels import Size, check_pixel_range


class Settings(BaseModel):
    """Base of all sections: unknown keys are refused, nothing changes after the start."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Area = Annotated[float, Field(gt=0, le=1)]


class ModelSettings(Settings):
    backbone: str
    """timm's full arch.tag, e.g. vit_base_patch16_224.augreg2_in21k_ft_in1k."""
    checkpoint: str | None = None
    """Weights under timm's keys (.safetensors or .pth), a path or an fsspec URL; null takes timm's hub."""
    pretrained: bool = True
    """false starts from random weights (drawn from run.seed)."""
    num_classes: int | None = Field(None, ge=2)
    """Outputs; null keeps the checkpoint's. Another number starts a new head."""
    classes: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=2)
    """Rows of the checkpoint's head to keep, in the order of the data's classes."""
    image_size: int | None = Field(None, ge=1)
    """Side in pixels; null takes the pretrained one. Another resamples the position embedding."""
    mean: tuple[float, float, float] | None = None
    """Normalisation, in [0, 1] pixels; null takes the tag's."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Normalisation, in [0, 1] pixels; null takes the tag's."""
    architecture: dict[str, Any] = {}
    """Further arguments of timm.create_model, for models of one's own. Dropout and drop_path draw from torch's own
    generator: they are the one randomness that depends on the number of ranks and is not resumed exactly."""
    precision: Precision = "fp32"
    """bf16 computes the blocks in bf16; pixels, patch embedding, adapters, optimizer and head stay in fp32."""


class AdapterSettings(Settings):
    budget: float = Field(0.05, gt=0, le=1)
    """Share of backbone + head that may train, head counted; the rank follows from it."""
    rank: int | None = Field(None, ge=1)
    """Rank of every branch, instead of the budget."""
    alpha: float | None = Field(None, gt=0)
    """Branches are scaled by alpha / rank; null takes alpha = rank."""
    placement: tuple[Component, ...] = COMPONENTS
    """Components with a branch."""
    qkv: Literal["separate", "shared"] = "separate"
    """A branch each for q, k and v, or one for the fused projection."""
    patch_norm_eps: float = Field(1e-2, gt=0)
    """eps of the LN over flattened patches, in squared units of normalised pixels."""
    head: Head = "auto"
    """frozen, trained or adapted; auto freezes the backbone's own classes and trains new ones."""
    start_from: str | None = None
    """Folder of an adapter to start from; its backbone and shapes must be these."""


class ThreatSettings(Settings):
    norm: Norm = "linf"
    """Norm of the perturbation: linf (of each pixel and channel) or l2 (of the whole picture)."""
    eps: Size
    """Its size in pixels of [0, 1]: 4/255 or a number."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the batches over which the eps of training rises linearly from 0 to its full size."""
    step_warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the batches over which the attack's step size rises linearly from 0 to its full size."""

    @field_validator("eps")
    @classmethod
    def _in_range(cls, eps: float, info: ValidationInfo) -> float:
        return check_pixel_range(eps) if info.data.get("norm") == "linf" else eps


class RandAugmentSettings(Settings):
    operations: int = Field(2, ge=1)
    """Operations on each picture, drawn from the 14 of the paper."""
    magnitude: int = Field(9, ge=0, le=30)
    """Strength of each, 0 to 30."""


class DataSettings(Settings):
    train: str
    """Shards with their index: a folder, a URL (s3://, gs://, https://), or path or URL of an index (.safetensors)."""
    validation: str | None = None
    """Shards for the final evaluation, named like data.train; null leaves it out."""
    held_out: str | None = None
    """Shards of pictures held out of training (make_shards.py --holdout), for the guard; null leaves it out."""
    augment: Literal["none", "flip", "crop", "randaugment"] = "crop"
    """none, horizontal flip, random resized crop and flip, or these and RandAugment; keyed by the sample, the same on
    any ranks."""
    crop_scale: tuple[Area, Area] = (0.25, 1.0)
    """Area of the random crop as a share of the picture."""
    randaugment: RandAugmentSettings = RandAugmentSettings()
    """How strong RandAugment is."""
    decode: Literal["fast", "pil"] = "fast"
    """Of training pictures: libjpeg-turbo and torch's antialiased resize, or Pillow. Evaluation always uses Pillow."""
    crop_pct: float | None = Field(None, gt=0, le=1)
    """Central share that the evaluation crop keeps; null takes the backbone's."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"] | None = None
    """Of every resize; null takes the backbone's."""
    workers: int = Field(2, ge=0)
    """Reading and decoding processes a rank; 0 does it in the training process."""
    max_bad_samples: int = Field(10, ge=0)
    """Damaged training pictures that others of the same window may replace, over the whole run; one more ends it."""
    connections: int = Field(4, ge=1)
    """Ranges of remote shards in flight of each process."""
    request_seconds: float = Field(60.0, gt=0)
    """Until an unanswered request is given up and made again."""
    retry_seconds: float = Field(600.0, gt=0)
    """Until a range that the store does not deliver ends the run."""
    cache: str | None = None
    """Local folder that keeps what was read of remote shards, for all processes of the machine; null keeps nothing."""
    cache_gb: float = Field(100.0, gt=0)
    """Its largest size, 10**9 bytes; what was used longest ago goes first."""


class OptimSettings(Settings):
    """AdamW, linear warm-up, then a cosine; one value an optimizer update."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the updates in which the learning rate rises linearly."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's averaging of gradient and squared gradient."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled, on matrices; norms and biases are left out."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0 does not clip."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of an average of the adapter, which is then what is saved and evaluated; 0 keeps none."""
    batch_size: int = Field(256, ge=1)
    """Pictures an optimizer update, over all ranks and micro-batches."""
    epochs: float = Field(10, gt=0)
    """Passes over the data in optimizer updates: Free with m replays draws 1 / m as many batches."""


class DistributedSettings(Settings):
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 1 shards the optimizer, 2 the gradients, 3 the weights too (gathered in each attack pass)."""
    grad_accumulation: int = Field(1, ge=1)
    """Micro-batches an optimizer update and rank."""
    activation_checkpointing: Literal["off", "weight_step", "all"] = "off"
    """Recompute the blocks in backward: in the weight step alone, or in the attack's passes too."""
    timeout_minutes: float = Field(30.0, gt=0)
    """Until a rank gives up that waits for another one, and ends the run; longer than data.retry_seconds."""


class RunSettings(Settings):
    output: str
    """Folder of the run: states, adapter, evaluation, metrics. A run found there is resumed."""
    states: str | None = None
    """Where its states lie instead: a folder or bucket (s3://, gs://). While a bucket fails, they go to the output."""
    seed: int = 0
    """Of everything random."""
    save_every: int = Field(500, ge=1)
    """Batches between states of the run."""
    save_minutes: float | None = Field(10.0, gt=0)
    """And minutes; null goes by batches alone."""
    keep_states: int = Field(2, ge=1)
    """How many states are kept."""
    max_skipped: int = Field(10, ge=0)
    """Updates in a row that may be skipped, on all ranks together, as the loss or its gradient is not finite."""
    resume_from: str | None = None
    """Folder or URL of a state to start from where the run has none yet."""
    log_every: int = Field(10, ge=1)
    """Batches between logged metrics."""

    @field_validator("output")
    @classmethod
    def _on_a_disk(cls, output: str) -> str:
        if "://" in output:
            raise ValueError("a folder on a disk is right; run.states may be a bucket")
        return output


class EvaluationSettings(Settings):
    attacks: tuple[str, ...] = ("clean", "pgd20")
    """clean, fgsm, autoattack, parts of it (apgd-ce+square), pgdK, cwK, dlrK for K steps; 5 restarts: pgd20x5."""
    eps: tuple[Size, ...] = ()
    """Further sizes of the perturbation beside threat.eps, for robust accuracy against eps."""
    n: int | None = Field(None, ge=1)
    """How many pictures, drawn evenly over the classes; null takes all."""
    first: int | None = Field(None, ge=1)
    """Instead of n, so many from the beginning of the index."""
    ids: str | None = None
    """Instead of n, a text file (path or URL) with an id or a picture's name a line, as RobustBench's 5,000."""
    check: int = Field(50, ge=0)
    """On how many pictures symptoms of masked gradients are looked for; 0 looks for none."""
    batch_size: int = Field(64, ge=1)
    """Pictures a rank and batch."""


class TrackingSettings(Settings):
    enabled: bool = True
    """false logs to the output folder alone; `tracking: none` in place of the section says the same."""
    uri: str | None = None
    """MLflow's tracking store; null takes MLFLOW_TRACKING_URI, else sqlite in mlflow.db beside the output folder."""
    experiment: str = "fulllora"
    """MLflow experiment."""
    run_name: str | None = None
    """Name of the run; null takes the output folder's."""
    wait_seconds: float = Field(60.0, ge=0)
    """How long the end of a run waits for a store that does not answer; the rest is sent later (docs/tracking.md)."""
    system_seconds: float | None = Field(15.0, gt=0)
    """Seconds between samples of each node's CPU, memory, disk, network and GPUs; null takes none."""
    publish: bool = False
    """true makes the adapter a version in MLflow's model registry at the end (docs/registry.md)."""
    registered_model: str | None = None
    """Name of the registered model; null takes BACKBONE-DATA-NORM-EPS."""


def _tracking(value: object) -> object:
    """`none` or null -> the settings of no tracking."""
    return {"enabled": False} if value in (None, "none") else value


def _method(value: object) -> object:
    """`pgd` or {name: pgd, ...} -> the settings of that method."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping):
        name = value.get("name")
        if not isinstance(name, str) or name not in METHODS:
            raise ValueError(f"name: {name!r} is no method; known: {', '.join(METHODS)}")
        return METHODS[name].Settings.model_validate(dict(value))
    return value


MethodChoice = Annotated[SerializeAsAny[MethodSettings], BeforeValidator(_method)]


class GuardSettings(Settings):
    """Robust accuracy on data.held_out in the midst of training; the state that is best by it is kept, and a collapse
    (catastrophic overfitting) is noticed (docs/guards.md)."""

    every: int = Field(50, ge=1)
    """Batches between two looks, and until a collapse is noticed; the last batch is looked at too. With 10 steps on 256
    pictures a look costs as much as 2.6 batches of PGD-3 at batch size 256, and a quarter of that at 1,024; twice as
    much with optim.ema, where the average and what it is of are looked at."""
    n: int = Field(256, ge=1)
    """How many of the pictures, at most; drawn evenly over the classes, the same each time."""
    steps: int = Field(10, ge=1)
    """Steps of PGD, at threat.eps."""
    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """After a collapse: say so; end the run; or go back to the newest state that was looked at and good, and on from
    there with safer_method, safer_lr and safer_eps."""
    collapse_below: float = Field(0.5, gt=0, lt=1)
    """A collapse is robust accuracy below this share of its best, once that is clearly above chance, and by more than
    two standard errors. With optim.ema it is that of the parameters themselves: their average would show it late."""
    max_rollbacks: int = Field(2, ge=1)
    """How often a run may go back; one more collapse ends it."""
    safer_method: MethodChoice | None = None
    """How batches after a rollback are trained; null keeps pgd, trades and mart, and takes pgd in place of the rest."""
    safer_lr: float = Field(0.5, gt=0, le=1)
    """Factor of the learning rate after each rollback."""
    safer_eps: Annotated[Size, Field(gt=0)] | None = None
    """Size of the perturbation that is trained on after a rollback, in pixels of [0, 1]; null keeps that of each phase,
    and so does a phase with a smaller one."""


class PhaseSettings(Settings):
    """A part of the run with settings of its own; what is left out is the run's."""

    share: float = Field(gt=0, le=1)
    """Of the run's optimizer updates; the shares of all phases add up to 1."""
    image_size: int | None = Field(None, ge=1)
    """Side of the pictures in pixels, a multiple of the patch size; null takes the model's."""
    method: MethodChoice | None = None
    """How it trains; null takes the run's method."""
    eps: Size | None = None
    """Size of the perturbation in pixels of [0, 1]; null takes threat.eps."""


PIXELS = ("step_size", "start")
"""Settings of methods that are sizes of a perturbation."""

_DERIVED_FROM_OURS = {
    "train_batch_size": "optim.batch_size",
    "train_micro_batch_size_per_gpu": "optim.batch_size and distributed.grad_accumulation",
    "gradient_accumulation_steps": "distributed.grad_accumulation",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim",
    "fp16": "model.precision",
    "bf16": "model.precision",
    "torch_autocast": "model.precision",
    "amp": "model.precision",
    "data_types": "model.precision",
    "activation_checkpointing": "distributed.activation_checkpointing",
}


class Config(Settings):
    """The whole run."""

    finetune: Finetune = "fulllora"
    """What trains: fulllora (LNLoRA branches), lora (the same without LN), full, head, layernorm."""
    model: ModelSettings
    adapter: AdapterSettings = AdapterSettings()
    threat: ThreatSettings
    method: MethodChoice
    """How it trains: a name, or name and settings (below)."""
    phases: tuple[PhaseSettings, ...] = ()
    """The run in parts, e.g. most of it with small pictures and a single-step method, the end with PGD at full size."""
    targets: TargetSettings = TargetSettings()
    plugins: tuple[str, ...] = ()
    """Modules (or .py files) that are imported first: methods and families of one's own (docs/extending.md)."""
    data: DataSettings
    optim: OptimSettings = OptimSettings()
    distributed: DistributedSettings = DistributedSettings()
    deepspeed: dict[str, Any] = {}
    """More of DeepSpeed's own settings; those that follow from ours are refused here."""
    run: RunSettings
    guard: GuardSettings = GuardSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: Annotated[TrackingSettings, BeforeValidator(_tracking)] = TrackingSettings()

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        for key in self.deepspeed:
            if key in _DERIVED_FROM_OURS:
                raise ValueError(f"deepspeed.{key} follows from {_DERIVED_FROM_OURS[key]}; set that instead")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, Mapping):
            raise ValueError(
                f"deepspeed.zero_optimization: {zero!r} is no section; its stage is distributed.zero_stage"
            )
        if "stage" in zero:
            raise ValueError("deepspeed.zero_optimization.stage follows from distributed.zero_stage; set that instead")
        if self.optim.batch_size % self.distributed.grad_accumulation:
            raise ValueError(
                f"optim.batch_size: {self.optim.batch_size} does not divide by distributed.grad_accumulation "
                f"{self.distributed.grad_accumulation}"
            )
        self._check_phases()
        if self.guard.on_collapse != "warn" and self.data.held_out is None:
            raise ValueError(
                f"guard.on_collapse: {self.guard.on_collapse} needs data.held_out, pictures to notice a collapse on; "
                "make them with make_shards.py --holdout"
            )
        if self.finetune == "full" and self.adapter.start_from:
            raise ValueError("adapter.start_from: finetune: full has no adapter; set model.checkpoint")
        return self

    def _check_phases(self) -> None:
        total = sum(phase.share for phase in self.phases)
        if self.phases and abs(total - 1) > 1e-6:
            raise ValueError(f"phases: their shares add up to {total:g}; 1 is right")
        chosen = {"method": self.method}
        chosen |= {f"phases.{i}.method": phase.method for i, phase in enumerate(self.phases) if phase.method}
        if self.guard.safer_method is not None:
            chosen["guard.safer_method"] = self.guard.safer_method
        for name, method in chosen.items():
            if METHODS[method.name].needs_labels and self.targets.mixes:
                raise ValueError(f"{name}: {method.name} needs one label a picture; leave out targets.mixup and cutmix")
        if self.threat.norm == "linf":
            sizes = {f"{name}.{key}": getattr(method, key, None) for name, method in chosen.items() for key in PIXELS}
            sizes |= {f"phases.{i}.eps": phase.eps for i, phase in enumerate(self.phases)}
            sizes["guard.safer_eps"] = self.guard.safer_eps
            for name, size in sizes.items():
                try:
                    check_pixel_range(size or 0)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        trained = [self.threat.eps if phase.eps is None else phase.eps for phase in self.phases] or [self.threat.eps]
        safer_eps = self.guard.safer_eps
        if self.guard.on_collapse == "rollback" and safer_eps is not None and safer_eps >= max(trained):
            raise ValueError(
                f"guard.safer_eps: {safer_eps:g} is no smaller size, nothing is trained at more than {max(trained):g}"
            )

    def tracking_uri(self) -> str:
        """Where MLflow writes: our setting, else MLFLOW_TRACKING_URI, else sqlite beside the output folder."""
        beside = os.path.join(os.path.dirname(os.path.abspath(self.run.output)), "mlflow.db")
        return self.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{beside}"
