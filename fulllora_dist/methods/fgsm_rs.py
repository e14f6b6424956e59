"""Fast adversarial training: FGSM from a random start (Wong et al., arXiv 2001.03994)."""

from fulllora_dist.methods.base import register_method
from fulllora_dist.methods.settings import FGSMRSSettings
from fulllora_dist.methods.single_step import SingleStep


@register_method
class FGSMRS(SingleStep):
    Settings = FGSMRSSettings
    project = True

    def noise(self) -> float:
        return 1.0
