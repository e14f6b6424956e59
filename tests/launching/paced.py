"""A plugin: PGD whose steps take as long, fail or die as the JSON file says that ORDERS in the environment names.

{"seconds": of a step, "fail": batch and rank that raises, "kill": batch and rank that kills itself}
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Literal

from torch import Tensor

from fulllora_dist.data.batch import Batch
from fulllora_dist.methods import register_method
from fulllora_dist.methods.base import WeightStep
from fulllora_dist.methods.pgd import PGD, PGDSettings


class PacedSettings(PGDSettings):
    name: Literal["paced"] = "paced"  # type: ignore[assignment]


@register_method
class Paced(PGD):
    Settings = PacedSettings

    def step(self, engine: WeightStep, batch: Batch, step: int) -> dict[str, Tensor]:
        orders = json.loads(Path(os.environ["ORDERS"]).read_text())
        time.sleep(orders.get("seconds", 0))
        here = [step, int(os.environ["RANK"])]
        if orders.get("fail") == here:
            raise RuntimeError(f"no more room on the shelf in {__file__}")
        if orders.get("kill") == here:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(engine, batch, step)
