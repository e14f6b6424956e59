"""N-FGSM: a single step from strong noise, without projection (de Jorge et al., arXiv 2202.01181).

By design the perturbation may leave the eps ball, up to (noise + step) eps.
"""

from fulllora_dist.methods.base import register_method
from fulllora_dist.methods.settings import NFGSMSettings
from fulllora_dist.methods.single_step import SingleStep


@register_method
class NFGSM(SingleStep):
    Settings = NFGSMSettings
    project = False

    def noise(self) -> float:
        return self.settings.noise
