"""What is lost without some branches, against attacks by hand on a copy whose B are zero."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_cases import EPS, stream
from matplotlib.image import imread

import fulllora_dist as fd
from fulllora_dist.attacks.threat import Linf
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.stats import paired_score
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.evaluator import Evaluator
from fulllora_dist.evaluation.function import evaluate
from fulllora_dist.evaluation.where import By, parse_by, where_robustness_sits
from fulllora_dist.evaluation.where_report import where_figure, where_table
from tests.tiny import stir, tiny

ATTACK, N, SEED = "pgd3", 60, 5
ONE = Comm(0, 1, torch.device("cpu"), control=None)
OFF = {
    ("all", ""): ".lnlora",
    ("component", "patch_embed"): "patch_embed.",
    ("component", "q"): ".lnlora.q",
    ("component", "k"): ".lnlora.k",
    ("component", "v"): ".lnlora.v",
    ("component", "proj"): "attn.proj.lnlora",
    ("component", "fc1"): "fc1.lnlora",
    ("component", "fc2"): "fc2.lnlora",
    ("block", "patch_embed"): "patch_embed.",
    ("block", "blocks.0"): "blocks.0.",
    ("block", "blocks.1"): "blocks.1.",
}
""": what the names of its branches have in common."""


def measure(model: fd.AdaptedModel, images: Path, by: Sequence[By]) -> dict[str, Any]:
    evaluator = Evaluator(["clean", ATTACK], Linf(EPS), ONE, seed=SEED, progress=False)
    return where_robustness_sits(model, evaluator, stream(images, N, 25), by)


@pytest.fixture(scope="module")
def found(healthy: dict[str, fd.AdaptedModel], images: Path) -> dict[str, Any]:
    return measure(healthy["fulllora"], images, ("component", "block"))


def by_hand(model: fd.AdaptedModel, images: Path, common: str) -> dict[str, list[int]]:
    """0 or 1 by id, clean and attacked, of a copy without the branches whose names hold `common`."""
    model = copy.deepcopy(model).requires_grad_(False)
    zeroed = [p.zero_() for name, p in model.named_parameters() if common and common in name and name.endswith(".B")]
    assert bool(zeroed) == bool(common)
    right: dict[int, tuple[int, int]] = {}
    whole = stream(images, N, 25)
    for batch in map(whole.read, whole.batches):
        x, y = batch.pixels(), batch.labels
        moved = EvalAttack.parse(ATTACK)(model, x, y, threat=Linf(EPS), seed=SEED, ids=batch.ids)
        clean, attack_mode = (model(some).argmax(dim=1) == y for some in (x, moved))
        right |= {int(i): (int(c), int(c & a)) for i, c, a in zip(batch.ids, clean, attack_mode, strict=True)}
    return {name: [right[i][k] for i in sorted(right)] for k, name in enumerate(("clean", ATTACK))}


def test_losses_are_those_of_a_plain_loop(
    found: dict[str, Any], healthy: dict[str, fd.AdaptedModel], images: Path
) -> None:
    """Attacked anew: with examples made against the intact model every figure would be another."""
    model = healthy["fulllora"]
    intact = by_hand(model, images, "")
    assert {name: score["correct"] for name, score in found["intact"].items()} == intact
    assert [(group["by"], group["name"]) for group in found["off"]] == list(OFF)
    lost_images = set()
    for group, common in zip(found["off"], OFF.values(), strict=True):
        assert group["branches"] == [b["name"] for b in found["branches"] if common in b["name"] + "."]
        expected = by_hand(model, images, common)
        for name, score in group["attacks"].items():
            assert score["correct"] == expected[name]
            lost = np.array(intact[name]) - np.array(expected[name])
            assert score["lost"] == pytest.approx(lost.mean(), abs=1e-12)
            drawn = np.random.default_rng(1).integers(0, N, (20_000, N))
            low, high = np.percentile(lost[drawn].mean(axis=1), [2.5, 97.5])
            wide = paired_score(int((lost < 0).sum()), int((lost > 0).sum()), N)  # where few images differ
            low, high = min(low, wide[0]), max(high, wide[1])
            assert (score["lost_low"], score["lost_high"]) == pytest.approx((low, high), abs=1.01 / N)
        lost_images.add(tuple(expected[ATTACK]))
    assert len(lost_images) > len(OFF) / 2, "or equality shows little"
    everything = found["off"][0]["attacks"][ATTACK]
    assert everything["lost"] > 0.1
    assert everything["lost_low"] > 0


def test_the_model_is_afterwards_as_it_was(
    found: dict[str, Any], healthy: dict[str, fd.AdaptedModel], images: Path
) -> None:
    again = evaluate(healthy["fulllora"], stream(images, N, 25), attacks=("clean", ATTACK), eps=EPS, seed=SEED)
    assert again["attacks"] == found["intact"]
    assert again["ids"] == found["ids"]
    assert all(parameter.requires_grad for parameter in healthy["fulllora"].trainable().values())


def test_sizes_together_are_those_of_the_stacked_matrices(
    found: dict[str, Any], healthy: dict[str, fd.AdaptedModel]
) -> None:
    state = {name: value.double() for name, value in healthy["fulllora"].backbone.state_dict().items()}
    for group in found["off"]:
        ours = [(state[f"{name}.B"] @ state[f"{name}.A"]).flatten() for name in group["branches"]]
        theirs = []
        for name in group["branches"]:
            path, _, part = name.partition(".lnlora")
            weight = state[f"{path}.weight"]
            theirs.append((weight.chunk(3)["qkv".index(part[1:])] if part else weight).flatten())
        expected = torch.cat(ours).norm() / torch.cat(theirs).norm()
        assert group["relative"] == pytest.approx(expected.item(), rel=1e-12)


def test_branch_by_branch_the_table_and_the_figure(
    healthy: dict[str, fd.AdaptedModel], images: Path, tmp_path: Path
) -> None:
    evaluator = Evaluator(["clean", "fgsm"], Linf(EPS), ONE, progress=False)
    found = where_robustness_sits(healthy["fulllora"], evaluator, stream(images, 8), ("branch", "component"))
    assert json.loads(json.dumps(found)) == found
    alone = [group for group in found["off"] if group["by"] == "branch"]
    assert [group["branches"] for group in alone] == [[branch["name"]] for branch in found["branches"]]
    assert found["always_on"] == []
    lines = where_table(found).splitlines()
    for branch in found["branches"]:
        (row,) = (line.split() for line in lines if line.startswith(f"branch {branch['name'].replace('.lnlora', '')} "))
        assert row[2] == f"{100 * branch['relative']:.1f}"
    (row,) = (line.split() for line in lines if line.startswith("blocks.1 "))
    relative = {(b["block"], b["component"]): f"{100 * b['relative']:.1f}" for b in found["branches"]}
    assert row[1:] == [relative["blocks.1", c] for c in ("q", "k", "v", "proj", "fc1", "fc2")]
    file = where_figure(found, tmp_path / "where.json")
    assert file == tmp_path / "where.png"
    assert imread(file).shape[1] >= 1000


def test_a_weight_of_zeros_and_a_head_that_was_trained(images: Path) -> None:
    model = stir(tiny())
    with torch.no_grad():
        model.backbone.blocks[0].attn.proj.weight.zero_()
    evaluator = Evaluator(["clean", "fgsm"], Linf(EPS), ONE, progress=False)
    found = where_robustness_sits(model, evaluator, stream(images, 4), ("component",))
    none = [branch["name"] for branch in found["branches"] if branch["relative"] is None]
    assert none == ["blocks.0.attn.proj.lnlora"]
    json.dumps(found, allow_nan=False)
    assert found["always_on"] == ["head.weight", "head.bias"]
    assert where_table(found).splitlines()[-1] == "trained without a branch, and never disabled: head.weight, head.bias"


def test_ways_to_group() -> None:
    assert parse_by("branch,block,branch") == ("branch", "block")
    for wrong in ("layer", "", "component,,block"):
        with pytest.raises(UserError, match=r"--by: .* is unknown; known: component, block, branch"):
            parse_by(wrong)
