"""Where an adapter is looked for, without torch."""

import os

DESCRIPTION = "adapter.json"


def instead_of(address: str, otherwise: str = "give the folder adapter/ of a run") -> str:
    """What to give instead of an address that has no adapter.json, for messages."""
    inside = os.path.join(str(address), "adapter")
    if os.path.exists(os.path.join(inside, DESCRIPTION)):
        return f"did you mean {inside}?"
    if "@" in str(address) and "://" not in str(address) and not os.path.exists(address):
        return f"for MLflow's registry write models:/{address}"
    return otherwise
