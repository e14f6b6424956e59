"""One evaluation under several norms is an evaluation under each."""

from pathlib import Path
from typing import Any

import pytest
from eval_cases import EPS, stream

import fulllora_dist as fd
from fulllora_dist.commands.evaluate import read_arguments
from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation.compare import compare
from fulllora_dist.evaluation.summary import table
from fulllora_dist.training.build import threats
from fulllora_dist.training.inputs import check_evaluation

ATTACKS = ("clean", "fgsm", "pgd5")


def test_three_norms_at_once(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    model, some = healthy["full_at"], stream(images, 24)
    found = fd.evaluate(model, some, attacks=ATTACKS, eps=EPS, norms={"l2": 0.7, "l1": "4.0"})
    assert [(point["norm"], point["eps"]) for point in found["more_norms"]] == [("l2", 0.7), ("l1", 4.0)]
    assert found["more_eps"] == []
    for point in found["more_norms"]:
        alone: Any = fd.evaluate(model, some, attacks=ATTACKS, norm=point["norm"], eps=point["eps"])
        assert point["attacks"] == {name: alone["attacks"][name] for name in ("fgsm", "pgd5")}
        assert point["worst_case"] == alone["worst_case"]
        assert 0 < point["worst_case"]["accuracy"] < found["attacks"]["clean"]["accuracy"]
    assert found["worst_case"] == fd.evaluate(model, some, attacks=ATTACKS, eps=EPS)["worst_case"]
    lines = table(found).splitlines()
    assert lines.index("l2 eps = 0.7") < lines.index("l1 eps = 4")
    assert sum(line.startswith("worst_case") for line in lines) == 3
    assert {row["norm"] for row in compare(found, found)["rows"]} == {"linf", "l2", "l1"}


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ({"l3": 1}, "must be a norm and its eps such as l2=2 or l1=255, got 'l3=1'"),
        ({"linf": 0.1}, "linf is threat.norm already; further sizes go to evaluation.eps"),
        ({"l2": "two"}, "l2: 'two' is not a size"),
        ({"l2": -1}, "l2: -1 is outside"),
    ],
)
def test_what_is_no_ball_is_refused(
    norms: Any, message: str, healthy: dict[str, fd.AdaptedModel], images: Path
) -> None:
    with pytest.raises(UserError, match=f"evaluation.norms: {message}"):
        fd.evaluate(healthy["full_at"], stream(images, 4), attacks=("clean",), eps=EPS, norms=norms)


def test_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: {backbone: none}\ndata: {train: none}\nrun: {output_dir: none}\noptim: {epochs: 1}\n"
        "threat: {eps: 4/255}\nmethod: {name: pgd}\n"
    )
    _, config = read_arguments(["--config", str(file), "--norms", "l2=2,l1=255", "--eps", "4/255,8/255"])
    assert [(ball.norm, ball.eps) for ball in threats(config)] == [
        ("linf", 4 / 255),
        ("linf", 8 / 255),
        ("l2", 2.0),
        ("l1", 255.0),
    ]
    for wrong, message in (
        ("l2=2,l2=3", "l2 stands there twice"),
        ("l2", "must be a norm and its eps"),
        ("linf=1", "linf is"),
    ):
        _, config = read_arguments(["--config", str(file), "--norms", wrong])
        with pytest.raises(UserError, match=f"evaluation.norms: {message}"):
            check_evaluation(config)
