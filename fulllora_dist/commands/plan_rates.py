"""What a device computes a second: assumed, or of the steps that tools/benchmark.py step has measured."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fulllora_dist.commands.plan_counts import count_pass
from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapt import create_model
from fulllora_dist.models.settings import Precision

ASSUMED_FLOPS = {"bf16": 3e14, "fp32": 4e13}
"""Sustained FLOP/s of one GPU: about 30 % of an H200's peak in bf16, about 60 % in full fp32."""


@dataclass(frozen=True)
class Rate:
    """FLOP/s of one rank.

    Attributes:
        source: where it is from, as text.
        unit: of its hours.
    """

    flops: float
    source: str
    unit: str

    def hours(self, flops: float) -> float:
        return flops / self.flops / 3600


def assumed(precision: Precision) -> Rate:
    flops = ASSUMED_FLOPS[precision]
    return Rate(flops, f"an assumed {flops / 1e12:.0f} TFLOP/s" + " of fp32" * (precision == "fp32"), "GPU-hours")


def measured_rate(
    files: Sequence[str], backbone: str, image_size: int, flops_an_image: float, precision: Precision, compiled: bool
) -> Rate:
    """The rate of the step that is most like a run's; the assumed one without `files`, or a row of its precision.

    Steps are compared by their backbone and image size, then by FLOPs of a pass; of equals the largest batch counts.

    Args:
        files: JSON files of tools/benchmark.py step.
        flops_an_image: of an attack pass of the run.
        compiled: whether the run's blocks are compiled.

    Raises:
        UserError: a file is none of that command's.
    """
    rows = [row for file in files for row in read_rows(file) if row["precision"] == precision]
    if not rows:
        return assumed(precision)
    arch = backbone.partition(".")[0]
    same = [row for row in rows if (row["backbone"].partition(".")[0], row["image_size"]) == (arch, image_size)] or rows
    costs = {key: _row_cost(*key) for key in {(row["backbone"], row["image_size"], precision) for row in same}}

    def unlike(row: dict[str, Any]) -> tuple[float, int]:
        attack = costs[row["backbone"], row["image_size"], precision][0]
        return abs(math.log(attack / flops_an_image)), -row["batch"]

    row = min(same, key=unlike)
    attack, step = costs[row["backbone"], row["image_size"], precision]
    arms = row["arms"]
    arm = "fulllora_compiled" if compiled and "fulllora_compiled" in arms else "fulllora"
    rate = row["batch"] * (row["steps"] * attack + step) / arms[arm]["wall_s"]
    source = (
        f"the {rate / 1e12:.3g} TFLOP/s of {row['backbone']} at {row['image_size']} pixels, batch {row['batch']}, "
        f"PGD-{row['steps']}, {precision}{', compiled' * (arm != 'fulllora')}, measured on {row['device']}"
    )
    return Rate(rate, source, "hours of a rank")


def read_rows(file: str) -> list[dict[str, Any]]:
    """The rows of a file that have our arm, each with its `device`.

    Raises:
        UserError: the file cannot be read, or is none of tools/benchmark.py step.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
        rows = [row | {"device": content["cpu"]} for row in content["rows"] if "fulllora" in row["arms"]]
        for row in rows:
            if not (row["arms"]["fulllora"]["wall_s"] > 0 and row["batch"] > 0 and row["precision"] in ASSUMED_FLOPS):
                raise ValueError
            _ = row["backbone"] + "", row["image_size"] + 0, row["steps"] + 0
    except OSError as error:
        raise UserError(f"--rates: cannot read {file} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--rates: {file} is no file of tools/benchmark.py step") from None
    if not rows:
        raise UserError(f"--rates: {file} has no row with the arm fulllora; measure it with tools/benchmark.py step")
    return rows


def _row_cost(backbone: str, image_size: int, precision: Precision) -> tuple[int, int]:
    """FLOPs of an attack pass and of a weight step of the benchmark's model, for one image."""
    with torch.device("meta"):
        model = create_model(
            backbone, pretrained=False, num_classes=1000, image_size=image_size, head="frozen", precision=precision
        )
    return tuple(count_pass(model, image_size, 1, attack=attack, pixels=attack).flops for attack in (True, False))  # type: ignore
