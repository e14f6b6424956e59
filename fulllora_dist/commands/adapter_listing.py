"""The commands of tools/adapters.py that show what the store knows. They need MLflow, but no torch."""

import dataclasses
import time
from argparse import Namespace
from typing import Any

from fulllora_dist.core.text_table import text_table
from fulllora_dist.registry.registry import CHAMPION, Registry, Version

Answer = tuple[str, dict[str, Any], int]
"""What each command returns: text for people, a result that JSON can hold, the exit code."""
_ROBUST = "robust % (lowest attack)"


def list_command(args: Namespace) -> Answer:
    """Registered models, or the versions of one."""
    registry = Registry(args.uri)
    if args.name is not None:
        versions = registry.versions(args.name)
        rows = [("version", "aliases", "clean %", _ROBUST, "method", "published")]
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
        return text_table(rows), {"name": args.name, "versions": [version_as_json(version) for version in versions]}, 0
    models = {name: registry.versions(name) for name in registry.names()}
    summary = [("model", "versions", "@champion", "clean %", _ROBUST)]
    for name, versions in models.items():
        champion = next((version for version in versions if CHAMPION in version.aliases), None)
        cells = (str(champion.number), _accuracy(champion, "clean"), _robust(champion)) if champion else ("", "", "")
        summary.append((name, str(len(versions)), *cells))
    text = text_table(summary) if models else f"no adapters at {registry.store.uri}"
    return text, {"models": {name: list(map(version_as_json, found)) for name, found in models.items()}}, 0


def _accuracy(version: Version, attack: str) -> str:
    scores = version.accuracies.get(attack)
    return "" if scores is None else "{:.1f} ({:.1f} to {:.1f})".format(*(100 * score for score in scores))


def _robust(version: Version) -> str:
    robust = {attack: scores for attack, scores in version.accuracies.items() if attack != "clean"}
    if not robust:
        return ""
    lowest = min(robust, key=lambda attack: robust[attack][0])
    return f"{_accuracy(version, lowest)} {lowest}"


def version_as_json(version: Version) -> dict[str, Any]:
    """A version for programs."""
    return dataclasses.asdict(version) | {"address": version.address}


def show_command(args: Namespace) -> Answer:
    """Everything about a version."""
    version = Registry(args.uri).find(args.version)
    rows = [
        ("aliases", ", ".join(version.aliases) or "none"),
        ("run", version.run_id or "none"),
        ("source", version.source),
        *sorted(version.tags.items()),
    ]
    return f"{version.address}\n{text_table(rows)}", version_as_json(version), 0
