"""Robust accuracy: every sample attacked once, counted exactly over all ranks, with its uncertainty.

An evaluation is cut into work items (`work_items`), each one attack on one batch. Ranks take one after the other and
keep the results in a log (`resume_log`). They exchange them before each part of AutoAttack, which attacks the images
that the parts before have left (`verdicts`), and at the end; of all of them the report is made (`report`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fulllora_dist.attacks.pgd import attack_mode
from fulllora_dist.attacks.threat import Threat
from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.class_names import ClassMatch, match_classes
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.evaluation import checks, reported
from fulllora_dist.evaluation.attacks import EvalAttack, survivors_outcome
from fulllora_dist.evaluation.entering import outputs_of
from fulllora_dist.evaluation.images import EvalImages
from fulllora_dist.evaluation.progress import Progress, heartbeat, wait_for_all
from fulllora_dist.evaluation.report import EpsPoint, EvaluationReport, Key, ModelKeys, WorstCase, score, worst_cases
from fulllora_dist.evaluation.resume_log import ResumeLog, fingerprint
from fulllora_dist.evaluation.trained import classes_of, own_pictures
from fulllora_dist.evaluation.transfer import Sources, match_source
from fulllora_dist.evaluation.verdicts import Verdicts
from fulllora_dist.evaluation.work_items import WorkItem, first_items, part_items, take_turns
from fulllora_dist.models.compiled import uncompiled
from fulllora_dist.models.precision import in_full_fp32

Results = dict[str, Any]
"""By the name of a work item: of an attack for each id of its batch 1 where it is correct, 0 where it is wrong, -k
where it is wrong and k logits are not finite; of the checks {check: its numbers}."""


class Evaluator:
    """Accuracy under each attack (docs/evaluation.md).

    Ranks wait for each other only before each part of AutoAttack and at the end: each has a full replica of the model,
    in which a forward pass is no collective, and what an item gives depends on its own name alone.

    Args:
        attacks: names, see `EvalAttack`.
        threat: the ball of perturbations.
        comm: the ranks that share the work.
        more_threats: further balls: of this norm, for robust accuracy against eps, or of others.
        seed: of the random starts.
        gradient_masking_samples: on how many images, drawn evenly over the classes, symptoms of masked gradients are
            looked for; 0 looks for none.
        sources: the models of `transfer` attacks.
        backbone, adapter, adapter_sha256: names for the report.
        precision: what the model computes in, for the report.
        progress: whether rank 0 prints how far all ranks are.

    Raises:
        UserError: unknown or repeated attacks, a transfer without its model.
    """

    def __init__(
        self,
        attacks: Sequence[str],
        threat: Threat,
        comm: Comm,
        *,
        more_threats: Sequence[Threat] = (),
        seed: int = 0,
        gradient_masking_samples: int = 0,
        sources: Sources | None = None,
        backbone: str | None = None,
        adapter: str | None = None,
        adapter_sha256: str | None = None,
        precision: str = "fp32",
        progress: bool = True,
    ):
        self._attacks = EvalAttack.parse_all(attacks)
        self._threats = [threat, *(other for other in more_threats if other != threat)]
        self._comm = comm
        self._seed = seed
        self._checked = gradient_masking_samples
        self._given: Sources = sources or {}
        self._sources: Sources = {}  # of a run, with outputs in the model's order
        for attack in self._attacks:
            if attack.kind == "transfer" and attack.source not in self._given:
                raise UserError(f"evaluation.attacks: {attack.name} needs its model in sources")
        self._shows = progress and comm.is_main
        self._precision = precision
        self._evaluated = {"backbone": backbone, "adapter": adapter, "adapter_sha256": adapter_sha256}

    def run(
        self,
        predict: nn.Module,
        images: EvalImages,
        resume_dir: str | Path | None = None,
        write: Callable[[EvaluationReport], None] | None = None,
    ) -> EvaluationReport:
        """Evaluate, on all ranks together; every rank gets the same report.

        Args:
            predict: fp32 pixels [B, 3, H, W] in [0, 1] -> logits [B, classes], on `comm.device`; put into evaluation
                mode for the time.
            resume_dir: folder for finished work, from which a run that was killed resumes; emptied at the end.
            write: called with the report, on rank 0, before `resume_dir` is emptied.

        Raises:
            SharedUserError: the model has not as many outputs as the data has classes, other classes (`match_classes`),
                or too few for an attack; or `write` raises a UserError or an OSError.
        """
        write_all = None if write is None else lambda reports: write(reports[""])
        return self.run_variants(predict, {"": nullcontext}, images, resume_dir, write_all)[""]

    def run_variants(
        self,
        predict: nn.Module,
        variants: Mapping[str, Callable[[], AbstractContextManager[None]]],
        images: EvalImages,
        resume_dir: str | Path | None = None,
        write: Callable[[dict[str, EvaluationReport]], None] | None = None,
    ) -> dict[str, EvaluationReport]:
        """`run` for each of several variants of one model, whose work items the ranks take from one pool.

        Args:
            variants: {name: opens a context in which `predict` is that variant}; outside it the model is as it was. A
                result in `resume_dir` is known by this name: with the same weights it must stand for the same variant.

        Returns:
            {name: what `run` returns}.
        """
        ids = np.sort(np.concatenate(images.batches))
        if len(np.unique(ids)) < len(ids):
            raise UserError("evaluation: a sample is in two batches")
        match, self._sources = self._match_classes(predict, images)
        comm = self._comm
        digest = "" if resume_dir is None else fingerprint(predict, images, self._seed, self._sources)
        log = ResumeLog(resume_dir, digest, comm.rank)
        results: Results = dict(comm.all_gather_list(list(log.results().items())))
        verdicts, measured = self._finish(predict, variants, images, ids, results, log, match)
        model: ModelKeys = {
            "classes": list(classes_of(predict, images.index.classes)) or None,
            "class_match": match.note,
            "own_pictures": own_pictures(predict),
        }
        reports = {
            name: self._report(images, verdicts, name, checks.joined(measured[name]), model) for name in variants
        }
        if write is None:
            comm.barrier()  # every rank has the results
        else:
            comm.run_on_rank0(lambda: write(reports), "the evaluation cannot be written")
        log.forget()
        return reports

    def _match_classes(self, predict: nn.Module, images: EvalImages) -> tuple[ClassMatch, Sources]:
        """Which output each label is, and the sources with outputs in that order, after checking that attacks, sources
        and data fit the model."""
        data, pixels = images.index.classes, images.read(images.batches[0][:1]).to(self._comm.device).pixels()
        try:
            match = match_classes(classes_of(predict, data), data)
            sources = {
                attack.source: match_source(self._given[attack.source], predict, pixels, data, attack.name)
                for attack in self._attacks
                if attack.kind == "transfer"
            }
        except UserError as error:
            raise SharedUserError(str(error)) from None
        outputs, classes = outputs_of(predict, pixels), len(data)
        if outputs != classes:
            raise SharedUserError(
                f"the data has {classes} classes, the model {outputs} outputs; set model.num_classes={classes} "
                "for a new head, or model.class_indices to rows of the checkpoint's"
            )
        for attack in self._attacks:
            attack.check_classes(outputs)
        return match, sources

    def _finish(
        self,
        predict: nn.Module,
        variants: Mapping[str, Callable[[], AbstractContextManager[None]]],
        images: EvalImages,
        ids: np.ndarray,
        results: Results,
        log: ResumeLog,
        match: ClassMatch,
    ) -> tuple[Verdicts, dict[str, list[Any]]]:
        """Do what is not known yet, on all ranks together: first everything but AutoAttack, then its parts one after
        the other, each on what the ones before have left on all ranks. `results` grows.

        Returns:
            What became of each image, and {variant: results of its checks}.
        """
        comm, counters, verdicts = self._comm, self._comm.counters(), Verdicts(ids)
        progress = Progress(self._attacks, len(ids), counters, comm.world, self._threats, self._shows)
        batch_size = max(map(len, images.batches))
        first = first_items(variants, self._attacks, self._threats, images, self._checked)
        with attack_mode(predict), in_full_fp32(), uncompiled(predict), heartbeat(predict, counters):
            for number in range(1 + max(len(attack.parts) for attack in self._attacks)):
                items = first
                if number:
                    items = part_items(number, variants, self._attacks, self._threats, batch_size, verdicts.survivors)
                progress.begin(number, items, results)
                own, todo = Results(), [item for item in items if item.name not in results]
                for item, batch in take_turns(todo, images, counters, comm.world, number):
                    start = time.monotonic()
                    batch = batch.to(comm.device)
                    with variants[item.variant]():
                        own[item.name] = self._result(predict, item, replace(batch, labels=match.of(batch.labels)))
                    log.keep(item.name, own[item.name])
                    progress.finished(item, own[item.name], time.monotonic() - start)
                wait_for_all(counters, comm.world, number)
                results |= dict(comm.all_gather_list(list(own.items())))
                verdicts.record(items, results)
        measured: dict[str, list[Any]] = {name: [] for name in variants}
        for item in first:
            if item.attack is None:
                measured[item.variant].append(results[item.name])
        return verdicts, measured

    def _result(self, predict: nn.Module, item: WorkItem, batch: Batch) -> Any:
        threat, x, y = self._threats[item.radius], batch.pixels(), batch.labels
        if item.attack is None:
            return checks.measure(checks.CheckBatch(predict, x, y, batch.ids, threat, self._seed))
        if item.attack.parts:
            outcome = survivors_outcome(predict, x, y, part=item.attack.parts[-1], threat=threat, seed=self._seed)
        else:
            source = self._sources.get(item.attack.source)
            outcome = item.attack.outcome(predict, x, y, threat=threat, seed=self._seed, ids=batch.ids, source=source)
        return torch.where(outcome.correct, 1, -outcome.not_finite).tolist()

    def _report(
        self, images: EvalImages, verdicts: Verdicts, variant: str, measured: dict[str, Any], model: ModelKeys
    ) -> EvaluationReport:
        ids = verdicts.ids
        labels, classes = images.index.labels[ids], images.index.classes
        points: list[EpsPoint] = []
        warnings = checks.warnings(measured)
        norm = self._threats[0].norm
        for radius, threat in enumerate(self._threats):
            asked = self._attacks if radius == 0 else [attack for attack in self._attacks if attack.kind != "clean"]
            found = {attack: verdicts.of(variant, radius, attack) for attack in asked}
            correct = {attack: (values == 1).astype(int) for attack, values in found.items()}
            point: EpsPoint = {
                "eps": threat.eps,
                "attacks": {attack.name: score(hits, labels, classes) for attack, hits in correct.items()},
            }
            in_ball = {Key(norm, threat.eps, attack.name): hits == 1 for attack, hits in correct.items()}
            for left in worst_cases(in_ball).values():  # none where there is no attack
                point["worst_case"] = score(left.astype(int), labels, classes)
            if threat.norm != norm:
                point["norm"] = threat.norm
            points.append(point)
            standing = {attack: hits == 1 for attack, hits in correct.items()}
            ball = f"{'' if threat.norm == norm else f'{threat.norm} '}eps = {threat.eps:.4g}"
            warnings += reported.order_warnings(standing, f"{ball}: ")
            warnings += reported.finite_warnings(found, ball)
        if self._precision not in ("fp32", "fp64"):
            warnings.append(f"precision: computed in {self._precision}; a figure to report is computed in fp32")
        worst: WorstCase = {"worst_case": points[0]["worst_case"]} if "worst_case" in points[0] else {}
        return {
            "n": len(ids),
            "eps": points[0]["eps"],
            "norm": norm,
            "precision": self._precision,
            "backbone": self._evaluated["backbone"],
            "adapter": self._evaluated["adapter"],
            "adapter_sha256": self._evaluated["adapter_sha256"],
            "seed": self._seed,
            "data": images.index.hash,
            "pictures": dict(images.settings),
            **model,
            "ids": ids.tolist(),
            "attacks": points[0]["attacks"],
            **worst,
            "more_eps": [point for point in points[1:] if "norm" not in point],
            "more_norms": [point for point in points if "norm" in point],
            "checks": measured,
            "warnings": warnings,
        }
