"""Symptoms in the reported figures themselves, on all images: attacks that win in the wrong order, logits that are not
finite."""

from collections.abc import Mapping

import numpy as np

from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.checks import FEWEST_STEPS, Numbers, warn_order


def order_warnings(columns: Mapping[EvalAttack, np.ndarray], prefix: str) -> list[str]:
    """Of the reported figures themselves: attacks that are to be the weaker ones, and are surely stronger.

    Args:
        columns: bool [n], what each attack leaves correct; the same images in the same order.
        prefix: of each line, behind the name of its check.
    """
    lines = []
    for other, by_weaker in columns.items():
        check = _check_of(other)
        for attack, standing in columns.items():
            iterated = attack.kind == "pgd" and attack.steps >= FEWEST_STEPS
            if check is None or not (iterated or any(part.startswith("apgd") for part in attack.parts)):
                continue
            alone: Numbers = {
                "other_alone": (standing & ~by_weaker).sum(),
                "many_alone": (~standing & by_weaker).sum(),
            }
            if line := warn_order(other.name, attack.name, alone):
                lines.append(f"{check}: {prefix}{line}")
    return lines


def _check_of(attack: EvalAttack) -> str | None:
    """The check that an attack is in, as it knows less of the model than one on its gradient."""
    if attack.parts == ("square",):
        return "square"
    return {"fgsm": "single_step", "transfer": "transfer"}.get(attack.kind)


def finite_warnings(columns: Mapping[EvalAttack, np.ndarray], ball: str) -> list[str]:
    """Of the reported figures: logits that are NaN or infinite, on all images. `columns` has int [n] of each attack, -k
    where k logits are not finite; `ball` is that of all but `clean`, in words."""
    counts = {
        attack: (-values[values < 0].sum(), (values < 0).sum(), len(values)) for attack, values in columns.items()
    }
    return [
        f"finite: {logits} logits of {images} of {n} images are not finite under {attack.name}"
        f"{'' if attack.kind == 'clean' else f' at {ball}'}: these images count as wrong"
        for attack, (logits, images, n) in counts.items()
        if images
    ]
