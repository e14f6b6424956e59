"""Settings of the evaluation."""

from pydantic import Field

from fulllora_dist.core.settings import Location, Settings
from fulllora_dist.core.units import Size


class EvaluationSettings(Settings):
    attacks: tuple[str, ...] = ("clean", "pgd20")
    """clean, fgsm, autoattack, parts of it (apgd-ce+square), pgdK, cwK, dlrK for K steps; 5 restarts: pgd20x5."""
    eps: tuple[Size, ...] = ()
    """Further eps beside threat.eps, for robust accuracy against eps."""
    norms: tuple[str, ...] = ()
    """Further norms beside threat.norm, each with its eps: [l2=2, l1=255]."""
    num_samples: int | None = Field(None, ge=1)
    """How many images, drawn evenly over the classes; null takes all."""
    first: int | None = Field(None, ge=1)
    """Instead of num_samples, the first so many of the index."""
    ids: Location | None = None
    """Instead of num_samples, a text file (path or URL) with one id or image name a line, as RobustBench's 5,000."""
    gradient_masking_samples: int = Field(50, ge=0)
    """How many images are checked for symptoms of masked gradients; 0 checks none."""
    batch_size: int = Field(64, ge=1)
    """Batch size per rank."""
