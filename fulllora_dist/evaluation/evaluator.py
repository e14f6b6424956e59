"""Robust accuracy: every sample attacked once, counted exactly over all ranks, with its uncertainty.

An evaluation is cut into work items (`work_items`), each one attack on one batch. Ranks take one after the other, keep
the results in a log (`resume_log`) and exchange them at the end; of all of them the report is made (`report`).
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
from fulllora_dist.attacks.threat import Threat, number_in
from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.class_names import ClassMatch, match_classes
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.evaluation import checks
from fulllora_dist.evaluation.attacks import parse_attacks
from fulllora_dist.evaluation.images import EvalImages
from fulllora_dist.evaluation.progress import Progress, heartbeat, wait_for_all
from fulllora_dist.evaluation.report import EpsPoint, EvaluationReport, ModelKeys, score
from fulllora_dist.evaluation.resume_log import ResumeLog, fingerprint
from fulllora_dist.evaluation.trained import classes_of, own_pictures
from fulllora_dist.evaluation.work_items import WorkItem, take_turns, work_items
from fulllora_dist.models.compiled import uncompiled
from fulllora_dist.models.precision import in_full_fp32

Results = dict[str, Any]
"""By the name of a work item: of an attack for each id of its batch 1 where it is correct, 0 where it is wrong, -k
where it is wrong and k logits are not finite; of the checks {check: its numbers}."""


class Evaluator:
    """Accuracy under each attack (docs/evaluation.md).

    No rank waits for another before the end: each has a full replica of the model, in which a forward pass is no
    collective, and what an item gives depends on its own name alone.

    Args:
        attacks: names, see `EvalAttack`.
        threat: the ball of perturbations.
        comm: the ranks that share the work.
        more_threats: further balls, for robust accuracy against eps.
        seed: of the random starts.
        gradient_masking_samples: on how many images, drawn evenly over the classes, symptoms of masked gradients are
            looked for; 0 looks for none.
        backbone, adapter, adapter_sha256: names for the report.
        precision: what the model computes in, for the report.
        progress: whether rank 0 prints how far all ranks are.

    Raises:
        UserError: unknown or repeated attacks.
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
        backbone: str | None = None,
        adapter: str | None = None,
        adapter_sha256: str | None = None,
        precision: str = "fp32",
        progress: bool = True,
    ):
        self._attacks = parse_attacks(attacks)
        self._threats = [threat, *(other for other in more_threats if other != threat)]
        self._comm = comm
        self._seed = seed
        self._checked = gradient_masking_samples
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
        match = self._match_classes(predict, images)
        comm, items = self._comm, work_items(variants, self._attacks, self._threats, images, self._checked)
        digest = "" if resume_dir is None else fingerprint(predict, images, self._seed)
        log = ResumeLog(resume_dir, digest, comm.rank)
        results: Results = dict(comm.all_gather_list(list(log.results().items())))
        results |= self._finish(predict, variants, images, items, results, log, match)
        model: ModelKeys = {
            "classes": list(classes_of(predict, images.index.classes)) or None,
            "class_match": match.note,
            "own_pictures": own_pictures(predict),
        }
        reports = {
            name: self._report(images, ids, [item for item in items if item.variant == name], results, model)
            for name in variants
        }
        if write is None:
            comm.barrier()  # every rank has the results
        else:
            comm.run_on_rank0(lambda: write(reports), "the evaluation cannot be written")
        log.forget()
        return reports

    def _match_classes(self, predict: nn.Module, images: EvalImages) -> ClassMatch:
        """Which output each label is, after checking that the attacks and the data fit the model."""
        try:
            match = match_classes(classes_of(predict, images.index.classes), images.index.classes)
        except UserError as error:
            raise SharedUserError(str(error)) from None
        batch = images.read(images.batches[0][:1]).to(self._comm.device)
        with torch.no_grad(), attack_mode(predict):
            outputs = predict(batch.pixels()).shape[1]
        classes = len(images.index.classes)
        if outputs != classes:
            raise SharedUserError(
                f"the data has {classes} classes, the model {outputs} outputs; set model.num_classes={classes} "
                "for a new head, or model.class_indices to rows of the checkpoint's"
            )
        for attack in self._attacks:
            attack.check_classes(outputs)
        return match

    def _finish(
        self,
        predict: nn.Module,
        variants: Mapping[str, Callable[[], AbstractContextManager[None]]],
        images: EvalImages,
        items: list[WorkItem],
        known: Results,
        log: ResumeLog,
        match: ClassMatch,
    ) -> Results:
        """Do what is not known yet, on all ranks together."""
        comm, counters, own = self._comm, self._comm.counters(), Results()
        sizes = [number_in(threat.norm, threat.eps) for threat in self._threats]
        progress = Progress(items, known, counters, comm.world, sizes, self._shows)
        todo = [item for item in items if item.name not in known]
        with attack_mode(predict), in_full_fp32(), uncompiled(predict), heartbeat(predict, counters):
            for item, batch in take_turns(todo, images, counters, comm.world):
                start = time.monotonic()
                batch = batch.to(comm.device)
                with variants[item.variant]():
                    own[item.name] = self._result(predict, item, replace(batch, labels=match.of(batch.labels)))
                log.keep(item.name, own[item.name])
                progress.finished(item, own[item.name], time.monotonic() - start)
            wait_for_all(counters, comm.world)
        return dict(comm.all_gather_list(list(own.items())))

    def _result(self, predict: nn.Module, item: WorkItem, batch: Batch) -> Any:
        threat, x = self._threats[item.radius], batch.pixels()
        if item.attack is None:
            return checks.measure(checks.CheckBatch(predict, x, batch.labels, batch.ids, threat, self._seed))
        outcome = item.attack.outcome(predict, x, batch.labels, threat=threat, seed=self._seed, ids=batch.ids)
        return torch.where(outcome.correct, 1, -outcome.not_finite).tolist()

    def _report(
        self, images: EvalImages, ids: np.ndarray, items: list[WorkItem], results: Results, model: ModelKeys
    ) -> EvaluationReport:
        labels, classes = images.index.labels[ids], images.index.classes
        points: list[EpsPoint] = []
        measured = checks.joined([results[item.name] for item in items if item.attack is None])
        warnings = checks.warnings(measured)
        for radius, threat in enumerate(self._threats):
            found = {}
            for attack in self._attacks if radius == 0 else [a for a in self._attacks if a.kind != "clean"]:
                found[attack] = np.full(len(ids), 2)
                for item in items:
                    if (item.attack, item.radius) == (attack, radius):
                        found[attack][np.searchsorted(ids, item.ids)] = results[item.name]
                assert (found[attack] < 2).all(), f"{attack.name}: not every sample was seen"
            correct = {attack: (values == 1).astype(int) for attack, values in found.items()}
            scored = {attack.name: score(hits, labels, classes) for attack, hits in correct.items()}
            points.append({"eps": threat.eps, "attacks": scored})
            standing = {attack: hits == 1 for attack, hits in correct.items()}
            warnings += checks.order_warnings(standing, f"eps = {threat.eps:.4g}: ")
            warnings += checks.finite_warnings(found, threat.eps)
        if self._precision not in ("fp32", "fp64"):
            warnings.append(f"precision: computed in {self._precision}; a figure to report is computed in fp32")
        return {
            "n": len(ids),
            "eps": points[0]["eps"],
            "norm": self._threats[0].norm,
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
            "more_eps": points[1:],
            "checks": measured,
            "warnings": warnings,
        }
