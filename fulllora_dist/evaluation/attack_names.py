"""The names of an evaluation's attacks, which are checked without torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

from fulllora_dist.attacks.settings import Norm
from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.core.units import check_pixel_range, parse_size

Loss = Literal["ce", "margin", "dlr"]


def further_norms(norms: Sequence[str], own: str) -> list[tuple[Norm, float]]:
    """("l2=2", "l1=255") -> [("l2", 2.0), ("l1", 255.0)].

    Args:
        own: the norm of the evaluation, which is none of them.

    Raises:
        UserError: something else, a norm twice.
    """
    found: list[tuple[Norm, float]] = []
    for text in norms:
        name, equals, size = text.partition("=")
        norm = next((known for known in get_args(Norm) if known == name.strip()), None)
        if norm is None or not equals:
            raise UserError(f"evaluation.norms: must be a norm and its eps such as l2=2 or l1=255, got {text!r}")
        if norm == own:
            raise UserError(f"evaluation.norms: {norm} is threat.norm already; further sizes go to evaluation.eps")
        if norm in dict(found):
            raise UserError(f"evaluation.norms: {norm} stands there twice")
        try:
            eps = parse_size(size.strip())
            assert isinstance(eps, float)
            found.append((norm, check_pixel_range(eps) if norm == "linf" else eps))
        except ValueError as error:
            raise UserError(f"evaluation.norms: {norm}: {error}") from None
    return found


STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The four parts of the standard AutoAttack, in order."""
_PARTS = {"apgd-ce": (100, 100), "apgd-t": (900, 900), "fab-t": (1800, 900), "square": (5000, 0)}
"""Forward and backward passes of an image that survives, with nine target classes, by iterations. Each of `fab` goes
back once for every class, which counts as once."""
_PARTS |= {"apgd-dlr": (100, 100), "fab": (200, 100)}
_PARTS_IN_L1 = _PARTS | {"apgd-ce": (500, 500), "apgd-dlr": (500, 500), "apgd-t": (500, 500)}
"""With five restarts and five target classes."""
_ITERATED = re.compile(r"(pgd|cw|dlr)([1-9]\d*)(?:x([1-9]\d*))?")
_LOSSES: dict[str, Loss] = {"pgd": "ce", "cw": "margin", "dlr": "dlr"}
TRANSFER_STEPS = 20
_KNOWN = (
    "clean, fgsm, autoattack, parts of it (apgd-ce, apgd-t, fab-t, square, or several: apgd-ce+square), and pgdK, cwK "
    "and dlrK for K steps, with R restarts pgdKxR, and transfer:ADAPTER, e.g. clean,pgd20,cw20,pgd50x5,autoattack"
)


@dataclass(frozen=True)
class AttackName:
    """The name of an attack, taken apart.

    Attributes:
        name: `clean`; `fgsm` (Goodfellow et al.: one step of eps from the image); `pgdK` (cross-entropy), `cwK` (the
            margin loss of Carlini and Wagner) or `dlrK` (the difference of logits ratio) under PGD, K steps, with `xR`
            behind it the best of R random starts; `autoattack`, the standard version (Croce and Hein, arXiv
            2003.01690); parts of AutoAttack joined by +, with the standard version's parameters; or `transfer:ADAPTER`,
            the examples that pgd20 finds for another model.
        kind: how it is made.
        steps, loss, restarts: of PGD.
        parts: of AutoAttack, in the order in which they run.
        source: of `transfer`, the ADAPTER: a folder, or an address of MLflow. `name` is without what signs a URL.
    """

    name: str
    kind: Literal["clean", "fgsm", "pgd", "autoattack", "transfer"]
    steps: int = 0
    loss: Loss = "ce"
    restarts: int = 1
    parts: tuple[str, ...] = ()
    source: str = ""

    @classmethod
    def parse(cls, name: str) -> Self:
        """Raises UserError: the name is unknown."""
        if name in ("clean", "fgsm"):
            return cls(name, name)  # type: ignore[arg-type]
        parts = STANDARD if name == "autoattack" else tuple(name.split("+"))
        if all(part in _PARTS for part in parts) and len(set(parts)) == len(parts):
            return cls(name, "autoattack", parts=parts)
        kind, _, source = name.partition(":")
        if kind == "transfer" and source:
            return cls(f"transfer:{redacted(source)}", "transfer", TRANSFER_STEPS, source=source)
        match = _ITERATED.fullmatch(name)
        if match is None:
            raise UserError(f"evaluation.attacks: unknown attack {name!r}; known: {_KNOWN}")
        kind, steps, restarts = match.groups()
        return cls(name, "pgd", int(steps), _LOSSES[kind], int(restarts or 1))

    def forward_and_backward(self, norm: Norm) -> tuple[int, int]:
        """Passes of an image in a ball of that norm, at most, the prediction included."""
        if self.kind == "autoattack":
            of_parts = _PARTS_IN_L1 if norm == "l1" else _PARTS
            forward, backward = (sum(of_parts[part][k] for part in self.parts) for k in (0, 1))
            return 1 + forward, backward
        if self.kind == "clean":
            return 1, 0
        if self.kind == "fgsm":
            return 3, 1
        steps = self.restarts * self.steps
        return 1 + steps + self.restarts, steps

    def passes(self, norm: Norm) -> int:
        """All of them; the measure of an attack's cost."""
        return sum(self.forward_and_backward(norm))

    def check_classes(self, classes: int) -> None:
        """Raises SharedUserError: the attack's loss needs more logits than there are."""
        needed = 4 if "apgd-t" in self.parts else 3 if "apgd-dlr" in self.parts or self.loss == "dlr" else 2
        if classes < needed:
            raise SharedUserError(
                f"evaluation.attacks: {self.name} needs at least {needed} classes, got {classes}; pgd20, cw20 and "
                "apgd-ce+square need two"
            )

    @classmethod
    def parse_all(cls, names: Sequence[str]) -> list[Self]:
        """Raises UserError for unknown, repeated or no attacks."""
        parsed = [cls.parse(name) for name in names]
        if not names or len(set(names)) < len(names):
            raise UserError(
                f"evaluation.attacks: name each attack once, e.g. clean,pgd20, got {','.join(names) or 'none'}"
            )
        return parsed
