"""Examples made for another model, against fd.pgd on that model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from eval_cases import EPS, stream
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.attacks.victim import Victim
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.resume_log import fingerprint
from fulllora_dist.models.training_record import TrainingRecord
from fulllora_dist.training import finalize
from fulllora_dist.training.inputs import check_evaluation
from tests.tiny import SIDE, tiny

N, LARGE = 60, 3 * EPS


def evaluate(model: nn.Module, images: Path, **settings: Any) -> Any:
    return fd.evaluate(model, stream(images, N, 20), attacks=("clean", "pgd20", "transfer:b"), eps=LARGE, **settings)


@pytest.fixture(scope="module")
def by_hand(healthy: dict[str, fd.AdaptedModel], images: Path) -> list[int]:
    """What the adversarially trained model makes of examples for the standard one."""
    whole = stream(images, N)
    batch = whole.read(whole.ids)
    x, y = batch.pixels(), batch.labels
    settings: dict[str, Any] = {"eps": LARGE, "steps": 20, "step_size": 2.5 * LARGE / 20, "seed": 5, "ids": batch.ids}
    moved = fd.pgd(healthy["standard"], x, y, purpose="eval/transfer", **settings)
    model = healthy["full_at"]
    with torch.no_grad():
        return ((model(x).argmax(1) == y) & (model(moved).argmax(1) == y)).int().tolist()


def test_examples_of_another_model(
    healthy: dict[str, fd.AdaptedModel], images: Path, by_hand: list[int], tmp_path: Path
) -> None:
    found = evaluate(healthy["full_at"], images, transfer_from={"b": healthy["standard"]}, seed=5)["attacks"]
    assert found["transfer:b"]["correct"] == by_hand
    assert 0 < sum(by_hand) < N
    assert found["pgd20"]["accuracy"] < found["transfer:b"]["accuracy"], "it knows this model"
    fd.save_adapter(healthy["standard"], str(tmp_path))
    name = f"transfer:{tmp_path}"
    saved = fd.evaluate(healthy["full_at"], stream(images, N, 20), attacks=(name,), eps=LARGE, seed=5)["attacks"]
    assert saved[name]["correct"] == by_hand


def test_classes_of_the_other_model_are_found_by_name(
    healthy: dict[str, fd.AdaptedModel], images: Path, by_hand: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its outputs may have another order, and a wrapper may hide it."""
    order, names = [2, 0, 3, 1], [f"class{k}" for k in range(4)]

    class Other(fd.AdaptedModel):
        def forward(self, pixels: Tensor) -> Tensor:
            return super().forward(pixels)[:, order]

    model, other = healthy["full_at"], healthy["standard"]
    monkeypatch.setattr(model, "record", TrainingRecord({"data": {"classes": names}}))
    monkeypatch.setattr(other, "record", TrainingRecord({"data": {"classes": [names[k] for k in order]}}))
    monkeypatch.setattr(other, "__class__", Other)
    found = evaluate(model, images, transfer_from={"b": other}, seed=5)["attacks"]
    assert found["transfer:b"]["correct"] == by_hand
    monkeypatch.setattr(other, "record", TrainingRecord({"data": {"classes": ["ant", *names[1:]]}}))
    with pytest.raises(UserError, match="transfer:b: the evaluated model has other classes than it: 'class0' instead"):
        evaluate(model, images, transfer_from={"b": other})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 3}, "transfer:b: it has 3 outputs, the evaluated model 4"),
        ({"image_size": 2 * SIDE}, "transfer:b: .*32"),
    ],
)
def test_another_kind_of_model_is_refused(settings: dict[str, Any], message: str, images: Path) -> None:
    with pytest.raises(UserError, match=f"evaluation.attacks: {message}"):
        evaluate(tiny(), images, transfer_from={"b": tiny(**settings)})


def test_one_that_is_not_there_is_refused_at_the_start(images: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"model": {"backbone": "none"}, "data": {"train": "none"}, "run": {"output_dir": "none"}}
    sections |= {"optim": {"epochs": 1}, "threat": {"eps": EPS}, "method": {"name": "pgd"}}
    for address, ok in ((f"{tmp_path}/none", False), ("models:/vit@champion", True), ("s3://bucket/adapter", True)):
        config = Config.model_validate({**sections, "evaluation": {"attacks": [f"transfer:{address}"]}})
        if ok:
            check_evaluation(config)
            continue
        with pytest.raises(UserError, match=r"evaluation.attacks: transfer:.* has no adapter.json; give the folder"):
            check_evaluation(config)
    config = Config.model_validate({**sections, "evaluation": {"attacks": ["transfer:vit@champion"]}})
    with pytest.raises(UserError, match=r"no adapter.json; for MLflow's registry write models:/vit@champion$"):
        check_evaluation(config)
    with pytest.raises(UserError, match=r"none.*adapter\.json"):
        fd.evaluate(tiny(), stream(images, 4), attacks=(f"transfer:{tmp_path}/none",), eps=EPS)


def test_one_that_is_gone_at_the_end_is_said_once(images: Path, tmp_path: Path) -> None:
    """By all ranks together: the others would wait for the one that failed."""
    fd.save_adapter(tiny(), str(tmp_path / "adapter"))
    sections: dict[str, Any] = {"model": {"backbone": "none"}, "data": {"train": "none"}, "run": {"output_dir": "none"}}
    sections |= {"optim": {"epochs": 1}, "threat": {"eps": EPS}, "method": {"name": "pgd"}}
    config = Config.model_validate({**sections, "evaluation": {"attacks": [f"transfer:{tmp_path}/gone"]}})
    run: Any = SimpleNamespace(config=config, comm=Comm(0, 1, torch.device("cpu"), control=None))
    with pytest.raises(SharedUserError, match=r"gone has no adapter\.json"):
        finalize._evaluate(run, str(tmp_path / "adapter"), str(images), 0)


def test_names() -> None:
    signed = EvalAttack.parse("transfer:https://host/a/adapter?sig=secret")
    assert "secret" not in signed.name
    assert "secret" in signed.source
    assert signed.forward_and_backward("linf") == (22, 20)
    with pytest.raises(UserError, match="unknown attack 'transfer:'"):
        EvalAttack.parse("transfer:")


def test_another_source_resumes_nothing(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    model, whole = healthy["full_at"], stream(images, 4)
    prints = {
        fingerprint(model, whole, 0, sources)
        for sources in ({}, {"b": healthy["standard"]}, {"b": healthy["fulllora"]})
    }
    assert len(prints) == 3
    alphas = [tiny(alpha=alpha) for alpha in (2.0, 4.0)]  # in no tensor
    assert all(map(torch.equal, alphas[0].state_dict().values(), alphas[1].state_dict().values()))
    assert len({fingerprint(model, whole, 0, {"b": Victim(source)}) for source in alphas}) == 2


def test_a_model_of_one_s_own_stays_as_it_is(images: Path) -> None:
    """Its training mode above all: it may be under training."""
    other = tiny().train()
    before = [part.training for part in other.modules()]
    evaluate(tiny(seed=1), images, transfer_from={"b": other})
    assert [part.training for part in other.modules()] == before


def test_a_mistyped_name_lists_those_that_are_given(images: Path) -> None:
    with pytest.raises(UserError, match=r"^adapter: B has no adapter.json; .*; or one of transfer_from: b, c$"):
        fd.evaluate(tiny(), stream(images, 4), attacks=["transfer:B"], transfer_from={"b": tiny(), "c": tiny()})
