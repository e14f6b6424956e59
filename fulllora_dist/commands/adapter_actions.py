"""What tools/adapters.py does: each command gives (text for people, JSON-able result, exit code)."""

import dataclasses
import os
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation import eval_transform
from fulllora_dist.evaluation.compare import Comparison, compare, comparison_table
from fulllora_dist.evaluation.report import read_evaluation
from fulllora_dist.models.adapter_diff import differing_settings, layer_differences, summed
from fulllora_dist.models.adapter_file import DESCRIPTION, TENSORS, read_adapter
from fulllora_dist.registry.address import load, local_folder
from fulllora_dist.registry.champion import LostRace, Outcome, check, promote, rollback
from fulllora_dist.registry.flavor import CARD
from fulllora_dist.registry.predict import predict
from fulllora_dist.registry.promotion import Rules
from fulllora_dist.registry.publish import CONFIG, publish
from fulllora_dist.registry.registry import CHAMPION, PREVIOUS, Registry, Version, content_of
from fulllora_dist.registry.version_tags import Lineage
from fulllora_dist.storage.urls import redacted

Answer = tuple[str, dict[str, Any], int]
_SHOWN_LAYERS = 12


def list_command(args: Namespace) -> Answer:
    """Registered models; of a named one its versions."""
    registry = Registry(args.uri)
    if args.name is not None:
        versions = registry.versions(args.name)
        rows = [("version", "aliases", "clean %", "robust % (lowest attack)", "method", "published")]
        rows += [
            (
                str(version.number),
                ", ".join(f"@{alias}" for alias in version.aliases),
                _accuracy(version, "clean"),
                _robust(version),
                version.tags.get("method", ""),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created / 1000)),
            )
            for version in versions
        ]
        return _columns(rows), {"name": args.name, "versions": [_metadata(version) for version in versions]}, 0
    found = {name: registry.versions(name) for name in registry.names()}
    models = [("model", "versions", "@champion", "clean %", "robust % (lowest attack)")]
    for name, versions in found.items():
        champion = next((version for version in versions if CHAMPION in version.aliases), None)
        known = ("", "", "") if champion is None else _figures(champion)
        models.append((name, str(len(versions)), *known))
    text = _columns(models) if found else f"no adapters at {registry.store.uri}"
    return text, {"models": {name: [_metadata(version) for version in versions] for name, versions in found.items()}}, 0


def _figures(version: Version) -> tuple[str, str, str]:
    return str(version.number), _accuracy(version, "clean"), _robust(version)


def _accuracy(version: Version, attack: str) -> str:
    found = version.accuracies.get(attack)
    return "" if found is None else "{:.1f} ({:.1f} to {:.1f})".format(*(100 * share for share in found))


def _robust(version: Version) -> str:
    robust = {attack: found for attack, found in version.accuracies.items() if attack != "clean"}
    if not robust:
        return ""
    lowest = min(robust, key=lambda attack: robust[attack][0])
    return f"{_accuracy(version, lowest)} {lowest}"


def _metadata(version: Version) -> dict[str, Any]:
    return dataclasses.asdict(version) | {"address": version.address}


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def show_command(args: Namespace) -> Answer:
    """Everything about a version."""
    registry = Registry(args.uri)
    version = registry.find(args.version)
    metadata = {
        "aliases": ", ".join(version.aliases) or "none",
        "run": version.run_id or "none",
        "source": version.source,
    }
    rows = [(key, value) for key, value in (metadata | dict(sorted(version.tags.items()))).items()]
    return f"{version.address}\n{_columns(rows)}", _metadata(version), 0


def diff_command(args: Namespace) -> Answer:
    """What B differs in from A."""
    registry = Registry(args.uri)
    with tempfile.TemporaryDirectory() as folder:
        versions = [registry.find(reference) for reference in (args.a, args.b)]
        a, b = (read_adapter(registry.fetch(v.address, f"{folder}/{i}")) for i, v in enumerate(versions))
    settings = differing_settings(a[0], b[0])
    layers = layer_differences(a, b)
    total = summed(layers)
    one, other = (registry.evaluation(version) for version in versions)
    accuracy: Comparison | None = None
    try:
        if one is None or other is None:
            raise UserError("one of them was never evaluated")
        accuracy = compare(one, other)
        compared = comparison_table(accuracy)
    except UserError as error:
        compared = f"no comparison: {error}"
    result = {
        "a": _metadata(versions[0]),
        "b": _metadata(versions[1]),
        "settings": [{"name": name, "a": mine, "b": theirs} for name, mine, theirs in settings],
        "accuracy": accuracy,
        "accuracy_note": None if accuracy else compared,
        "layers": layers,
        "all_layers": total,
    }
    head = f"A {versions[0].address}, B {versions[1].address}"
    shown = _columns([("setting", "A", "B"), *((n, str(x)[:50], str(y)[:50]) for n, x, y in settings)])
    sections = [head, shown if settings else "all settings are the same", compared, _layer_table(layers, total)]
    return "\n\n".join(sections), result, 0


def _layer_table(layers: Sequence[Mapping[str, Any]], total: Mapping[str, float]) -> str:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    ordered = sorted(layers, key=lambda row: -(row["difference"] or 0))
    rows = [("layer (norm of what it adds)", "A", "B", "B - A")]
    rows += [(row["layer"], cell(row["a"]), cell(row["b"]), cell(row["difference"])) for row in ordered[:_SHOWN_LAYERS]]
    rows.append((f"all {len(layers)}", cell(total["a"]), cell(total["b"]), cell(total["difference"])))
    return _columns(rows)


def publish_command(args: Namespace) -> Answer:
    """Make an adapter a version."""
    found = None if args.evaluation is None else read_evaluation(args.evaluation)
    registry = Registry(args.uri, create=True)
    lineage = None
    if args.run is not None:
        config = Path(args.folder).parent / CONFIG
        # redacted, as the run itself has it
        lineage = Lineage.of_run(registry.store, args.run, redacted(config.read_text()) if config.is_file() else None)
    version = publish(registry, args.folder, evaluation=found, name=args.name, data=args.data, lineage=lineage)
    return f"published: {version.address}", _metadata(version), 0


def promote_command(args: Namespace) -> Answer:
    """Make a version the champion, if the gate lets it."""
    registry, rules = Registry(args.uri), Rules(args.margin, args.clean_floor)
    if args.dry_run:
        candidate = registry.find(args.version)
        champion = registry.aliases(candidate.name).get(CHAMPION)
        verdict = check(registry, candidate, champion, rules)
        word = "passes" if verdict.passed else "does not pass"
        lines = [f"{candidate.address} {word} the gate", *_reasons(verdict.reasons, verdict.findings)]
        return "\n".join(lines), {"passed": verdict.passed, **dataclasses.asdict(verdict)}, int(not verdict.passed)
    try:
        outcome = promote(registry, args.version, rules, args.force)
    except LostRace as error:
        return f"lost: {error}", {"outcome": "lost", "reasons": [str(error)]}, 1
    return told(outcome), as_json(outcome), int(outcome.outcome == "refused")


def told(outcome: Outcome) -> str:
    """An outcome in words, with every reason."""
    version = outcome.version
    first = {
        "promoted": f"{version.address} is @{CHAMPION} now",
        "refused": f"{version.address} was refused, @{CHAMPION} stays",
        "kept": f"{version.address} is @{CHAMPION} already",
    }[outcome.outcome]
    before = "" if outcome.outcome != "promoted" or outcome.previous is None else f", @{PREVIOUS} is {outcome.previous}"
    overruled = [] if outcome.forced is None else [f"  the gate was overruled: {outcome.forced}"]
    return "\n".join([first + before, *overruled, *_reasons(outcome.verdict.reasons, outcome.verdict.findings)])


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


def _reasons(reasons: Sequence[str], findings: Sequence[str]) -> list[str]:
    return [f"  against it: {reason}" for reason in reasons] + [f"  {finding}" for finding in findings]


def rollback_command(args: Namespace) -> Answer:
    """Go back to the champion before."""
    registry = Registry(args.uri)
    try:
        now, left = rollback(registry, args.name, args.reason)
    except LostRace as error:
        return f"lost: {error}", {"outcome": "lost", "reasons": [str(error)]}, 1
    return f"{args.name}: version {now} is @{CHAMPION} again, {left} was", {"champion": now, "left": left}, 0


def pull_command(args: Namespace) -> Answer:
    """An adapter's folder with its evaluation, card and config."""
    registry = Registry(args.uri)
    if os.path.isdir(args.folder) and os.listdir(args.folder):
        raise UserError(f"{args.folder} is not empty; choose another folder")
    version = registry.find(args.version)
    found = registry.evaluation(version)
    with tempfile.TemporaryDirectory() as temporary:
        fetched = Path(registry.fetch(version.address, temporary))
        os.makedirs(args.folder, exist_ok=True)
        files = [name for name in (DESCRIPTION, TENSORS, CARD, CONFIG) if (fetched / name).is_file()]
        for name in files:
            shutil.copy(fetched / name, args.folder)
    if found is not None:
        Path(args.folder, "evaluation.json").write_bytes(content_of(found))
    return f"{version.address}: {args.folder}", {"version": version.address, "folder": args.folder}, 0


def predict_command(args: Namespace) -> Answer:
    """Classes of images."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size: {args.batch_size}; a positive number is right")
    local = os.path.exists(args.version) or "://" in args.version
    where = args.version if local else Registry(args.uri).find(args.version).address
    with local_folder(where, args.uri) as folder:
        description = read_adapter(folder)[0]
        model = load(folder, checkpoint_path=args.dry_runpoint)
    data = description["training"].get("data", {})
    classes = data.get("classes") or [str(i) for i in range(model.info.num_classes)]
    transform = eval_transform(model.info, data.get("crop_pct"), data.get("interpolation"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = predict(
        model.to(device),
        args.source,
        args.output,
        transform,
        classes,
        batch_size=args.batch_size,
        workers=args.workers,
        adapter=description["sha256"],
    )
    text = f"{args.output}: {counts['images']} images, {counts['predicted']} of them now"
    if counts["unreadable"]:
        text += f"; warning: {counts['unreadable']} could not be read, their lines say why"
    return text, counts | {"output": args.output, "adapter": where}, 0
