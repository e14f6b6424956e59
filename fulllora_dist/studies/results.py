"""Results of runs: `results/NAME.json`, with the adapter in `results/NAME/`. They are committed, and all that a report
needs.

A result holds what the run was (config, commit, seed, arm, hashes of what it read), the sha256 of its adapter, what it
cost, and the verdict on every image.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from pydantic import ValidationError

from fulllora_dist.config.schema import Config
from fulllora_dist.core.atomic import write_text
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.settings import explain
from fulllora_dist.evaluation.report import EvaluationReport
from fulllora_dist.studies.content import content, differences
from fulllora_dist.studies.plan import Evaluation, Run

FORMAT = 1


class Verdicts(TypedDict):
    """An evaluation of a result.

    Attributes:
        images: which ones, see `Evaluation`.
        num_samples: as it was asked for; None is all.
        data: hash of the shards' index.
        eps, norm, precision, batch_size, seed: as in evaluation.json.
        study, declared: which study made them, and what it declared then, see `declaration.declared`.
        commit: of the code.
        ids: of the images, "0-99,105".
        attacks: {name: "1" or "0" for each image, whether it was classified correctly}.
    """

    images: str
    num_samples: int | None
    data: str
    eps: float
    norm: str
    precision: str
    batch_size: int
    seed: int
    study: str
    declared: dict[str, Any]
    commit: str | None
    ids: str
    attacks: dict[str, str]


class Result(TypedDict):
    """The content of a result's file; see the module.

    Attributes:
        name: of the file.
        study, arm, values, seed, is_try: which run of which study it was made as.
        commit: of the code.
        config: all settings of the training.
        inputs: hashes of what it read.
        environment: variables that the study set.
        shards: what made the data, see `StudySettings.shards`.
        adapter_sha256: of adapter.safetensors.
        adapter_kept: whether that file is beside the result.
        trainable, trainable_share, rank: of the adapter.
        cost: of the training: batches, updates, flops, step_seconds (median of the wall clock), ranks, threads of each,
            and how many runs ran beside each other.
        evaluations: the verdicts.
    """

    format: int
    name: str
    study: str
    arm: str
    values: dict[str, str]
    seed: int
    is_try: bool
    commit: str | None
    config: dict[str, Any]
    inputs: dict[str, str]
    environment: dict[str, str]
    shards: list[str]
    adapter_sha256: str
    adapter_kept: bool
    trainable: int
    trainable_share: float
    rank: int | None
    cost: dict[str, Any]
    evaluations: list[Verdicts]


def as_ranges(ids: Iterable[int]) -> str:
    """Ascending ids as "0-99,105"."""
    parts = []
    for _, group in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0]):
        run = [i for _, i in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)


def from_ranges(text: str) -> list[int]:
    """The ids of `as_ranges`."""
    ends = (part.partition("-") for part in text.split(","))
    return [i for first, _, last in ends for i in range(int(first), int(last or first) + 1)]


def verdicts(
    evaluation: Evaluation, report: EvaluationReport, study: str, declared: dict[str, Any], commit: str | None
) -> Verdicts:
    """What is kept of an evaluation.json that a study made."""
    return {
        "images": evaluation.images,
        "num_samples": evaluation.num_samples,
        "data": report["data"],
        "eps": report["eps"],
        "norm": report["norm"],
        "precision": report["precision"],
        "batch_size": report["pictures"]["batch_size"],
        "seed": report["seed"],
        "study": study,
        "declared": declared,
        "commit": commit,
        "ids": as_ranges(report["ids"]),
        "attacks": {name: "".join(map(str, score["correct"])) for name, score in report["attacks"].items()},
    }


def correct(found: Verdicts, attack: str) -> np.ndarray:
    """bool [n], image by image."""
    return np.frombuffer(found["attacks"][attack].encode(), np.uint8) == ord("1")


def has(result: Result, evaluation: Evaluation) -> bool:
    """Whether it has these verdicts."""
    return any(
        found["images"] == evaluation.images
        and found["num_samples"] == evaluation.num_samples
        and set(evaluation.attacks) <= found["attacks"].keys()
        for found in result["evaluations"]
    )


def of_attack(result: Result, attack: str, images: str, num_samples: int | None) -> Verdicts | None:
    """The verdicts that have an attack, on so many of these images."""
    asked = images, num_samples
    found = (part for part in result["evaluations"] if (part["images"], part["num_samples"]) == asked)
    return next((part for part in found if attack in part["attacks"]), None)


def seen(found: Verdicts) -> tuple[object, ...]:
    """What two evaluations must have in common to be compared: the images, and the ball around them."""
    return found["data"], found["ids"], found["norm"], found["eps"]


def check_kept(result: Result, folder: Path) -> None:
    """Raises UserError: its adapter is not there, or is another one."""
    if not result["adapter_kept"]:
        raise UserError(f"{result['name']}: its adapter was not kept (a try, or over max_adapter_mb)")
    try:
        tensors = (folder / result["name"] / "adapter.safetensors").read_bytes()
    except OSError as error:
        raise UserError(f"{folder / result['name']}: the adapter cannot be read ({error.strerror})") from None
    if hashlib.sha256(tensors).hexdigest() != result["adapter_sha256"]:
        raise UserError(f"{folder / result['name']}: the adapter is not the one that was evaluated: its sha256 differs")


def read_result(path: Path) -> Result:
    """A result's file.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        values: Result = json.loads(path.read_text())
        whole = values["format"] == FORMAT and all(
            len(from_ranges(part["ids"])) == len(marks) and {*marks} <= {"0", "1"}
            for part in values["evaluations"]
            for marks in part["attacks"].values()
        )
        whole = whole and values["name"] == path.stem and not Result.__required_keys__ - values.keys()
        whole = whole and not any(Verdicts.__required_keys__ - part.keys() for part in values["evaluations"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is not a result of a study; move it to another folder")
    return values


def write_result(result: Result, folder: Path) -> None:
    """Write or replace it, whole or not at all."""
    write_text(folder / f"{result['name']}.json", json.dumps(result, indent=1) + "\n")


class Results:
    """The results in a folder.

    Raises:
        UserError: a file in it that is none.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self._all = {path.stem: read_result(path) for path in sorted(self.folder.glob("*.json"))}
        self._contents: dict[str, dict[str, Any]] = {}
        self._unreadable: dict[str, str] = {}  # configs of another version, or with a plugin that is not this study's
        for name, result in self._all.items():
            try:  # what a later version added was at its default
                config = Config.model_validate(result["config"])
            except ValidationError as error:
                self._unreadable[name] = explain(error)
            else:
                self._contents[name] = content(config.model_dump(mode="json"))

    def all(self) -> Collection[Result]:
        """All of them, by their names."""
        return self._all.values()

    def find(self, run: Run, inputs: Mapping[str, str] | None = None) -> Result | None:
        """The result of a run: found by what the run is, so that names and paths may have changed since.

        Args:
            inputs: of the run, as `inputs_of`; None does not compare them.

        Raises:
            UserError: its name belongs to the result of another run, or of settings that are no longer known.
        """
        same = [
            name
            for name, settings in self._contents.items()
            if not any(differences(settings, run.content)) and self._all[name]["is_try"] == run.is_try
        ]
        read_same = [name for name in same if inputs is None or self._all[name]["inputs"] == inputs]
        if read_same:
            return self._all[run.name if run.name in read_same else read_same[0]]
        path = self.folder / f"{run.name}.json"
        if run.name in self._unreadable:
            raise UserError(
                f"{path}: config: {self._unreadable[run.name]}, so that it cannot be compared with the study's run; "
                "remove the setting from the file, rename the study or the arm, or delete the result"
            )
        if run.name in self._all:
            changed = ", ".join(differences(self._contents[run.name], run.content))
            changed = changed or "other content of " + " or ".join(self._all[run.name]["inputs"])
            raise UserError(f"{path} holds another run ({changed}); rename the study or the arm, or delete the result")
        return None
