"""The paired comparison against a bootstrap written out, a simulation of its coverage, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.stats import paired_score
from fulllora_dist.evaluation.compare import compare, comparison_table, paired_difference
from fulllora_dist.evaluation.output import check_replaced
from fulllora_dist.evaluation.report import Key, read_evaluation
from tests.ranks import RankServer

ROOT = Path(__file__).parents[1]


def evaluation(robust: np.ndarray, clean: np.ndarray | None = None, **metadata: Any) -> dict[str, Any]:
    """In the form of evaluation.json, as far as it is compared."""
    n = len(robust)
    attacks = {"clean": {"correct": (np.ones(n, int) if clean is None else clean).tolist()}}
    attacks["pgd20"] = {"correct": robust.astype(int).tolist()}
    found = {"n": n, "eps": 4 / 255, "norm": "linf", "precision": "fp32", "data": "hash", "warnings": []}
    return {**found, "ids": list(range(n)), "attacks": attacks, "more_eps": [], **metadata}


def pair(n: int, seed: int = 0, gain: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Correlated results: most images are as hard for the one as for the other."""
    rng = np.random.default_rng(seed)
    hard, luck = rng.random(n), rng.random((2, n))
    return hard + 0.3 * luck[0] < 0.6, hard + 0.3 * luck[1] < 0.6 + gain


def robust_row(found: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in found["rows"] if row["attack"] == "pgd20")


def test_equals_a_bootstrap_over_images() -> None:
    a, b = pair(400)
    row = robust_row(compare(evaluation(a), evaluation(b), samples=40_000))
    rng = np.random.default_rng(1)
    drawn = rng.integers(len(a), size=(20_000, len(a)))
    differences = b[drawn].mean(axis=1) - a[drawn].mean(axis=1)
    low, high = np.percentile(differences, [2.5, 97.5])
    assert row["difference"] == pytest.approx(b.mean() - a.mean())
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.003)
    unpaired = 1.96 * np.sqrt(a.var() / len(a) + b.var() / len(b))
    assert row["high"] - row["low"] < 1.6 * unpaired, "paired, it is narrower"


def test_covers_the_truth() -> None:
    """In 95 % of repetitions, up to the error of 400 of them (1.1 points)."""
    truth = np.subtract(*[side.mean() for side in pair(400_000, seed=1000)][::-1])
    inside = 0
    for seed in range(400):
        a, b = pair(200, seed)
        row = robust_row(compare(evaluation(a), evaluation(b), samples=1000))
        inside += row["low"] <= truth <= row["high"]
    assert 0.915 <= inside / 400 <= 0.985


def test_the_other_way_round_and_with_itself() -> None:
    a, b = (evaluation(side) for side in pair(300))
    there, back = robust_row(compare(a, b)), robust_row(compare(b, a))
    assert back["difference"] == -there["difference"]
    assert (back["only_a"], back["only_b"], back["p"]) == (there["only_b"], there["only_a"], there["p"])
    assert back["low"] == pytest.approx(-there["high"], abs=0.01)
    same = robust_row(compare(a, a))
    assert (same["difference"], same["p"]) == (0, 1)
    tells = 1.96**2 / (300 + 1.96**2)  # what 300 images can tell
    assert (same["low"], same["high"]) == pytest.approx((-tells, tells), rel=1e-3)


@pytest.mark.parametrize("counts", [(3, 9, 50), (40, 40, 1000), (1, 0, 44), (0, 0, 30), (60, 20, 80), (5, 20, 60)])
def test_the_score_interval_is_what_pearson_does_not_reject(counts: tuple[int, int, int]) -> None:
    """At its ends, chi-squared against the most likely probabilities of that difference, found by searching."""
    only_a, only_b, n = counts
    observed = np.array([only_a, only_b, n - only_a - only_b])
    for delta in paired_score(*counts):
        alone = np.linspace(max(0, -delta), (1 - delta) / 2, 200_001)[1:-1]
        expected = n * np.stack([alone, alone + delta, 1 - 2 * alone - delta])
        best = expected[:, (observed[:, None] * np.log(expected)).sum(axis=0).argmax()]
        assert ((observed - best) ** 2 / best).sum() == pytest.approx(1.96**2, rel=1e-2)
    assert paired_score(9, 9, 9 + 9) == pytest.approx([-end for end in paired_score(9, 9, 18)[::-1]])
    assert paired_score(7, 0, 7)[0] == -1


def test_covers_the_truth_where_few_images_differ() -> None:
    """One or two of 100: the bootstrap alone covers the difference 84 % of the time."""
    rng, inside = np.random.default_rng(0), 0
    for only_a, only_b, _ in rng.multinomial(100, [0.005, 0.02, 0.975], size=1000):
        a, b = np.zeros(100, bool), np.zeros(100, bool)
        a[:only_a], b[only_a : only_a + only_b] = True, True
        row = paired_difference(a, b, 500, rng)
        inside += row["low"] <= 0.015 <= row["high"]
    assert inside >= 940


def test_each_eps_and_warnings() -> None:
    a, b = pair(100)
    more = [{"eps": 8 / 255, "attacks": {"pgd20": {"correct": a.astype(int).tolist()}}}]
    found = compare(evaluation(a, more_eps=more), evaluation(b, more_eps=more, warnings=["square: masked"]))
    assert [(row["attack"], round(row["eps"] * 255)) for row in found["rows"]] == [
        ("clean", 0),
        ("pgd20", 4),
        ("worst_case", 4),
        ("pgd20", 8),
        ("worst_case", 8),
    ]
    assert found["rows"][3]["difference"] == 0
    assert found["warnings"] == ["B: square: masked"]
    assert "4/255" in comparison_table(found)


def test_the_worst_case_is_that_of_the_attacks_that_both_have() -> None:
    """An attack that one alone has would count against it."""
    rng = np.random.default_rng(0)
    clean, robust, other, third = (rng.random((2, 200)) < share for share in (0.9, 0.7, 0.7, 0.2))
    reports = [evaluation(robust[k] & clean[k], clean[k]) for k in (0, 1)]
    for k, report in enumerate(reports):
        report["attacks"]["cw20"] = {"correct": (other[k] & clean[k]).astype(int).tolist()}
    reports[1]["attacks"]["square"] = {"correct": (third[1] & clean[1]).astype(int).tolist()}
    (row,) = (row for row in compare(*reports)["rows"] if row["attack"] == "worst_case")
    expected = [
        np.mean([c and r and o for c, r, o in zip(*side, strict=True)])
        for side in zip(clean, robust, other, strict=True)
    ]
    assert [row["a"], row["b"]] == pytest.approx(expected)
    (alone,) = compare(*reports, attacks=["worst_case"])["rows"]
    assert (alone["a"], alone["b"]) == (row["a"], row["b"])
    assert row["a"] < min(other[0].mean(), robust[0].mean())


def test_further_norms_are_compared_in_their_balls() -> None:
    a, b = pair(100)
    more = [{"norm": "l2", "eps": 4 / 255, "attacks": {"pgd20": {"correct": [0] * 100}}}]
    found = compare(evaluation(a, more_norms=more), evaluation(b, more_norms=more))
    in_l2 = [row for row in found["rows"] if row["norm"] == "l2"]
    assert [(row["attack"], row["a"]) for row in in_l2] == [("pgd20", 0), ("worst_case", 0)]
    assert "l2 eps = 0.01569" in comparison_table(found)


def test_clean_is_compared_at_any_eps() -> None:
    a, b = pair(100)
    found = compare(evaluation(a), evaluation(b, eps=8 / 255))
    assert [row["attack"] for row in found["rows"]] == ["clean"]


def test_shared_ids_are_paired_by_id() -> None:
    a, b = pair(100)
    first, second = evaluation(a), evaluation(b[50:], ids=list(range(50, 100)), n=50)
    with pytest.raises(UserError, match=r"A has 100 images, B 50, and 50 of them are the same; .*--shared"):
        compare(first, second)
    row = robust_row(compare(first, second, shared=True))
    assert row["difference"] == pytest.approx(b[50:].mean() - a[50:].mean())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"norm": "l2"}, "norm of A is linf, of B l2"),
        ({"precision": "bf16"}, "precision of A is fp32, of B bf16"),
        ({"data": "other"}, "data of A is hash, of B other"),
        ({"ids": list(range(100, 200))}, "0 of them are the same"),
        ({"ids": [0, *range(99)]}, "B: 1 of 100 ids are repeated; evaluate each image once"),
    ],
)
def test_what_cannot_be_compared_is_refused(metadata: dict[str, Any], message: str) -> None:
    a, b = pair(100)
    with pytest.raises(UserError, match=message):
        compare(evaluation(a), evaluation(b, **metadata))


def test_an_attack_that_one_has_not_is_refused() -> None:
    a, b = pair(100)
    with pytest.raises(UserError, match=r"--attack: cw20 is not in both; in common they have clean, pgd20 at 4/255"):
        compare(evaluation(a), evaluation(b), attacks=["cw20"])


def test_what_another_evaluation_found_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    both = [Key("linf", 0.0, "clean"), Key("linf", 4 / 255, "pgd20")]
    at_8 = Key("linf", 8 / 255, "pgd20")
    check_replaced(path, both, "linf", 1, None)
    path.write_text(json.dumps(evaluation(pair(33)[0], adapter_sha256="a")))
    check_replaced(path, [*both, at_8], "linf", 40, "a")
    for new, lost in (
        ((both[:1], "linf", 33, "a"), "pgd20 at 4/255"),
        (([*both[:1], at_8], "linf", 33, "a"), "pgd20 at 4/255"),
        ((both, "linf", 32, "a"), "33 images"),
        ((both, "l2", 33, "a"), "linf"),
        ((both, "linf", 33, "b"), "another adapter"),
    ):
        with pytest.raises(UserError, match=f"--output: .* holds an evaluation of {lost}; name another file, or delet"):
            check_replaced(path, *new)
    for other in ('{"n": "x"}', '{"n": 3, "off": []}', "no json"):
        path.write_text(other)
        with pytest.raises(UserError, match=r"--output: .* is not an evaluation.json; .*; name another file"):
            check_replaced(path, both, "linf", 99, "a")


def test_what_is_not_compared_is_said() -> None:
    a, b = pair(100)
    one, other = evaluation(a), evaluation(b, eps=8 / 255)
    found = compare({**one, "pictures": {"crop_pct": 0.9, "batch_size": 4}}, {**other, "pictures": {"crop_pct": 1.0}})
    assert [row["attack"] for row in found["rows"]] == ["clean"]
    assert found["warnings"] == [
        "only A has pgd20 at 4/255",
        "only B has pgd20 at 8/255",
        "crop_pct of A is 0.9, of B 1.0: not the same pixels",
    ]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"ids": [1], "attacks": {"clean": {"correct": []}}, "eps": 0}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a.json is not an evaluation.json"):
        read_evaluation(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_evaluation(tmp_path / "b.json")


def test_command_line(rank_server: RankServer, tmp_path: Path) -> None:
    for name, side in zip("ab", pair(200), strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(evaluation(side)))
    command = [ROOT / "tools" / "compare_evaluations.py", "a.json", "b.json"]
    done = rank_server.launch(*command, "--json", cwd=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 200
    for wrong in (["--attack", "cw"], ["--seed", "-1"], ["--samples", "100000000000"]):
        failed = rank_server.launch(*command, *wrong, cwd=tmp_path).wait()
        assert (failed.returncode, len(failed.stderr.splitlines())) == (2, 1), failed.stderr
