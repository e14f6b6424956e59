"""Robust accuracy, and whether to believe it."""

from fulllora_dist.attacks.threat import size_in
from fulllora_dist.evaluation.attacks import EvalAttack, is_right, parse_attacks
from fulllora_dist.evaluation.evaluator import EvalImages, Evaluator
from fulllora_dist.evaluation.function import eval_transform, evaluate
from fulllora_dist.evaluation.report import check_output, table, write_evaluation, write_figures

__all__ = [
    "EvalAttack",
    "EvalImages",
    "Evaluator",
    "check_output",
    "eval_transform",
    "evaluate",
    "is_right",
    "parse_attacks",
    "size_in",
    "table",
    "write_evaluation",
    "write_figures",
]
