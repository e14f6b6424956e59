"""From a study's file to its runs: the tries of every arm, and the chosen ones with every seed."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fulllora_dist.config.load import load_config
from fulllora_dist.config.schema import Config
from fulllora_dist.config.yaml_text import read_yaml
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.settings import explain
from fulllora_dist.core.suggest import suggestion
from fulllora_dist.evaluation.attack_names import AttackName
from fulllora_dist.studies.content import content, folder_key, key_of
from fulllora_dist.studies.settings import SECTIONS, StudySettings
from fulllora_dist.training.inputs import load_index

VALIDATION, HELD_OUT = "validation", "held_out"
_IN_NO_NAME = re.compile(r"[^\w.+-]+", re.ASCII)
_SET_BY_THE_STUDY = ("run.output_dir", "run.seed", "data.validation", "evaluation.attacks", "evaluation.num_samples")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a run.

    Attributes:
        images: VALIDATION, HELD_OUT for a try, or the shards where the study names others.
        data: the shards.
        attacks, num_samples: as in `EvaluationSettings`.
    """

    images: str
    data: str
    attacks: tuple[str, ...]
    num_samples: int | None

    @property
    def file(self) -> str:
        """Its name in the folder of the run."""
        what = {"images": self.images, "attacks": self.attacks, "n": self.num_samples}
        return f"evaluation-{key_of(what)}.json"


@dataclass(frozen=True, eq=False)
class Run:
    """A training and its evaluations.

    Attributes:
        name: of its result.
        arm, values, seed: which one it is; `values` is the try, {setting: value}.
        is_try: whether it helps to choose, instead of being reported.
        overrides: of train.py and evaluate.py, without folders.
        config: of the training, without evaluation.
        evaluations: what is to be evaluated.
        output_dir: its folder.
    """

    name: str
    arm: str
    values: Mapping[str, str]
    seed: int
    is_try: bool
    overrides: tuple[str, ...]
    config: Config
    evaluations: tuple[Evaluation, ...]
    output_dir: str

    @cached_property
    def content(self) -> dict[str, Any]:
        """See `content.py`."""
        return content(self.config.model_dump(mode="json"))

    @cached_property
    def key(self) -> str:
        """Its content's hash."""
        return key_of(self.content)

    def __str__(self) -> str:
        tried = "".join(f" {key}={value}" for key, value in self.values.items())
        return f"{self.arm}{tried} seed {self.seed}" + " (try)" * self.is_try


class Study:
    """A study's file.

    Args:
        path: of the YAML file.

    Raises:
        UserError: naming the setting; the settings of every arm's runs are checked too.
    """

    def __init__(self, path: str):
        self.path = path
        values = read_yaml(path, "study")
        try:
            self.settings = StudySettings.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{path}: {explain(error, _suggest)}") from None
        self.config = os.path.normpath(os.path.join(os.path.dirname(path), self.settings.config))
        self._check_attacks()
        self.tries = {arm: tuple(self._runs(arm, is_try=True)) for arm in self.settings.arms}
        self._check_tries()
        validation = {run.config.data.validation for runs in self.tries.values() for run in runs}
        self._validation, *others = (str(shards) for shards in validation)
        if others or None in validation:
            shown = ", ".join((self._validation, *others))
            raise UserError(f"{path}: data.validation must be the same shards for every arm, got {shown}")

    def _check_attacks(self) -> None:
        settings = self.settings
        try:
            for names in ([settings.choose.attack], *(part.attacks for part in settings.evaluations)):
                AttackName.parse_all(names)
        except UserError as error:
            raise UserError(f"{self.path}: {str(error).replace('evaluation.attacks', 'evaluations')}") from None
        for override in itertools.chain(settings.overrides, *(arm.overrides for arm in settings.arms.values())):
            key = override.partition("=")[0].strip()
            if key in _SET_BY_THE_STUDY and key != "data.validation":
                raise UserError(f"{self.path}: overrides: {key} is set by the study; remove it")
        for name, arm in settings.arms.items():
            if taken := [key for key in arm.tries if key in _SET_BY_THE_STUDY]:
                raise UserError(f"{self.path}: arms.{name}.tries: {taken[0]} is set by the study; remove it")

    def _check_tries(self) -> None:
        """That the tries of an arm are different runs under different names, which the same attack can choose from."""
        for arm, tries in self.tries.items():
            where = f"{self.path}: arms.{arm}.tries"
            for first, second in itertools.combinations(tries, 2):
                if first.key == second.key or first.name == second.name:
                    what = "run" if first.key == second.key else "name"
                    values = " and ".join(", ".join(run.values.values()) for run in (first, second))
                    raise UserError(f"{where}: {values} make the same {what}; remove one")
            balls = {(run.config.threat.norm, run.config.threat.eps) for run in tries}
            if len(balls) > 1:
                raise UserError(
                    f"{where}: threat.norm and threat.eps must be the same for all, as each try is attacked in its own "
                    "ball; for another eps in training alone try phases: [[{fraction: 1, eps: 2/255}], ...]"
                )

    def _runs(self, arm: str, *, is_try: bool) -> Iterator[Run]:
        tries = self.settings.tries_of(arm)
        for values in itertools.product(*tries.values()):
            chosen = dict(zip(tries, values, strict=True))
            for seed in [self.settings.choose.seed] if is_try else self.settings.seeds:
                yield self.run(arm, chosen, seed, is_try=is_try)

    def run(self, arm: str, values: Mapping[str, str], seed: int, *, is_try: bool) -> Run:
        """A run of the study."""
        settings = self.settings
        overrides = (*settings.overrides_of(arm), *(f"{key}={value}" for key, value in values.items()))
        try:
            config = load_config(self.config, [*overrides, f"run.seed={seed}", "run.output_dir=unset"])
        except UserError as error:
            raise UserError(f"{self.path}: arms.{arm}: {error}") from None
        if is_try:
            choose = settings.choose
            attacks = ("clean",) if choose.attack == "clean" else ("clean", choose.attack)
            evaluations = [Evaluation(HELD_OUT, choose.data, attacks, choose.num_samples)]
        else:
            evaluations = [
                Evaluation(e.data or VALIDATION, e.data or str(config.data.validation), e.attacks, e.num_samples)
                for e in settings.evaluations
            ]
        tried = "".join(f"-{key.rpartition('.')[2]}{_IN_NO_NAME.sub('_', value)}" for key, value in values.items())
        name = f"{settings.name}-{arm}{tried}-" + ("try" if is_try else f"seed{seed}")
        output_dir = str(Path(settings.output_dir, f"{name}-{folder_key(config)}"))
        return Run(name, arm, values, seed, is_try, overrides, config, tuple(evaluations), output_dir)

    def seeds(self, arm: str, values: Mapping[str, str]) -> list[Run]:
        """The reported runs of an arm with the chosen values."""
        return [self.run(arm, values, seed, is_try=False) for seed in self.settings.seeds]

    def images(self, attack: str) -> int:
        """How many images are evaluated under a reported attack.

        Raises:
            UserError: the index of all of them cannot be read.
        """
        part = next(part for part in self.settings.evaluations if attack in part.attacks)
        return part.num_samples or len(load_index(part.data or self._validation, "evaluations"))

    def waves(self) -> list[list[str]]:
        """The arms, wave by wave."""
        arms = self.settings.arms
        return [[name for name in arms if arms[name].wave == wave] for wave in sorted({a.wave for a in arms.values()})]


def _suggest(section: Sequence[Any], key: str) -> str:
    """What to say about an unknown setting."""
    settings = SECTIONS["power" if "power" in section else section[0] if section else ""]
    return suggestion(key, settings.model_fields)
