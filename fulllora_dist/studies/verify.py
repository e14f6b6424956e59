"""A row of a report, evaluated again from its committed adapter."""

import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import INDEX_NAME, Index
from fulllora_dist.distributed.comm import local_launcher
from fulllora_dist.evaluation.attack_names import AttackName
from fulllora_dist.evaluation.report import EvaluationReport, read_evaluation
from fulllora_dist.studies.plan import HELD_OUT, VALIDATION
from fulllora_dist.studies.processes import environment_of, evaluation_of, last_line, make_shards
from fulllora_dist.studies.results import Result, Verdicts, check_kept, correct, from_ranges, read_result

IMAGES = 50
Call = Callable[[Sequence[str], Mapping[str, str]], subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Verification:
    """What came out of an evaluation.

    Attributes:
        images: which ones, see `Evaluation`.
        n: how many of them.
        differing: {attack: ids of the images with another verdict}, of each attack that was made.
    """

    images: str
    n: int
    differing: dict[str, list[int]]

    @property
    def passed(self) -> bool:
        return not any(self.differing.values())


def _call(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*local_launcher(1), *command], env=environment, capture_output=True, text=True)


def verify(name: str, results_dir: str, call: Call = _call) -> list[Verification]:
    """Evaluate images of a result again: of each of its evaluations, under each attack but AutoAttack's, whose random
    numbers depend on all images.

    The images are whole batches of the evaluation, so that on the same kind of machine every bit is the same. Their
    shards are made if they are not there.

    Args:
        name: of the result.
        call: runs a script with its arguments, in an environment.

    Raises:
        UserError: no such result, no adapter or no data; the evaluation is refused.
    """
    folder = Path(results_dir)
    result = read_result(folder / f"{name}.json")
    check_kept(result, folder)
    asked = [(part, _repeatable(part)) for part in result["evaluations"] if part["images"] != HELD_OUT]
    if not any(attacks for _, attacks in asked):
        raise UserError(f"{name} has no evaluation that can be repeated on some of its images")
    return [_verified(result, folder / name, part, attacks, call) for part, attacks in asked if attacks]


def _repeatable(found: Verdicts) -> tuple[str, ...]:
    return tuple(attack for attack in found["attacks"] if AttackName.parse(attack).kind != "autoattack")


def _verified(result: Result, adapter: Path, found: Verdicts, attacks: tuple[str, ...], call: Call) -> Verification:
    name, images = result["name"], found["images"]
    data = result["config"]["data"]["validation"] if images == VALIDATION else images
    if not Path(data, INDEX_NAME).exists():
        make_shards([line for line in result["shards"] if data in shlex.split(line)], name)
    if Index.load(data).hash != found["data"]:
        raise UserError(f"{data} holds other images than {name} was evaluated on; make them with its `shards`")
    ids = _some(found)
    with tempfile.TemporaryDirectory() as temporary:
        report = _evaluate(result, adapter, found, attacks, (data, ids), Path(temporary), call)
    differing = {}
    for attack in attacks:
        then = dict(zip(from_ranges(found["ids"]), correct(found, attack), strict=True))
        now = zip(report["ids"], report["attacks"][attack]["correct"], strict=True)
        differing[attack] = [i for i, is_right in now if then[i] != is_right]
    return Verification(images, len(ids), differing)


def _some(found: Verdicts) -> list[int]:
    """At least `IMAGES` of the ids, of whole batches."""
    ids, size = from_ranges(found["ids"]), found["batch_size"]
    batches = [ids[i : i + size] for i in range(0, len(ids), size)]
    order = np.random.default_rng(0).permutation(len(batches))
    chosen: list[int] = []
    for i in order:
        if len(chosen) < IMAGES:
            chosen += batches[i]
    return sorted(chosen)


def _evaluate(
    result: Result,
    adapter: Path,
    found: Verdicts,
    attacks: Sequence[str],
    images: tuple[str, Sequence[int]],
    folder: Path,
    call: Call,
) -> EvaluationReport:
    data, ids = images
    config, listed, output = folder / "config.yaml", folder / "ids.txt", folder / "evaluation.json"
    config.write_text(yaml.safe_dump(result["config"]))
    listed.write_text("\n".join(map(str, ids)) + "\n")
    own = [
        f"data.validation={data}",
        f"run.seed={found['seed']}",
        f"threat.eps={found['eps']}",
        "evaluation.num_samples=null",
    ]
    own += [f"evaluation.batch_size={found['batch_size']}", "evaluation.gradient_masking_samples=0"]
    command = evaluation_of(str(config), str(adapter), attacks, output, [*own, "--ids", str(listed)])
    done = call(command, environment_of(result["environment"], result["cost"]["threads"]))
    if done.returncode:
        raise UserError(f"{result['name']}: its evaluation failed: {last_line(done.stderr)}")
    return read_evaluation(output)
