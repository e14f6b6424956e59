"""Figures of a run for its tracker: adversarial examples, training curves and branch norms."""

import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from fulllora_dist.attacks.threat import threat_model
from fulllora_dist.config.schema import Config
from fulllora_dist.core.messages import one_line
from fulllora_dist.data.class_names import match_classes
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.models.adapted_model import WITH_BRANCHES, AdaptedModel
from fulllora_dist.models.branches import branches_of, by_place
from fulllora_dist.plots.branch_figure import branch_sizes
from fulllora_dist.plots.figures import Attacked, adversarial_examples
from fulllora_dist.plots.training_curves import training_curves
from fulllora_dist.tracking.run import Tracker
from fulllora_dist.training.guard import Examples, Guard

_ATTACK = "pgd20"
_SHOWN = 4


def show_check(tracker: Tracker, config: Config, guard: Guard, last: bool) -> None:
    """Log examples and curves after checks 1, 2, 4, 8 and so on, and after the `last` one: a dozen in a long run."""
    assert guard.last is not None
    step = guard.last["step"]
    number = step // config.guard.every
    if tracker.uri is None or guard.examples is None or not (last or number & (number - 1) == 0):
        return
    examples = guard.examples
    tracker.figure(f"examples_{step:08d}", lambda: _examples(examples, guard.classes, config.threat.eps))
    tracker.figure("curves", lambda: training_curves(tracker.lines()))


def show_end(tracker: Tracker, config: Config, model: AdaptedModel, stream: EvalStream) -> None:
    """Log validation examples, curves and branch norms of a finished run, on one rank. Any error is only a warning.

    Args:
        model: the model as shipped, complete on this rank.
        stream: the evaluation stream.
    """
    if tracker.uri is None:
        return
    try:
        _show_end(tracker, config, model, stream)
    except Exception as error:  # such as running out of GPU memory in the attack
        tqdm.write(f"warning: no final figures ({type(error).__name__}: {one_line(error)})", file=sys.stderr)


def _show_end(tracker: Tracker, config: Config, model: AdaptedModel, stream: EvalStream) -> None:
    device = next(model.parameters()).device
    chosen = np.linspace(0, len(stream.ids) - 1, min(_SHOWN, len(stream.ids))).astype(int)
    batch = stream.read(stream.ids[chosen]).to(device)
    x, y = batch.pixels(), match_classes(model.record.classes, stream.index.classes).of(batch.labels)
    threat = threat_model(config.threat.norm, config.threat.eps)
    x_adv = EvalAttack.parse(_ATTACK)(model, x, y, threat=threat, seed=config.run.seed, ids=batch.ids)
    with torch.no_grad():
        before, after = (model(images).argmax(dim=1) for images in (x, x_adv))
    examples = Examples(*(tensor.cpu() for tensor in (x, x_adv, y, before, after)))
    tracker.figure("examples", lambda: _examples(examples, model.record.classes or stream.index.classes, threat.eps))
    tracker.figure("curves", lambda: training_curves(tracker.lines()))
    if model.spec.finetune in WITH_BRANCHES:
        norms = by_place((branch.block, branch.component, branch.relative()) for branch in branches_of(model))
        tracker.figure("adapter_norms", lambda: branch_sizes(norms))


def _examples(examples: Examples, classes: tuple[str, ...], eps: float) -> Figure:
    model = Attacked("model", examples.adversarial, examples.before, examples.after)
    return adversarial_examples(examples.clean, examples.labels, classes, [model], eps)
