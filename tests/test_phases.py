"""A run in phases: how long each is, and that its method, radius and image size are what it says."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fulllora_dist.commands.plan import estimate
from fulllora_dist.commands.plan_counts import IMAGENET
from fulllora_dist.config.load import load_config
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapt import create_model
from fulllora_dist.training.build import build_model
from fulllora_dist.training.inputs import check_inputs
from fulllora_dist.training.phases import Phases, build_phases
from tests.methods.test_methods import PlainEngine, start
from tests.tiny import ARCHITECTURE, SIDE, batches, images, stir, tiny


def config(phases: list[dict[str, Any]], **sections: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"backbone": "vit_tiny_patch16_224", "pretrained": False, "num_classes": 4, "image_size": SIDE},
        "threat": {"eps": 0.04},
        "method": {"name": "pgd", "steps": 2},
        "adapter": {"rank": 2},
        "data": {"train": "none"},
        "run": {"output_dir": "none"},
        "phases": phases,
    }
    values["model"]["model_kwargs"] = ARCHITECTURE
    return Config.model_validate(values | sections)


@pytest.mark.parametrize(
    ("phases", "updates", "ends"),
    [
        ([], 100, [100]),
        ([{"fraction": 0.8}, {"fraction": 0.2}], 100, [80, 100]),
        ([{"fraction": 0.1}] * 10, 100, [10 * i for i in range(1, 11)]),  # 0.1 added up is not exact
        (
            [{"fraction": 0.5, "method": {"name": "free", "replays": 4}}, {"fraction": 0.5}],
            100,
            [13, 61],
        ),  # 52 and 48 updates
        ([{"fraction": 0.5}, {"fraction": 0.5, "method": {"name": "free", "replays": 4}}], 100, [50, 63]),
        ([{"fraction": 0.001}, {"fraction": 0.999}], 10, [1, 10]),
    ],
)
def test_phases_take_their_share_of_the_updates(phases: list[dict], updates: int, ends: list[int]) -> None:
    built = build_phases(config(phases, optim={"epochs": 1}), steps_per_epoch=updates)
    assert [phase.end for phase in built.phases] == ends
    assert [phase.first for phase in built.phases] == [0, *ends[:-1]]
    assert built.total_steps == ends[-1]
    assert updates <= built.total_updates < updates + 4
    assert [built.at(step) for step in range(ends[-1])] == [
        next(p for p in built.phases if p.first <= step < p.end) for step in range(ends[-1])
    ]
    assert built.at(ends[-1]) is built.phases[-1]


@pytest.mark.parametrize(
    ("phases", "updates", "number"),
    [
        ([{"fraction": 0.01}, {"fraction": 0.01}, {"fraction": 0.98}], 10, 1),  # the second is over before it begins
        ([{"fraction": 0.9, "method": {"name": "free", "replays": 8}}, {"fraction": 0.1}], 40, 1),  # Free rounds up
    ],
)
def test_a_phase_without_a_batch_is_refused(phases: list[dict], updates: int, number: int) -> None:
    with pytest.raises(UserError, match=rf"phases\.{number}\.fraction: .* leaves no batch"):
        build_phases(config(phases, optim={"epochs": 1}), steps_per_epoch=updates)


MASK, DROP = {"name": "pgd", "perturbation_mask": 0.5}, {"name": "pgd", "attention_drop": 0.5}


@pytest.mark.parametrize(
    ("phases", "backbone", "size", "message"),
    [
        ([{"fraction": 0.8}, {"fraction": 0.2, "method": DROP}], "vit", SIDE, "attention_drop: 0.5 of the run is over"),
        (
            [{"fraction": 0.8}, {"fraction": 0.2, "method": MASK}],
            "vit",
            SIDE,
            "perturbation_mask: 0.5 of the run is over",
        ),
        ([{"fraction": 1, "method": {**MASK, "mask_patch": 5}}], "vit", SIDE, "mask_patch: 5 does not divide .* 16"),
        (
            [{"fraction": 0.1, "image_size": 10, "method": MASK}, {"fraction": 0.9}],
            "vit",
            SIDE,
            "4 does not divide .* 10",
        ),
        (
            [{"fraction": 1, "method": DROP}],
            "linear",
            SIDE,
            "attention_drop: this backbone has no modules named attn",
        ),
        (
            [{"fraction": 1, "method": MASK}],
            "linear",
            SIDE,
            "mask_patch: must be set, as the patch size of this backbone is unknown",
        ),
    ],
)
def test_weakening_that_cannot_act_is_refused_before_the_run(
    phases: list[dict], backbone: str, size: int, message: str
) -> None:
    built = build_phases(config(phases, optim={"epochs": 1}), steps_per_epoch=10)
    model = tiny().backbone if backbone == "vit" else nn.Linear(1, 1)
    with pytest.raises(UserError, match=message):
        built.prepare(model, size)


def test_patches_without_perturbation_are_the_backbones_unless_told() -> None:
    """The tiny ViT has patches of 4 pixels: masked ones of 16 x 16 images are whole squares of 4."""
    given = build_phases(config([{"fraction": 1, "method": {**MASK, "mask_patch": 4}}]), 10)
    found = build_phases(config([{"fraction": 1, "method": MASK}]), 10)
    (batch,) = batches(1, size=4, dtype=torch.float32)
    for phases in (given, found):
        phases.prepare(tiny().backbone, SIDE)
    one, other = (
        phases.at(0).method.perturb(
            stir(tiny()), batch.pixels(), batch.labels, phases.at(0).method.threat, 0, batch.ids
        )
        for phases in (given, found)
    )
    assert torch.equal(one, other)


def test_a_phase_has_settings_of_its_own_and_ramps_are_the_runs() -> None:
    phases = [
        {"fraction": 0.75, "image_size": 8, "eps": "2/255", "method": "n_fgsm"},
        {"fraction": 0.25, "method": {"name": "pgd", "steps": 3}},
    ]
    built = build_phases(
        config(phases, threat={"eps": 0.04, "eps_warmup_ratio": 0.5, "norm": "l2"}, optim={"epochs": 2}),
        steps_per_epoch=20,
    )
    first, second = built.phases
    assert (first.image_size, second.image_size) == (8, None)
    assert [phase.method.settings.name for phase in built.phases] == ["n_fgsm", "pgd"]
    assert [phase.method.threat.norm for phase in built.phases] == ["l2", "l2"]
    assert first.method.threat.eps == pytest.approx(2 / 255)
    assert second.method.threat.eps == 0.04
    assert second.method.settings.steps == 3
    assert first.method.threat_at(9).eps == pytest.approx(2 / 255 * 10 / 21)
    assert second.method.threat_at(30).eps == 0.04


def test_state_of_slots_is_that_of_the_phase_that_continues() -> None:
    """Free's perturbation is kept within its phase, also over a restart, and not beyond: the next one starts anew."""
    free = {"name": "free", "replays": 1, "step_size": 0.01}
    wanted = [{"fraction": 0.5, "method": free}, {"fraction": 0.5, "method": free, "eps": 0.02}]
    data = list(batches(4, size=4, dtype=torch.float32))

    def run(phases: Phases, model: nn.Module, steps: range) -> nn.Module:
        engine = PlainEngine(model)
        for step in steps:
            phases.step(engine, data[step], step)
        return model

    whole = build_phases(config(wanted, optim={"epochs": 1}), steps_per_epoch=4)
    model = run(whole, start().float(), range(1))
    (delta,) = whole.slot_state(1).values()
    assert delta.abs().max() > 0.009
    resumed = build_phases(config(wanted, optim={"epochs": 1}), steps_per_epoch=4)
    resumed.load_slot_state({name: t.clone() for name, t in whole.slot_state(1).items()}, 1)
    twin = copy.deepcopy(model)
    for phases, trained in ((whole, model), (resumed, twin)):
        run(phases, trained, range(1, 2))
        assert phases.slot_state(2) == {}
        run(phases, trained, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    (last,) = whole.slot_state(4).values()
    assert 0.009 < last.abs().max() <= 0.02


def test_input_sizes_change_nothing_at_the_models_own() -> None:
    """Bit for bit at 16 pixels; at 8 the model is timm's of that size, with the position embedding resampled."""
    plain, both = stir(tiny(head="trained")), stir(tiny(head="trained", input_sizes=[8]))
    x, small = images(3), images(3, side=8)
    with torch.no_grad():
        assert torch.equal(plain(x), both(x))
        got = both(small)
    with pytest.raises(AssertionError):
        plain(small)
    # an independent model of 8 pixels, its weights resampled by timm's own filter
    weights = {n: p for n, p in plain.backbone.state_dict().items() if ".lnlora." not in n}
    native = timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=4, **ARCHITECTURE)
    resampled = timm.models.vision_transformer.checkpoint_filter_fn(weights, native)
    other = tiny(head="trained", image_size=8)
    other.backbone.load_state_dict(resampled)
    other.load_trainable({n: p.detach() for n, p in plain.trainable().items()})
    with torch.no_grad():
        torch.testing.assert_close(got, other(small), rtol=0, atol=1e-5)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"phases.image_size: must be a multiple of the patch size 4 of .*, got 10"):
        build_model(config([{"fraction": 0.5, "image_size": 10}, {"fraction": 0.5}]))
    with pytest.raises(UserError, match=r"phases.image_size: cait_xxs24_224 supports a single image size only"):
        create_model("cait_xxs24_224", pretrained=False, input_sizes=[112])


def test_mixing_needs_an_even_micro_batch() -> None:
    odd = config([], targets={"mixup": 0.2}, optim={"batch_size": 12}, distributed={"gradient_accumulation_steps": 2})
    with pytest.raises(
        UserError, match=r"targets: mixing needs an even number of images per rank and micro-batch, got 3"
    ):
        check_inputs(odd, world=2)


def test_the_plan_counts_each_phase() -> None:
    """The whole run's FLOPs are those of the phases' own lines."""
    model = {"backbone": "vit_tiny_patch16_224", "pretrained": False}
    phases = [{"fraction": 0.5, "image_size": 112, "method": "n_fgsm"}, {"fraction": 0.5}]
    plan = estimate(config(phases, model=model, optim={"batch_size": 64, "epochs": 4}), ranks=1)
    pattern = (
        r"(\w+) at (\d+) pixels, linf eps = 10.2/255: (\d) forward, (\d) backward passes a batch; ([\d,]+) batches, "
        r"([\d,]+) updates; attack pass ([\d.]+) GFLOP, weight step ([\d.]+) GFLOP"
    )
    found = re.findall(pattern, plan)
    updates = str(4 * (IMAGENET // 64) // 2)
    assert [(name, size, f, b) for name, size, f, b, *_ in found] == [
        ("n_fgsm", "112", "2", "2"),
        ("pgd", "224", "3", "3"),
    ]
    assert [one[5].replace(",", "") for one in found] == [updates, updates]
    gflops = sum(float(n.replace(",", "")) * 64 * ((int(b) - 1) * float(a) + float(w)) for *_, b, n, _, a, w in found)
    assert float(re.findall(r"whole run ([\d.]+) EFLOP", plan)[0]) == pytest.approx(gflops / 1e9, rel=0.05)
    assert float(found[0][6]) < 0.3 * float(found[1][6])


class _Counter(TorchDispatchMode):
    """FLOPs of whatever runs inside; torch's own counter cannot look into autograd.grad by a leaf."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        elif func.overloadpacket is torch.ops.aten.addmm_:  # that of the branches, which torch does not count
            self.flops += 2 * args[1].numel() * args[2].shape[1]
        return result


@pytest.mark.parametrize("method", ["pgd", "trades", "mart", "n_fgsm", "free"])
def test_the_plan_counts_what_a_batch_really_costs(method: str) -> None:
    """FLOPs are counted in a step of the method itself; TRADES and MART keep the activations of twice the images."""
    timm.layers.set_fused_attn(False)  # the counter does not know the fused kernel of the CPU
    try:
        settings = config([], method=method, optim={"batch_size": 4, "epochs": 1e9})
        plan = estimate(settings, ranks=1)
        model = build_model(settings).train()
        (batch,) = batches(1, size=4, dtype=torch.float32)
        with _Counter() as counter:
            build_phases(settings, 10).step(PlainEngine(model), batch, 0)
    finally:
        timm.layers.set_fused_attn(True)
    (batches_of_run,) = re.findall(r"([\d,]+) batches, [\d,]+ optimizer updates", plan)
    total = float(re.findall(r"whole run ([\d.]+) EFLOP", plan)[0]) * 1e18
    assert total / int(batches_of_run.replace(",", "")) == pytest.approx(counter.flops, rel=1e-3)


def test_the_plan_holds_twice_the_activations_where_clean_and_perturbed_images_share_a_pass() -> None:
    def activations(method: str) -> float:
        plan = estimate(config([], method=method, optim={"batch_size": 1 << 16}), ranks=1)
        return float(re.findall(r"activations ([\d.]+)", plan)[0])

    assert activations("trades") == activations("mart") == pytest.approx(2 * activations("pgd"), rel=0.01)


def test_settings_that_training_refuses_are_refused_by_the_plan_too() -> None:
    with pytest.raises(UserError, match="targets: mixing needs an even number of images per rank and micro-batch"):
        estimate(config([], targets={"mixup": 0.2}, optim={"batch_size": 3}), ranks=1)
    with pytest.raises(UserError, match=r"evaluation\.attacks"):
        estimate(config([], evaluation={"attacks": ["pdg20"]}), ranks=1)


def test_the_example_config_is_advxls_idea() -> None:
    ready = load_config(str(Path(__file__).parents[1] / "configs" / "imagenet_vit_large_phases.yaml"))
    assert [(p.fraction, p.image_size) for p in ready.phases] == [(0.8, 112), (0.2, None)]
