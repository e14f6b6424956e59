"""The settings of a study: its arms, what is tried for each, which images choose and which are reported."""

import math
import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from fulllora_dist.core.settings import Location, Settings

Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0)]
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


def _check_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what}: must be lower-case letters, digits and _, got {name!r}")


class ArmSettings(Settings):
    """What is compared: settings of a run, and what is tried for them."""

    label: str
    """What tables and figures call it."""
    like: str | None = None
    """Another arm, whose overrides come before this one's, and whose tries are this one's where it has none."""
    overrides: tuple[str, ...] = ()
    """key=value, as train.py takes them."""
    tries: dict[str, tuple[str, ...]] = Field({})
    """{setting: values}; every combination is tried, and the best one is run with each seed."""
    wave: int = Field(1, ge=1)
    """The runs of a later wave come after those before."""


class ChoiceSettings(Settings):
    """How the best try is chosen: on held-out training images, by the accuracy under one attack."""

    data: Location
    """Shards of images held out of data.train (make_shards.py --holdout)."""
    attack: str = "pgd10"
    """The attack."""
    prefer_clean: bool = False
    """Whether of the tries that these images cannot tell from the most accurate one (the 95 % interval of the paired
    difference includes 0) the one with the highest clean accuracy is chosen. Of equals the first."""
    num_samples: int | None = Field(None, ge=1)
    """How many of the images; null takes all."""
    seed: Seed = 100
    """Of every try; none of `seeds`, so that no reported run was chosen by its own luck."""

    @model_validator(mode="after")
    def _agree(self) -> "ChoiceSettings":
        if self.prefer_clean and self.attack == "clean":
            raise ValueError("choose.prefer_clean: must be false where attack is clean")
        return self


class ReportSettings(Settings):
    """An evaluation of every seed's run."""

    attacks: tuple[str, ...]
    """As evaluation.attacks."""
    data: Location | None = None
    """Shards; null takes data.validation of the config."""
    num_samples: int | None = Field(None, ge=1)
    """How many images; null takes all."""


class PowerSettings(Settings):
    """What the power of a comparison was computed from, before the runs (`fulllora study power`)."""

    disagreement: Share
    """Share of the images on which one run of either arm differs."""
    seed_sd: Share
    """Standard deviation of the true difference from seed to seed."""
    image_correlation: Share
    """Correlation, from seed to seed, of what an image says about the difference."""
    power: Share
    """Probability that arms which are equal are shown to be non-inferior."""


class ComparisonSettings(Settings):
    """A difference of two arms, paired over images and seeds."""

    arm: str
    """The arm in question."""
    against: str
    """The arm that it is compared with."""
    attack: str
    """One of the evaluation's."""
    margin: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Largest loss of accuracy that counts as none; null where no claim is to be made."""
    power: PowerSettings | None = None
    """Required with a margin."""

    @model_validator(mode="after")
    def _agree(self) -> "ComparisonSettings":
        if (self.margin is None) != (self.power is None):
            raise ValueError(
                "margin and power belong together: `fulllora study power FILE` computes the power of a margin"
            )
        return self


class StudySettings(Settings):
    name: str
    """What the files of its results begin with."""
    config: str
    """The config of every run, relative to this file."""
    overrides: tuple[str, ...] = ()
    """key=value for every run, below those of the arms."""
    shards: tuple[str, ...] = ()
    """Arguments of `fulllora shards`, a command each, which makes the data where it is not there."""
    arms: dict[str, ArmSettings]
    """By their names."""
    choose: ChoiceSettings
    seeds: tuple[Seed, ...] = Field(min_length=1)
    """Of the runs that are reported."""
    evaluations: tuple[ReportSettings, ...] = Field(min_length=1)
    comparisons: tuple[ComparisonSettings, ...] = ()
    """Declared before the runs."""
    environment: dict[str, str] = Field({})
    """Variables of the runs' environment, unless they are set already."""
    output_dir: Location
    """Folder of the runs."""
    results_dir: Location = "results"
    """Folder of the results, to be committed."""
    max_adapter_mb: float = Field(4.0, ge=0)
    """Adapters up to this size, 10**6 bytes, are kept beside their result."""
    page: Location
    """Markdown file with the study's tables, between two comments; the rest of it is left alone."""

    @field_validator("name")
    @classmethod
    def _named(cls, name: str) -> str:
        _check_name(name, "name")
        return name

    @model_validator(mode="after")
    def _agree(self) -> "StudySettings":
        if not self.arms:
            raise ValueError("arms: must have at least one")
        for place, (name, arm) in enumerate(self.arms.items()):
            _check_name(name, f"arms.{name}")
            if arm.like is not None and arm.like not in list(self.arms)[:place]:
                raise ValueError(f"arms.{name}.like: must be an arm before it, got {arm.like}")
            for key, values in self.tries_of(name).items():
                if not values or len(set(values)) < len(values):
                    raise ValueError(f"arms.{name}.tries.{key}: must be different values, got {list(values)}")
        counts = {name: math.prod(map(len, self.tries_of(name).values())) for name in self.arms}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"arms: every arm must have as many tries, got {shown}")
        if len(set(self.seeds)) < len(self.seeds) or self.choose.seed in self.seeds:
            raise ValueError(
                f"seeds: must be different, and none choose.seed={self.choose.seed}, got {list(self.seeds)}"
            )
        reported = [attack for evaluation in self.evaluations for attack in evaluation.attacks]
        if len(set(reported)) < len(reported):
            raise ValueError(f"evaluations: must name each attack once, got {', '.join(reported)}")
        for i, comparison in enumerate(self.comparisons):
            for key in ("arm", "against"):
                if getattr(comparison, key) not in self.arms:
                    raise ValueError(f"comparisons.{i}.{key}: {getattr(comparison, key)} is not an arm")
            if comparison.attack not in reported:
                raise ValueError(
                    f"comparisons.{i}.attack: must be one of {', '.join(reported)}, got {comparison.attack}"
                )
        return self

    def overrides_of(self, arm: str) -> tuple[str, ...]:
        """Of the study, of the arms that it is like, and its own."""
        settings = self.arms[arm]
        below = self.overrides if settings.like is None else self.overrides_of(settings.like)
        return (*below, *settings.overrides)

    def tries_of(self, arm: str) -> dict[str, tuple[str, ...]]:
        """Its own, or those of the arm that it is like."""
        settings = self.arms[arm]
        return settings.tries if settings.tries or settings.like is None else self.tries_of(settings.like)


SECTIONS: dict[str, type[Settings]] = {
    "": StudySettings,
    "arms": ArmSettings,
    "choose": ChoiceSettings,
    "evaluations": ReportSettings,
    "comparisons": ComparisonSettings,
    "power": PowerSettings,
}
"""By the names under which they stand in a file."""
