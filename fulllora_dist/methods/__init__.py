"""Training methods by name. A method is one file; this table is the only place that lists them."""

from fulllora_dist.methods.base import Method, MethodSettings
from fulllora_dist.methods.fgsm_rs import FGSMRS
from fulllora_dist.methods.free import Free
from fulllora_dist.methods.n_fgsm import NFGSM
from fulllora_dist.methods.pgd import PGD
from fulllora_dist.methods.standard import Standard

METHODS: dict[str, type[Method]] = {
    "standard": Standard,
    "pgd": PGD,
    "free": Free,
    "fgsm_rs": FGSMRS,
    "n_fgsm": NFGSM,
}

__all__ = ["METHODS", "Method", "MethodSettings"]
