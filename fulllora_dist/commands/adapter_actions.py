"""What the commands of tools/adapters.py do that need more than the store; see adapter_listing.py."""

import dataclasses
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fulllora_dist.commands.adapter_listing import Answer, version_as_json
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.core.text_table import text_table
from fulllora_dist.evaluation.compare import Comparison, compare, comparison_table
from fulllora_dist.evaluation.report import read_evaluation
from fulllora_dist.evaluation.trained import eval_transform
from fulllora_dist.models.adapter_address import DESCRIPTION
from fulllora_dist.models.adapter_diff import differing_settings, layer_differences, summed
from fulllora_dist.models.adapter_file import TENSORS, read_adapter
from fulllora_dist.models.robustbench import export_robustbench
from fulllora_dist.registry.address import load, local_folder
from fulllora_dist.registry.champion import LostRace, Outcome, check, promote, rollback
from fulllora_dist.registry.flavor import CARD
from fulllora_dist.registry.predict import compare_labels, passed_over, predict
from fulllora_dist.registry.promotion import Rules, Verdict
from fulllora_dist.registry.publish import CONFIG, publish
from fulllora_dist.registry.registry import CHAMPION, PREVIOUS, Registry, content_of
from fulllora_dist.registry.version_tags import Lineage
from fulllora_dist.tracking.settings import check_model_name

_SHOWN_LAYERS = 12


def diff_command(args: Namespace) -> Answer:
    """How B differs from A."""
    registry = Registry(args.uri)
    versions = [registry.find(reference) for reference in (args.a, args.b)]
    with tempfile.TemporaryDirectory() as folder:
        a, b = (read_adapter(registry.fetch(v.address, f"{folder}/{i}")) for i, v in enumerate(versions))
    settings = differing_settings(a[0], b[0])
    layers = layer_differences(a, b)
    total = summed(layers)
    evaluations = [registry.evaluation(version) for version in versions]
    accuracy: Comparison | None = None
    try:
        if evaluations[0] is None or evaluations[1] is None:
            raise UserError("one of them was never evaluated")
        accuracy = compare(evaluations[0], evaluations[1])
        compared = comparison_table(accuracy)
    except UserError as error:
        compared = f"no comparison: {error}"
    result = {
        "a": version_as_json(versions[0]),
        "b": version_as_json(versions[1]),
        "settings": [{"name": name, "a": mine, "b": theirs} for name, mine, theirs in settings],
        "accuracy": accuracy,
        "accuracy_note": None if accuracy else compared,
        "layers": layers,
        "all_layers": total,
    }
    head = f"A {versions[0].address}, B {versions[1].address}"
    differing = text_table([("setting", "A", "B"), *((name, str(x)[:50], str(y)[:50]) for name, x, y in settings)])
    parts = [head, differing if settings else "all settings are the same", compared, _layer_table(layers, total)]
    return "\n\n".join(parts), result, 0


def _layer_table(layers: Sequence[Mapping[str, Any]], total: Mapping[str, float]) -> str:
    ordered = sorted(layers, key=lambda row: -(row["difference"] or 0))[:_SHOWN_LAYERS]
    rows = [("layer (norm of what it adds)", "A", "B", "B - A")]
    for row in (*ordered, {"layer": f"all {len(layers)}", **total}):
        norms = (row[key] for key in ("a", "b", "difference"))
        rows.append((row["layer"], *("-" if norm is None else f"{norm:.3g}" for norm in norms)))
    return text_table(rows)


def publish_command(args: Namespace) -> Answer:
    """Make an adapter a version."""
    evaluation = None if args.evaluation is None else read_evaluation(args.evaluation)
    if args.name is not None:
        check_model_name(args.name)
    registry = Registry(args.uri, create=True)
    lineage = None
    if args.run is not None:
        config = Path(args.folder).parent / CONFIG
        # redacted, like the one that the run itself logs
        lineage = Lineage.of_run(registry.store, args.run, redacted(config.read_text()) if config.is_file() else None)
    version = publish(registry, args.folder, evaluation=evaluation, name=args.name, data=args.data, lineage=lineage)
    return f"published: {version.address}", version_as_json(version), 0


def promote_command(args: Namespace) -> Answer:
    """Make a version the champion, if it passes the gate."""
    registry, rules = Registry(args.uri), Rules(args.margin, args.clean_floor)
    if args.dry_run:
        candidate = registry.find(args.version)
        verdict = check(registry, candidate, registry.aliases(candidate.name).get(CHAMPION), rules)
        word = "passes" if verdict.passed else "does not pass"
        lines = [f"{candidate.address} {word} the gate", *_explained(verdict)]
        return "\n".join(lines), {"passed": verdict.passed, **dataclasses.asdict(verdict)}, int(not verdict.passed)
    try:
        outcome = promote(registry, args.version, rules, args.force)
    except LostRace as error:
        return _lost(error)
    return describe(outcome), as_json(outcome), int(outcome.outcome == "refused")


def describe(outcome: Outcome) -> str:
    """An outcome as text, with every reason."""
    version, previous = outcome.version, outcome.previous
    line = {
        "promoted": f"{version.address} is @{CHAMPION} now" + (f", @{PREVIOUS} is {previous}" if previous else ""),
        "refused": f"{version.address} was refused, @{CHAMPION} stays",
        "kept": f"{version.address} is @{CHAMPION} already",
    }[outcome.outcome]
    overruled = [] if outcome.forced is None else [f"  the gate was overruled: {outcome.forced}"]
    return "\n".join([line, *overruled, *_explained(outcome.verdict)])


def as_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome for programs."""
    return {
        "outcome": outcome.outcome,
        "version": outcome.version.address,
        "champion": outcome.champion,
        "previous": outcome.previous,
        "reasons": list(outcome.verdict.reasons),
        "findings": list(outcome.verdict.findings),
        "forced": outcome.forced,
    }


def _explained(verdict: Verdict) -> list[str]:
    return [*(f"  against it: {reason}" for reason in verdict.reasons), *(f"  {line}" for line in verdict.findings)]


def _lost(error: LostRace) -> Answer:
    return f"lost: {error}", {"outcome": "lost", "reasons": [str(error)]}, 1


def rollback_command(args: Namespace) -> Answer:
    """Go back to the previous champion."""
    try:
        champion, left = rollback(Registry(args.uri), args.name, args.reason)
    except LostRace as error:
        return _lost(error)
    return f"{args.name}: version {champion} is @{CHAMPION} again, {left} was", {"champion": champion, "left": left}, 0


def pull_command(args: Namespace) -> Answer:
    """An adapter's folder with its evaluation, card and config."""
    if os.path.lexists(args.folder) and not os.path.isdir(args.folder):
        raise UserError(f"{args.folder} is no folder; choose another one")
    if os.path.isdir(args.folder) and os.listdir(args.folder):
        raise UserError(f"{args.folder} is not empty; choose another folder")
    registry = Registry(args.uri)
    version = registry.find(args.version)
    evaluation = registry.evaluation(version)
    with tempfile.TemporaryDirectory() as temporary:
        fetched = Path(registry.fetch(version.address, temporary))
        os.makedirs(args.folder, exist_ok=True)
        for name in (DESCRIPTION, TENSORS, CARD, CONFIG):
            if (fetched / name).is_file():
                shutil.copy(fetched / name, args.folder)
    if evaluation is not None:
        Path(args.folder, "evaluation.json").write_bytes(content_of(evaluation))
    return f"{version.address}: {args.folder}", {"version": version.address, "folder": args.folder}, 0


def export_command(args: Namespace) -> Answer:
    """An entry of RobustBench's model zoo."""
    model = load(_address(args), checkpoint_path=args.checkpoint, uri=args.uri)
    weights, loader = map(str, export_robustbench(model, args.folder, args.name))
    return f"{weights}, and its entry {loader}", {"weights": weights, "loader": loader}, 0


def _address(args: Namespace) -> str:
    """Of a folder, a URL, or a version by its short name."""
    local = os.path.exists(args.version) or "://" in args.version
    return args.version if local else Registry(args.uri).find(args.version).address


def predict_command(args: Namespace) -> Answer:
    """Classes of images."""
    for option, value in (("--batch-size", args.batch_size), ("--workers", args.workers)):
        if value < 1:
            raise UserError(f"{option} must be >= 1, got {value}")
    address = _address(args)
    with local_folder(address, args.uri) as folder:
        description = read_adapter(folder)[0]
        model = load(folder, checkpoint_path=args.checkpoint)
    classes, transform = model.record.classes, eval_transform(model)
    counts = predict(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        args.source,
        args.output,
        transform,
        classes or [str(i) for i in range(model.info.num_classes)],
        batch_size=args.batch_size,
        workers=args.workers,
        adapter=description.sha256,
    )
    lines = [f"{args.output}: {counts['pictures']} images, {counts['predicted']} of them new"]
    if counts["unreadable"]:
        lines[0] += f"; warning: {counts['unreadable']} without a prediction, with the reason in their lines"
    notes = [note for note in (passed_over(args.source), compare_labels(args.source, classes)) if note]
    result = counts | {"output": args.output, "adapter": address, "own_pictures": dataclasses.asdict(transform)}
    return "\n".join([*lines, *notes]), result | {"notes": notes}, 0
