"""Class names of a model and of a data set, compared: which output of the model each label of the data is."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fulllora_dist.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 3


@dataclass(frozen=True)
class ClassMatch:
    """Which output each label is.

    Attributes:
        outputs: int64 [classes], the output of each label; None where it has the same number.
        note: what was found, in words; empty where both have the same names in the same order.
    """

    outputs: np.ndarray | None = None
    note: str = ""

    def of(self, labels: "Tensor") -> "Tensor":
        """The outputs of labels, int64 [B] both."""
        if self.outputs is None:
            return labels
        import torch  # names are compared without it

        return torch.from_numpy(self.outputs).to(labels.device)[labels]


def match_classes(
    model: Sequence[str], data: Sequence[str], *, model_is: str = "the model", data_is: str = "the data"
) -> ClassMatch:
    """Compare by name. The same names in another order are mapped. Where one side has no names (none recorded, or the
    numbers 0, 1, ... alone), labels are taken as outputs, and the note says so.

    Args:
        model: names of the outputs, in order; empty where they are not recorded.
        data: names of the labels, in order; empty where they are not recorded.
        model_is, data_is: how messages name the two.

    Raises:
        UserError: another number of classes, other names, names that differ in case or spaces alone, a name of two
            classes in another order.
    """
    model, data = list(model), list(data)
    if model == data:
        return ClassMatch()
    if model and data and len(model) != len(data):
        shared = len(set(model) & set(data))
        raise UserError(
            f"{data_is} has {len(data)} classes, {model_is} has {len(model)}, {shared} by the same name; make the data "
            f"with all of them, in any order, e.g. {_quoted(model)}"
        )
    same = set(model) == set(data)
    if not same and (_unnamed(model) or _unnamed(data)):
        unnamed = model_is if _unnamed(model) else data_is
        return ClassMatch(note=f"not compared, as {unnamed} has no class names: label k is taken as output k")
    _check_names(model, data, model_is, data_is)
    position = {name: output for output, name in enumerate(model)}
    return ClassMatch(
        np.array([position[name] for name in data], dtype=np.int64),
        f"mapped by name, as {data_is} has the classes of {model_is} in another order",
    )


def _unnamed(names: Sequence[str]) -> bool:
    """Also the names that an index has where none were given."""
    return list(names) == [str(k) for k in range(len(names))]


def _check_names(model: Sequence[str], data: Sequence[str], model_is: str, data_is: str) -> None:
    """Refuse names that are not the same set, or not each of one class."""
    missing, strange = (sorted(set(a) - set(b)) for a, b in ((model, data), (data, model)))
    alike = {_plain(name): name for name in missing}
    for name in strange:
        if _plain(name) in alike:
            theirs = alike[_plain(name)]
            show = ascii if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", theirs) else repr
            raise UserError(
                f"class {show(name)} of {data_is} is {show(theirs)} in {model_is}: write both alike, they differ in "
                "case, spaces or encoding alone"
            )
    if strange or missing:
        raise UserError(
            f"{data_is} has other classes than {model_is}: {_quoted(strange) or 'none'} instead of "
            f"{_quoted(missing) or 'none'}; both must have the same classes"
        )
    if twice := sorted({name for name in model if model.count(name) > 1}):
        raise UserError(
            f"{data_is} has the classes of {model_is} in another order, and {twice[0]!r} is the name of two of them; "
            "give each class a name of its own"
        )


def _plain(name: str) -> str:
    """Without what is easily overlooked."""
    return "".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
