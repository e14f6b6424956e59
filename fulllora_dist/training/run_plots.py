"""Images of a run for its tracker: what the attack does to it, its curves, where the adapter is strong."""

import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from fulllora_dist.attacks.threat import threat_model
from fulllora_dist.config.schema import Config
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.evaluation import EvalAttack
from fulllora_dist.models.adapted_model import WITH_BRANCHES, AdaptedModel
from fulllora_dist.models.branches import branches_of, by_place
from fulllora_dist.plots.branch_figure import branch_sizes
from fulllora_dist.plots.figures import Attacked, adversarial_examples
from fulllora_dist.plots.training_curves import training_curves
from fulllora_dist.storage.urls import one_line
from fulllora_dist.tracking.run import Tracker
from fulllora_dist.training.guard import Examples, Guard

_ATTACK = "pgd20"
_SHOWN = 4


def show_check(tracker: Tracker, config: Config, guard: Guard, last: bool) -> None:
    """Examples and curves after looks 1, 2, 4, 8 and so on, and after the `last` one: a dozen of a long run."""
    assert guard.last is not None
    step = guard.last["step"]
    number = step // config.guard.every
    if tracker.uri is None or guard.examples is None or not (last or number & (number - 1) == 0):
        return
    found = guard.examples
    tracker.figure(f"examples_{step:08d}", lambda: _examples(found, guard.classes, config.threat.eps))
    tracker.figure("curves", lambda: training_curves(tracker.lines()))


def show_end(tracker: Tracker, config: Config, model: AdaptedModel, stream: EvalStream) -> None:
    """Examples of the validation set, curves, and the branches' norms, where there are branches. On one rank. What goes
    wrong here is a warning: the run is done.

    Args:
        model: as it is shipped, whole on this rank.
        stream: of the evaluation.
    """
    if tracker.uri is None:
        return
    try:
        _show_end(tracker, config, model, stream)
    except Exception as error:  # no memory for the attack on a GPU, among others
        tqdm.write(f"warning: no images of the end ({type(error).__name__}: {one_line(error)})", file=sys.stderr)


def _show_end(tracker: Tracker, config: Config, model: AdaptedModel, stream: EvalStream) -> None:
    device = next(model.parameters()).device
    chosen = np.linspace(0, len(stream.ids) - 1, min(_SHOWN, len(stream.ids))).astype(int)
    batch = stream.read(stream.ids[chosen]).to(device)
    x, y = batch.pixels(), batch.labels
    threat = threat_model(config.threat.norm, config.threat.eps)
    made = EvalAttack.parse(_ATTACK)(model, x, y, threat=threat, seed=config.run.seed, ids=batch.ids)
    with torch.no_grad():
        before, after = (model(images).argmax(dim=1) for images in (x, made))
    found = Examples(*(tensor.cpu() for tensor in (x, made, y, before, after)))
    tracker.figure("examples", lambda: _examples(found, stream.index.classes, threat.eps))
    tracker.figure("curves", lambda: training_curves(tracker.lines()))
    if model.spec.finetune in WITH_BRANCHES:
        norms = by_place((branch.block, branch.component, branch.relative()) for branch in branches_of(model))
        tracker.figure("adapter_norms", lambda: branch_sizes(norms))


def _examples(found: Examples, classes: tuple[str, ...], eps: float) -> Figure:
    model = Attacked("model", found.adversarial, found.before, found.after)
    return adversarial_examples(found.clean, found.labels, classes, [model], eps)
