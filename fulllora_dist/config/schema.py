"""All settings of a run, typed and documented.

`load.py` reads a YAML file and the command line into a `Config`; `--help-settings` prints every setting
with its docstring.
"""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from fulllora_dist.attacks.settings import ThreatSettings
from fulllora_dist.checkpoints.settings import RunSettings
from fulllora_dist.config.training import GuardSettings, MethodChoice, PhaseSettings
from fulllora_dist.core.settings import Settings
from fulllora_dist.core.units import check_pixel_range
from fulllora_dist.data.settings import DataSettings
from fulllora_dist.distributed.settings import DistributedSettings, OptimSettings
from fulllora_dist.evaluation.settings import EvaluationSettings
from fulllora_dist.methods.settings import TargetSettings
from fulllora_dist.models.settings import (
    AdapterSettings,
    Finetune,
    ModelSettings,
)
from fulllora_dist.tracking.settings import TrackingSettings
from fulllora_dist.tracking.summary import RunSummary


def _tracking(value: object) -> object:
    """Turn `none` or null into disabled tracking."""
    return {"enabled": False} if value in (None, "none") else value


PIXELS = ("step_size", "start")
"""Method settings that are perturbation sizes, for pixels in [0, 1]."""

_DERIVED_FROM_OURS = {
    "train_batch_size": "optim.batch_size",
    "train_micro_batch_size_per_gpu": "optim.batch_size and distributed.gradient_accumulation_steps",
    "gradient_accumulation_steps": "distributed.gradient_accumulation_steps",
    "gradient_clipping": "optim.grad_clip",
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
    """What is trained: fulllora (LNLoRA branches), lora (without LN), full, head or layernorm."""
    model: ModelSettings
    adapter: AdapterSettings = AdapterSettings()
    threat: ThreatSettings
    method: MethodChoice
    """Training method: a name, or a name with its settings (below)."""
    phases: tuple[PhaseSettings, ...] = ()
    """Parts of the run with other settings, e.g. small images and a single-step method first, then PGD at full size."""
    targets: TargetSettings = TargetSettings()
    plugins: tuple[str, ...] = ()
    """Modules or .py files to import, which register methods and families (docs/extending.md)."""
    data: DataSettings
    optim: OptimSettings = OptimSettings()
    distributed: DistributedSettings = DistributedSettings()
    deepspeed: dict[str, Any] = Field({})
    """Additional DeepSpeed settings; those derived from other settings are rejected."""
    run: RunSettings
    guard: GuardSettings = GuardSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: Annotated[TrackingSettings, BeforeValidator(_tracking)] = TrackingSettings()

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        for key in self.deepspeed:
            if key in _DERIVED_FROM_OURS:
                raise ValueError(f"deepspeed.{key} is derived from {_DERIVED_FROM_OURS[key]}; set that instead")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, Mapping):
            raise ValueError(
                f"deepspeed.zero_optimization: must be a section, got {zero!r}; its stage is distributed.zero_stage"
            )
        if "stage" in zero:
            raise ValueError(
                "deepspeed.zero_optimization.stage is derived from distributed.zero_stage; set that instead"
            )
        if self.optim.batch_size % self.distributed.gradient_accumulation_steps:
            raise ValueError(
                "optim.batch_size must be divisible by distributed.gradient_accumulation_steps, got "
                f"{self.optim.batch_size} and {self.distributed.gradient_accumulation_steps}"
            )
        self._check_timeout()
        self._check_phases()
        self._check_store()
        if self.guard.on_collapse != "warn" and self.data.held_out is None:
            raise ValueError(
                f"guard.on_collapse: {self.guard.on_collapse} needs data.held_out, images to detect a collapse on; "
                "make them with fulllora shards --holdout"
            )
        if self.finetune == "full" and self.adapter.init_from:
            raise ValueError("adapter.init_from: finetune: full has no adapter; set model.checkpoint_path")
        return self

    def _check_timeout(self) -> None:
        given, data = self.distributed.timeout_minutes, self.data
        least = (data.retry_timeout_s + data.request_timeout_s) / 60
        if given is not None and given <= least:
            raise ValueError(
                "distributed.timeout_minutes: must exceed data.retry_timeout_s and data.request_timeout_s together, "
                f"{least:g} minutes, or a rank that waits for its data ends the run; got {given:g}"
            )

    def _check_phases(self) -> None:
        total = sum(phase.fraction for phase in self.phases)
        if self.phases and abs(total - 1) > 1e-6:
            raise ValueError(f"phases: their fractions must sum to 1, got {total:g}")
        chosen = {"method": self.method}
        chosen |= {f"phases.{i}.method": phase.method for i, phase in enumerate(self.phases) if phase.method}
        if self.guard.rollback_method is not None:
            chosen["guard.rollback_method"] = self.guard.rollback_method
        for name, method in chosen.items():
            if method.needs_labels and self.targets.mixes:
                raise ValueError(f"{name}: {method.name} needs one label per image; remove targets.mixup and cutmix")
        if self.threat.norm == "linf":
            sizes = {f"{name}.{key}": getattr(method, key, None) for name, method in chosen.items() for key in PIXELS}
            sizes |= {f"phases.{i}.eps": phase.eps for i, phase in enumerate(self.phases)}
            sizes["guard.rollback_eps"] = self.guard.rollback_eps
            for name, size in sizes.items():
                try:
                    check_pixel_range(size or 0)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        trained = [self.threat.eps if phase.eps is None else phase.eps for phase in self.phases] or [self.threat.eps]
        rollback_eps = self.guard.rollback_eps
        if self.guard.on_collapse == "rollback" and rollback_eps is not None and rollback_eps >= max(trained):
            raise ValueError(
                f"guard.rollback_eps: must be smaller than the largest training eps {max(trained):g}, got "
                f"{rollback_eps:g}"
            )

    def _check_store(self) -> None:
        """SQLAlchemy reads what follows a `?`, and from 2.1 on `%20`, as another file than is written."""
        uri = self.tracking_uri()
        if self.tracking.enabled and uri.startswith("sqlite:///") and re.search(r"\?|%[0-9a-fA-F]{2}", uri):
            remedy = "set tracking.uri, tracking=none or another folder"
            place = (
                f"run.output_dir: the MLflow store beside it, {uri}," if self.tracking.uri is None else "tracking.uri:"
            )
            raise ValueError(f"{place} must not have ? or %XX in its path; {remedy}")

    def timeout_minutes(self) -> float:
        """distributed.timeout_minutes, else what a rank may wait for its data: the last try of a range begins within
        data.retry_timeout_s, and the ranges of a batch may have to take turns. At least 15: ranks also wait for a
        checkpoint, for compilation, and for a bucket."""
        data = self.data
        return self.distributed.timeout_minutes or max(15, (data.retry_timeout_s + 5 * data.request_timeout_s) / 60)

    def tracking_uri(self) -> str:
        """The MLflow tracking URI: tracking.uri, else MLFLOW_TRACKING_URI, else sqlite next to the output folder."""
        beside = os.path.join(os.path.dirname(os.path.abspath(self.run.output_dir)), "mlflow.db")
        return self.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{beside}"

    def tracked_run(self) -> RunSummary:
        """The summary of this run for the tracker and the registry."""
        name = self.tracking.run_name or os.path.basename(os.path.abspath(self.run.output_dir))
        return RunSummary(self.run.output_dir, self.tracking, self.tracking_uri(), name, self.model_dump(mode="json"))
