"""Robust accuracy: every sample attacked once, counted exactly over all ranks, with its uncertainty."""

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from fulllora_dist.attacks.pgd import attack_mode
from fulllora_dist.attacks.threat import Threat, number_in
from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.index import Index
from fulllora_dist.data.plan import stratified_order
from fulllora_dist.distributed.comm import Comm, Counters
from fulllora_dist.evaluation import checks
from fulllora_dist.evaluation.attacks import EvalAttack, parse_attacks
from fulllora_dist.evaluation.resume_log import ResumeLog
from fulllora_dist.evaluation.score import score
from fulllora_dist.evaluation.work_items import WorkItem, WorkQueue
from fulllora_dist.models.finetune import AdaptedModel
from fulllora_dist.models.precision import in_full_fp32

_KEPT = 4096  # decoded images of each rank: attacks come to the same batches one after the other
_CHECK_BATCH = 16  # passes of Square an image make a small batch worth while


class EvalImages(Protocol):
    """What is evaluated: `data.loader.EvalStream`, or anything alike.

    Attributes:
        batches: int64 arrays, the ids of each batch; every sample in one of them.
        index: class names and the labels by id.
        digest: differs where the images of these ids or the batches do.
        settings: how they are made of the data, for the report; JSON-able.
    """

    batches: list[np.ndarray]
    index: Index
    digest: str
    settings: Mapping[str, Any]

    def read(self, ids: np.ndarray) -> Batch:
        """The images of these ids."""


class Evaluator:
    """Accuracy under each attack, in the form of evaluation.json (docs/evaluation.md).

    Ranks take piece after piece, each an attack on a batch: clean images and the checks first, as they show what
    is wrong before hours of attacks, then the costliest attacks first. None waits for another, and what a piece
    gives depends on its own name alone. Each rank has a full replica of the model, in which a forward pass is no
    collective.

    Args:
        attacks: names, see `EvalAttack`.
        threat: the ball of perturbations.
        ranks: those that share the work.
        more: further balls, for robust accuracy against eps.
        seed: of the random starts.
        check: on how many images, drawn evenly over the classes, symptoms are looked for; 0 looks for none.
        backbone, adapter, adapter_sha256: names for the report.
        precision: what the model computes in, for the report.
        progress: whether rank 0 shows a bar.

    Raises:
        UserError: unknown or repeated attacks.
    """

    def __init__(
        self,
        attacks: Sequence[str],
        threat: Threat,
        ranks: Comm,
        *,
        more: Sequence[Threat] = (),
        seed: int = 0,
        check: int = 0,
        backbone: str | None = None,
        adapter: str | None = None,
        adapter_sha256: str | None = None,
        precision: str = "fp32",
        progress: bool = True,
    ):
        self._attacks = parse_attacks(attacks)
        self._threats = [threat, *(other for other in more if other != threat)]
        self._ranks = ranks
        self._seed = seed
        self._check = check
        self._shows = progress and ranks.is_main
        self._metadata = {"precision": precision, "backbone": backbone, "adapter": adapter}
        self._metadata["adapter_sha256"] = adapter_sha256

    def run(
        self,
        predict: nn.Module,
        images: EvalImages,
        partial: str | Path | None = None,
        write: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Evaluate, on all ranks together.

        Args:
            predict: fp32 pixels [B, 3, H, W] in [0, 1] -> logits [B, classes], on `ranks.device`; put into evaluation
                mode for the time.
            partial: folder for what is done, from which a run that was killed goes on; emptied at the end.
            write: called with what is returned, on rank 0, before `partial` is emptied.

        Returns:
            On every rank the same: {"n", "eps", "norm", "precision", "backbone", "adapter", "adapter_sha256", "seed",
            "ids": [n], "data": hash of the index, "pictures": how they were made of the data, and the batch size,
            "attacks": {name: {"accuracy", "low", "high", "correct": [n of 0/1 in the order of ids], "per_class":
            {class name: [correct, n]}}}, "more_eps": [{"eps", "attacks"}], "checks": {check: its numbers}, "warnings":
            [lines]}. low and high bound Wilson's 95 % interval.

        Raises:
            SharedUserError: the model has not as many outputs as the data has classes, or too few for an attack; or
                `write` raises a UserError or an OSError.
        """
        whole = None if write is None else lambda found: write(found[""])
        return self.run_variants(predict, {"": nullcontext}, images, partial, whole)[""]

    def run_variants(
        self,
        predict: nn.Module,
        variants: Mapping[str, Callable[[], AbstractContextManager[None]]],
        images: EvalImages,
        partial: str | Path | None = None,
        write: Callable[[dict[str, dict[str, Any]]], None] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """`run` for each of several variants of one model, whose pieces the ranks take from one pool.

        Args:
            variants: {name: opens a context in which `predict` is that variant}; outside it the model is as it was. A
                partial result is known by this name: with the same weights it must stand for the same variant.

        Returns:
            {name: what `run` returns}.
        """
        ids = np.sort(np.concatenate(images.batches))
        if len(np.unique(ids)) < len(ids):
            raise UserError("evaluation: a sample is in two batches")
        self._check_outputs(predict, images)
        done = ResumeLog(partial, self._fingerprint(predict, images, partial), self._ranks.rank)
        known = dict(self._ranks.all_gather_list(list(done.found().items())))
        items = self._work_items(variants, images, ids)
        left = [item for item in items if item.name not in known]
        own: dict[str, Any] = {}
        sizes = [number_in(threat.norm, threat.eps) for threat in self._threats]
        progress = WorkQueue(items, left, known, self._ranks.counters(), sizes, self._shows)
        if known and self._shows:
            print(f"evaluation: {len(items) - len(left)} of {len(items)} pieces are done; going on", file=sys.stderr)
        with progress, attack_mode(predict), in_full_fp32(), progress.seen(predict):
            for item, batch in self._turns(left, images, progress.counters):
                with variants[item.variant]():
                    own[item.name] = result = self._do(predict, item, batch.to(self._ranks.device))
                done.keep(item.name, result)
                progress.add(item, result)
            progress.await_all(self._ranks.world)  # a collective has a limit, and the last pieces may be long
        known |= dict(self._ranks.all_gather_list(list(own.items())))
        results = {
            name: self._results(images, ids, [p for p in items if p.variant == name], known) for name in variants
        }
        if write is None:
            self._ranks.barrier()  # every rank has the results
        else:
            self._ranks.run_on_rank0(lambda: write(results), "the evaluation cannot be written")
        done.forget()
        return results

    def _check_outputs(self, predict: nn.Module, images: EvalImages) -> None:
        batch = images.read(images.batches[0][:1]).to(self._ranks.device)
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

    def _fingerprint(self, predict: nn.Module, images: EvalImages, partial: str | Path | None) -> str:
        """Of all that a piece's result depends on besides its name."""
        if partial is None:
            return ""
        digest = hashlib.sha256(f"{images.digest} {self._seed}".encode())
        if isinstance(predict, AdaptedModel):  # alpha, heads and normalisation are in no tensor of its state_dict
            digest.update(f"{predict.info} {predict.spec}".encode())
        for name, tensor in chain(predict.named_parameters(), predict.named_buffers()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _work_items(self, variants: Iterable[str], images: EvalImages, ids: np.ndarray) -> list[WorkItem]:
        """All of them in their order: the last ones, which some ranks may have to wait for, are short."""
        items = []
        for variant in variants:
            prefix = f"{variant}: " if variant else ""
            for attack in self._attacks:
                threats = self._threats[:1] if attack.kind == "clean" else self._threats
                for number, threat in enumerate(threats):
                    for batch in images.batches:
                        name = f"{prefix}{attack.name} {threat.norm} {threat.eps!r} {int(batch[0])}"
                        items.append(WorkItem(name, variant, attack, number, batch))
            if self._check and self._threats[0].eps:
                chosen = ids[stratified_order(images.index.labels[ids])[: self._check]]
                cut = [chosen[i : i + _CHECK_BATCH] for i in range(0, len(chosen), _CHECK_BATCH)]
                name = f"{prefix}checks of {self._check} {self._threats[0].norm} {self._threats[0].eps!r}"
                items += [WorkItem(f"{name} {i}", variant, None, 0, np.sort(batch)) for i, batch in enumerate(cut)]

        early = ("clean", "checks")

        def turn(item: WorkItem) -> tuple[int, float]:
            first = early.index(item.kind) if item.kind in early else len(early)
            return first, -item.passes / len(item.ids)

        return sorted(items, key=turn)

    def _turns(self, items: list[WorkItem], images: EvalImages, counters: Counters) -> Iterator[tuple[WorkItem, Batch]]:
        """The pieces that this rank gets, with their images; the next ones are read meanwhile,
        while there are many."""
        kept: OrderedDict[bytes, Batch] = OrderedDict()

        def take() -> tuple[WorkItem, Batch] | None:
            turn = counters.add("taken", 1) - 1
            if turn >= len(items):
                return None
            item = items[turn]
            key = item.ids.tobytes()
            batch = kept.pop(key, None) or images.read(item.ids)
            kept[key] = batch
            while sum(map(len, kept.values())) > _KEPT:
                kept.popitem(last=False)
            return item, batch

        with ThreadPoolExecutor(1, "images") as reader:
            coming = reader.submit(take)
            while (taken := coming.result()) is not None:
                # towards the end a rank takes none that it does not begin yet: another one may be free before
                early = len(items) - counters.add("taken", 0) > 2 * self._ranks.world
                if early:
                    coming = reader.submit(take)
                yield taken
                if not early:
                    coming = reader.submit(take)

    def _do(self, predict: nn.Module, item: WorkItem, batch: Batch) -> Any:
        """Of an attack 0 or 1 for each id; of the checks their numbers."""
        threat, x = self._threats[item.radius], batch.pixels()
        if item.attack is None:
            examined = checks.Examined(predict, x, batch.labels, batch.ids, threat, self._seed)
            return {name: check(examined) for name, check in checks.CHECKS.items()}
        right = item.attack.right(predict, x, batch.labels, threat=threat, seed=self._seed, ids=batch.ids)
        return right.int().tolist()

    def _results(
        self, images: EvalImages, ids: np.ndarray, items: list[WorkItem], known: dict[str, Any]
    ) -> dict[str, Any]:
        index = images.index
        scores: list[dict[str, Any]] = [{} for _ in self._threats]
        columns: list[dict[EvalAttack, np.ndarray]] = [{} for _ in self._threats]
        for number, attacks in enumerate(scores):
            for attack in self._attacks:
                correct = np.full(len(ids), -1)
                for item in items:
                    if (item.attack, item.radius) == (attack, number):
                        correct[np.searchsorted(ids, item.ids)] = known[item.name]
                if number == 0 or attack.kind != "clean":
                    assert (correct >= 0).all(), f"{attack.name}: {(correct < 0).sum()} of {len(ids)} samples not seen"
                    columns[number][attack] = correct == 1
                    attacks[attack.name] = score(correct, index.labels[ids], index.classes)
        measured = checks.joined([known[item.name] for item in items if item.attack is None])
        warnings = checks.warnings(measured)
        for number, threat in enumerate(self._threats):
            warnings += checks.order_warnings(columns[number], f"eps = {threat.eps:.4g}: ")
        if self._metadata["precision"] not in ("fp32", "fp64"):
            warnings.append(
                f"precision: computed in {self._metadata['precision']}; a figure to report is computed in fp32"
            )
        first = self._threats[0]
        return {
            "n": len(ids),
            "eps": first.eps,
            "norm": first.norm,
            **self._metadata,
            "seed": self._seed,
            "data": index.hash,
            "pictures": dict(images.settings),
            "ids": ids.tolist(),
            "attacks": scores[0],
            "more_eps": [
                {"eps": threat.eps, "attacks": attacks}
                for threat, attacks in zip(self._threats[1:], scores[1:], strict=True)
            ],
            "checks": measured,
            "warnings": warnings,
        }
