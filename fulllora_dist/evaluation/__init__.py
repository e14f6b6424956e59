"""Robust accuracy, and whether to believe it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fulllora_dist.core.units import size_in
    from fulllora_dist.evaluation.attacks import EvalAttack, is_correct, parse_attacks
    from fulllora_dist.evaluation.evaluator import Evaluator
    from fulllora_dist.evaluation.function import evaluate
    from fulllora_dist.evaluation.images import EvalImages
    from fulllora_dist.evaluation.output import check_output
    from fulllora_dist.evaluation.report import EvaluationReport, write_evaluation
    from fulllora_dist.evaluation.summary import table, write_figures
    from fulllora_dist.evaluation.trained import eval_transform

__all__ = [
    "EvalAttack",
    "EvalImages",
    "EvaluationReport",
    "Evaluator",
    "check_output",
    "eval_transform",
    "evaluate",
    "is_correct",
    "parse_attacks",
    "size_in",
    "table",
    "write_evaluation",
    "write_figures",
]

_HOMES = {
    "EvalAttack": "evaluation.attacks",
    "EvalImages": "evaluation.images",
    "EvaluationReport": "evaluation.report",
    "Evaluator": "evaluation.evaluator",
    "check_output": "evaluation.output",
    "eval_transform": "evaluation.trained",
    "evaluate": "evaluation.function",
    "is_correct": "evaluation.attacks",
    "parse_attacks": "evaluation.attacks",
    "size_in": "core.units",
    "table": "evaluation.summary",
    "write_evaluation": "evaluation.report",
    "write_figures": "evaluation.summary",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the settings of an evaluation need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fulllora_dist.{_HOMES[name]}"), name)
