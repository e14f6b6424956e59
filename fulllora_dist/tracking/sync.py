"""Sending what a run has left in its output folder, without the run."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fulllora_dist.config_file import read_frame
from fulllora_dist.errors import UserError
from fulllora_dist.tracking.outbox import FOLDER, Outbox
from fulllora_dist.tracking.run import run_name
from fulllora_dist.tracking.shipping import Shipper


def sync(output: str, uri: str | None, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Send what is left.

    Args:
        output: the run's output folder.
        uri: of the store; None takes the run's.
        seconds: to wait at most.
        say: for progress and outages.

    Returns:
        {"run_id", "left", "points_left", "entries_left"}; `left` says whether anything is.

    Raises:
        UserError: there is nothing of a tracked run.
    """
    if not os.path.isdir(os.path.join(output, FOLDER)):
        raise UserError(f"{output}: no {FOLDER}/ there; give the output folder of a run with tracking.enabled=true")
    config = read_frame(Path(output, "config.yaml"))
    # seen from here: its folder may be mounted elsewhere
    config = config.model_copy(update={"run": config.run.model_copy(update={"output": output})})
    outbox = Outbox(output)
    shipper = Shipper(outbox, uri or config.tracking_uri(), config.tracking.experiment, run_name(config), say)
    shipper.start()
    sent = shipper.drain(seconds)
    shipper.stop()
    points, entries = outbox.unsent()
    return {"run_id": outbox.run_id, "left": not sent, "points_left": points, "entries_left": entries}
