"""A collapse of robust accuracy: noticed in time, and answered as configured, at every ZeRO stage.

The figures are scripted, the rest is real: which arms collapse by themselves is measured by
tools/experiments/collapse.py.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import EPS, noise_shards
from test_guard import _checkpoints, _guarded
from test_resume import BATCHES, _start, _train

from fulllora_dist.checkpoints.format import write_checkpoint
from fulllora_dist.commands import train
from fulllora_dist.config.schema import Config
from fulllora_dist.config.training import GuardSettings
from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.core.units import size_in
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.methods.multi_step import Weakened
from fulllora_dist.methods.pgd import PGDSettings
from fulllora_dist.models.adapter_file import read_adapter
from fulllora_dist.registry.card import model_card
from fulllora_dist.training.build import build_model
from fulllora_dist.training.finalize import finalize
from fulllora_dist.training.guard import Check, Guard, least_that_counts
from fulllora_dist.training.phases import build_phases
from fulllora_dist.training.rollback import check_settings
from tests.ranks import RankServer

# {factor of the learning rate, which tells the restarts apart: {batch: robust accuracy}}; checks at even batches
ONCE = {1.0: {2: 0.8, 4: 0.2}, 0.5: {4: 0.6, 6: 0.65}}
TWICE = {1.0: {2: 0.8, 4: 0.2}, 0.5: {4: 0.1}, 0.25: {4: 0.6, 6: 0.85}}
FOR_GOOD = {1.0: {2: 0.8, 4: 0.2, 6: 0.1}}
AMID = -1  # of a rollback: its checkpoints are deleted, its metrics are not

Script = dict[float, dict[int, float]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return noise_shards(tmp_path_factory.mktemp("train"), seed=0)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> str:
    return noise_shards(tmp_path_factory.mktemp("held_out"), seed=1)


def _collapsing(output: Path, shards: str, held_out: str, stage: int, answer: str, *more: tuple[str, str, Any]) -> dict:
    """FGSM without a random start, a checkpoint after every batch, a check after every second."""
    config = _guarded(output, shards, held_out, stage, 2, ("optim", "lr", 3e-3), *more)
    config["method"] = {"name": "n_fgsm", "noise": 0}
    config["guard"] |= {"on_collapse": answer, "rollback_eps": config["threat"]["eps"] / 2}
    config["run"]["keep_checkpoints"] = 1
    return config


@contextmanager
def _scripted(script: Script) -> Iterator[None]:
    """Checks that find what the script says, 0.6 where it says nothing."""
    real = Guard.check

    def check(guard: Guard, engine: Engine, step: int) -> Check:
        before = dict(vars(guard))
        real(guard, engine, step)  # a real one, for its collectives
        vars(guard).update(before)
        return guard.judge(script[engine.lr_scale].get(step, 0.6), step)

    Guard.check = check  # type: ignore[method-assign]
    try:
        yield
    finally:
        Guard.check = real  # type: ignore[method-assign]


def _run(comm: Comm, settings: dict, script: Script, until: int | None = None, with_end: bool = False) -> Any:
    """As train.py does; failing after batch `until` of a run that rolled back, or AMID that. Batches of the start,
    or the line that ended it."""
    seen: list[int] = []
    said: list[str] = []
    try:
        with _scripted(script):
            run, trainer = _start(comm, settings)
            run.say = said.append  # type: ignore[method-assign]
            if until == AMID:
                run.tracker.go_back = _killed  # type: ignore[method-assign]
            for batch in trainer.batches():
                run.settle()  # or a checkpoint that is due waits for a slow one, and comes a batch later
                if trainer.rollbacks and trainer.step == until:
                    break
                trainer.advance(batch)
                seen.append(trainer.step)
            if with_end:
                finalize(run, trainer)
            run.settle()
    except SharedUserError as error:
        return str(error)
    return seen, said


def _killed(*_: object) -> None:
    raise UserError("killed")


def _main(comm: Comm, config: Path, script: Script) -> int | str:
    """train.py itself; its exit code, or the line that ended it."""
    sys.argv = ["train.py", "--config", str(config)]
    try:
        with _scripted(script):
            return train.main()
    except SharedUserError as error:
        return str(error)


def _run_all(comm: Comm, runs: Sequence[tuple]) -> list:
    return [_run(comm, *run) for run in runs]


def _train_both(comm: Comm, runs: Sequence[tuple], plain: Sequence[dict]) -> list:
    found = _run_all(comm, runs)
    for settings in plain:
        _train(comm, settings, BATCHES)
    return found


def _left(output: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[dict]]:
    """The newest checkpoint and the metrics, without times."""
    tensors, metadata = _checkpoints(output)[max(_checkpoints(output))]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kept = {key: value for key, value in metadata.items() if key not in ("config", "sha256")}
    return (
        tensors,
        kept,
        [
            {key: value for key, value in line.items() if key != "time" and not key.startswith("speed/")}
            for line in lines
        ],
    )


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("stages", [(1,), pytest.param((2, 0, 3), marks=pytest.mark.long)])
def test_going_back(server: RankServer, shards: str, held_out: str, tmp_path: Path, stages: Sequence[int]) -> None:
    """The rest is that of a plain run with the safer setting from the good checkpoint, bit for bit; so is one
    that was killed after the rollback, or (at the first stage) before a checkpoint had it, or amid it."""
    runs = {
        (name, stage): _collapsing(tmp_path / f"{name}{stage}", shards, held_out, stage, "rollback")
        for name, at in (("whole", stages), ("late", stages), ("early", stages[:1]), ("amid", stages[:1]))
        for stage in at
    }
    until = {"whole": None, "late": 3, "early": 2, "amid": AMID}
    first = [(run, ONCE, until[name]) for (name, _), run in runs.items()]
    found = server.run(2, _run_all, first, timeout=300)[0]
    assert found[-1].endswith("killed")
    assert _checkpoints(tmp_path / f"amid{stages[0]}").keys() == {2}
    for seen, said in found[: len(stages)]:
        assert seen == [1, 2, 3, 2, 3, 4, 5, 6]
        safer = f"training with pgd at {size_in('linf', EPS / 2)} and 0.5 of the learning rate"
        assert sum(f"rolled back to batch 2, {safer}" in line for line in said) == 1
    plain = [_plain(runs["whole", stage], tmp_path / f"plain{stage}") for stage in stages]
    again = [(run, ONCE) for (name, _), run in runs.items() if name != "whole"]
    rest = server.run(2, _train_both, again, plain, timeout=300)[0]
    assert [seen for seen, _ in rest] == [[4, 5, 6]] * len(stages) + [[3, 2, 3, 4, 5, 6]] * 2
    config = tmp_path / "main.yaml"
    config.write_text(json.dumps(_collapsing(tmp_path / "main", shards, held_out, stages[0], "rollback")))
    assert server.run(2, _main, config, ONCE, timeout=300) == [0, 0]
    ours = _checkpoints(tmp_path / "main")[6][0]
    assert _same(ours, _checkpoints(tmp_path / f"plain{stages[0]}")[6][0]), "train.py itself"
    card = model_card(read_adapter(str(tmp_path / "main" / "adapter"))[0])
    assert re.search(
        f"- batches 0 to 2: name n_fgsm, .*; {size_in('linf', EPS)}\n- batches 2 to 6: name pgd, .*; "
        f"{size_in('linf', EPS / 2)}\n"
        "- collapsed at batch 4, rolled back to 2, continued with 0.5 of the learning rate",
        card,
    )
    for stage in stages:
        tensors, metadata, metrics = _left(tmp_path / f"whole{stage}")
        assert [(rollback["at"], rollback["to"]) for rollback in metadata["rollbacks"]] == [(4, 2)]
        assert _same(tensors, _checkpoints(tmp_path / f"plain{stage}")[6][0]), stage
        for name in ("late", "early", "amid") if stage == stages[0] else ("late",):
            left = _left(tmp_path / f"{name}{stage}")
            assert _same(tensors, left[0]), (stage, name)
            assert (metadata, metrics) == left[1:], (stage, name)
        assert [line["step"] for line in metrics if "train/loss" in line] == [1, 2, 3, 4, 5, 6], "each once"
        before = (tmp_path / f"whole{stage}" / "metrics_before_rollback_1.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in before] == [3, 4, 4], "two batches and the check"


def _plain(settings: dict, output: Path) -> dict:
    """The config of a run that is safe from the start, with the good checkpoint of `settings`'s run as its newest."""
    safe = settings | {"phases": [{"fraction": 1, "method": "pgd", "eps": settings["guard"]["rollback_eps"]}]}
    safe |= {"optim": settings["optim"] | {"lr": settings["optim"]["lr"] / 2}}
    safe |= {"run": settings["run"] | {"output_dir": str(output)}, "guard": settings["guard"] | {"on_collapse": "warn"}}
    tensors, metadata = _checkpoints(Path(settings["run"]["output_dir"]))[2]
    metadata = {key: value for key, value in metadata.items() if key not in ("step", "format_version")}
    metadata["config"] = Config.model_validate(safe).model_dump(mode="json")
    write_checkpoint(str(output / "checkpoints"), 2, tensors, metadata, keep=9, spared=())
    return safe


def _method(collapsing: dict, name: str, **epochs: float) -> dict:
    return collapsing | {"method": {"name": name, "replays": 2}, "optim": collapsing["optim"] | epochs}


def test_other_answers(server: RankServer, shards: str, held_out: str, tmp_path: Path) -> None:
    def make(name: str, answer: str, **guard: Any) -> dict:
        config = _collapsing(tmp_path / name, shards, held_out, 1, answer)
        return config | {"guard": config["guard"] | guard}

    free = _method(make("free", "rollback"), "free", epochs=4)
    runs = [
        (make("warn", "warn"), FOR_GOOD, None, True),
        (make("stop", "stop"), FOR_GOOD),
        (make("twice", "rollback"), TWICE),
        (make("most", "rollback", max_rollbacks=1), TWICE),
        (free, ONCE, 5),
    ]
    warned, stopped, twice, most, _ = server.run(2, _run_all, runs, timeout=300)[0]

    assert warned[0] == [1, 2, 3, 4, 5, 6]
    assert (
        sum("collapse at batch 4: pgd3 on 24 held-out images: 20.0 % at batch 4, best 80.0 %" in x for x in warned[1])
        == 1
    )
    assert sum("collapse" in line for line in warned[1]) == 1, "once"
    best_and_last = "10.0 % at batch 6, best 80.0 % at batch 2; adapter_best/ is the more robust one"
    assert any(f"{best_and_last} (catastrophic overfitting)" in line for line in warned[1])
    (last,) = [line for line in _left(tmp_path / "warn")[2] if "guard/best_step" in line]
    assert (last["step"], last["guard/best_step"], last["guard/last_robust_accuracy"]) == (6, 2, 0.1)

    assert stopped.startswith("guard.on_collapse: stop: collapse at batch 4: ")
    assert "the newest good checkpoint is of batch 2;" in stopped
    assert {2, 3} <= _checkpoints(tmp_path / "stop").keys(), "nothing is lost"
    config = tmp_path / "stop.yaml"
    config.write_text(json.dumps(make("main", "stop")))
    assert server.run(2, _main, config, FOR_GOOD, timeout=300)[0].startswith("guard.on_collapse: stop: ")
    best = json.loads((tmp_path / "main" / "adapter_best" / "adapter.json").read_text())["training"]
    assert (best["batches"], best["held_out"]["robust_accuracy"]) == (2, 0.8)

    assert twice[0] == [1, 2, 3, 2, 3, 2, 3, 4, 5, 6]
    assert [r["rollback_lr_factor"] for r in _left(tmp_path / "twice")[1]["rollbacks"]] == [0.5, 0.5]
    assert most.startswith("guard.max_rollbacks: 1: collapse at batch 4: ")

    # Free makes two updates of a batch, PGD one: as many updates, and what Free kept for the slots is not needed
    (seen, _), (went_on, _) = server.run(2, _run_all, [(free, ONCE), (make("stop", "rollback"), ONCE)], timeout=300)[0]
    assert seen == [6, 7, 8, 9, 10]
    assert _left(tmp_path / "free")[1]["updates"] == 12
    assert went_on == [2, 3, 4, 5, 6], "what stopped goes back when it is told to"


def test_figures_that_could_be_noise_are_no_collapse(shards: str, held_out: str, tmp_path: Path) -> None:
    """Of 24 images of three classes, guessing has 8 right, give or take 2.3: a best of 17 is not yet clearly more."""
    assert least_that_counts(24, 3) == pytest.approx(0.718, abs=1e-3)
    assert least_that_counts(256, 1000) == 10 / 256
    config = Config.model_validate(
        _collapsing(tmp_path, shards, held_out, 0, "rollback", ("run", "checkpoint_every", 4))
    )
    guard = Guard(config, held_out, build_model(config), Comm(0, 1, torch.device("cpu"), None))
    checks = [guard.judge(score, step) for step, score in [(2, 17 / 24), (4, 0.0)]]
    assert [(check.keep, check.collapsed) for check in checks] == [(True, False), (False, False)]
    scores = [(6, 0.8), (8, 0.41), (10, 0.75), (11, 0.75), (12, 0.73), (13, 0.71), (14, 0.39)]
    checks = [guard.judge(score, step) for step, score in scores]
    # kept: the best, and the first good ones (nine tenths of it) after four more batches
    assert [check.keep for check in checks] == [True, False, True, False, True, False, False]
    assert [check.collapsed for check in checks] == [False] * 6 + [True], "just below half"
    assert guard.good_steps == [12, 6]


@pytest.mark.parametrize(
    ("guard", "held", "message"),
    [
        ({"on_collapse": "stop"}, False, "guard.on_collapse: stop needs data.held_out"),
        ({"on_collapse": "rollback"}, False, "guard.on_collapse: rollback needs data.held_out"),
        (
            {"on_collapse": "rollback", "rollback_method": "free"},
            True,
            "guard.rollback_method: must not keep a perturbation for each image, got free",
        ),
        (
            {"on_collapse": "rollback", "rollback_lr_factor": 1, "rollback_eps": None},
            True,
            "guard.rollback_lr_factor: must be below 1 if the method stays .* got 1;",
        ),
        (
            {"on_collapse": "rollback", "rollback_lr_factor": 1, "rollback_eps": None, "rollback_method": "pgd"},
            True,
            "guard.rollback_lr_factor: must be below 1 if the method stays .* got 1;",
        ),
        ({"on_collapse": "rollback", "rollback_eps": "40/255"}, True, "guard.rollback_eps: must be smaller"),
        ({"on_collapse": "rollback", "rollback_eps": 0}, True, r"guard\.rollback_eps"),
        ({"on_collapse": "rollback", "rollback_eps": 4}, True, "guard.rollback_eps: 4 is outside"),
    ],
)
def test_answers_that_cannot_be_are_refused(
    shards: str, held_out: str, tmp_path: Path, guard: dict, held: bool, message: str
) -> None:
    settings = _collapsing(tmp_path, shards, held_out, 0, "warn") | {"method": {"name": "pgd"}}
    settings["guard"] = settings["guard"] | guard
    settings["data"] = settings["data"] | ({} if held else {"held_out": None})
    with pytest.raises(ValueError, match=message):  # pydantic's own, or a UserError
        build_phases(Config.model_validate(settings), steps_per_epoch=3)


def test_another_safer_setting_is_refused_once_it_is_in_use() -> None:
    rollback = {"at": 4, "to": 2, "rollback_method": None, "rollback_lr_factor": 0.5, "rollback_eps": None}
    check_settings(rollback, GuardSettings())
    with pytest.raises(UserError, match=r"guard\.rollback_lr_factor: .* rolled back to batch 2 with 0\.5, got 0\.25"):
        check_settings(rollback, GuardSettings(rollback_lr_factor=0.25))
    with pytest.raises(UserError, match=r"guard\.rollback_eps: .* with 0\.1, got None"):
        check_settings(rollback | {"rollback_eps": 0.1}, GuardSettings())


def test_a_warm_up_continues_by_updates(shards: str, held_out: str, tmp_path: Path) -> None:
    """Free makes four updates of a batch: what it would have grown in one, PGD grows in four."""
    settings = _method(_collapsing(tmp_path, shards, held_out, 0, "rollback"), "free", epochs=8)
    settings["method"]["replays"] = 4
    settings["threat"] = {"eps": EPS, "eps_warmup_ratio": 1 / 2, "step_size_warmup_ratio": 5 / 6}
    settings["guard"] |= {"rollback_eps": None}
    phases = build_phases(Config.model_validate(settings), steps_per_epoch=3)
    assert phases.total_steps == 6
    safer = phases.rollback_from(2)
    assert safer.total_steps == 2 + 4 * 4
    for again in (safer, safer.rollback_from(2), safer.rollback_from(4)):  # once more changes nothing
        grown = [again.at(step).method.threat_at(step).eps / EPS for step in (0, 1, 2, 3, 4, 6, 9)]
        assert grown == pytest.approx([1 / 4, 2 / 4, 3 / 4, 3.25 / 4, 3.5 / 4, 1, 1])
        sizes = [again.at(step).method.step_size(1.0, step) for step in (0, 1, 2, 3, 6, 14)]
        of_eps = [1 / 4, 2 / 4, 3 / 4, 3.25 / 4, 1, 1]
        own = [1 / 6, 2 / 6, 3 / 6, 3.25 / 6, 4 / 6, 1]
        assert sizes == pytest.approx([e * s for e, s in zip(of_eps, own, strict=True)])
        made = [(part["first"], part["end"], part["method"]["name"]) for part in again.made(18)]
        assert made == [(0, 2, "free"), (2, 18, "pgd")], "however often it rolled back"
    kept = [
        Weakened(PGDSettings(attention_drop=0.5), None, safer.at(step).method.warmup, 0, step, torch.arange(2))
        for step in (4, 6)
    ]
    assert [weakened._attention_kept for weakened in kept] == pytest.approx([3.5 / 4, 1])


@pytest.mark.parametrize(("method", "steps"), [("n_fgsm", 3), ("pgd", 7)])
def test_a_safer_size_is_never_a_larger_one(
    shards: str, held_out: str, tmp_path: Path, method: str, steps: int
) -> None:
    """Of phases at eps, two thirds and a third of it; with its own steps where the method has several."""
    settings = _collapsing(tmp_path, shards, held_out, 0, "rollback")
    settings |= {"method": {"name": method} | ({"steps": steps, "step_size": EPS / 3} if method == "pgd" else {})}
    settings["threat"] = {
        "eps": EPS,
        "eps_warmup_ratio": 1 / 2,
    }  # 3 of 6 batches: a quarter, a half, three quarters of it
    settings["phases"] = [{"fraction": 1 / 3, "eps": EPS * share} for share in (1, 2 / 3, 1 / 3)]
    safer = [phase.after_rollback for phase in build_phases(Config.model_validate(settings), steps_per_epoch=3).phases]
    assert [method.threat.eps / EPS for method in safer] == pytest.approx([1 / 2, 1 / 2, 1 / 3])
    half = safer[0]
    assert [half.threat_at(step).eps / EPS for step in range(4)] == pytest.approx([1 / 4, 1 / 2, 1 / 2, 1 / 2])
    assert [(safe.settings.name, safe.settings.steps) for safe in safer] == [("pgd", steps)] * 3
    if method == "pgd":
        assert [safe.settings.step_size / EPS for safe in safer] == pytest.approx([1 / 6, 1 / 4, 1 / 3])
