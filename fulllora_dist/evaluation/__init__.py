"""Robust accuracy, and whether to believe it."""

from fulllora_dist.attacks.threat import size_in
from fulllora_dist.evaluation.attacks import EvalAttack, is_correct, parse_attacks
from fulllora_dist.evaluation.evaluator import Evaluator
from fulllora_dist.evaluation.function import evaluate
from fulllora_dist.evaluation.images import EvalImages
from fulllora_dist.evaluation.report import EvaluationReport, check_output, write_evaluation
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
