"""A study from its file to its tables: what is run and what is not, what the results hold, and what the tables say."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fulllora_dist as fd
from fulllora_dist.commands.study import main as study_main
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.studies.choice import choice
from fulllora_dist.studies.comparisons import verdict
from fulllora_dist.studies.plan import Study
from fulllora_dist.studies.processes import start
from fulllora_dist.studies.report import Report
from fulllora_dist.studies.results import Results, as_ranges, from_ranges
from fulllora_dist.studies.runner import TRAIN, Options, Runner
from fulllora_dist.studies.verify import verify
from tests.studies.conftest import CONFIG, STUDY, Launcher, Tiny, call_on

SEEDS = ["tiny-fulllora-lr3e-2-seed0", "tiny-fulllora-lr3e-2-seed1"]


@pytest.fixture
def copy(made: tuple[Tiny, int], tmp_path: Path) -> Tiny:
    """The finished study to change, which starts nothing unless a test expects it."""
    original = made[0]
    for name in ("results", "runs"):
        shutil.copytree(original.folder / name, tmp_path / name)
    shutil.copy(original.folder / "page.md", tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG.format(data=tmp_path))
    for name in ("train", "val", "held_out"):
        (tmp_path / name).symlink_to(original.folder / name)
    return Tiny(tmp_path, Launcher(original.launcher.server))


def result(tiny: Tiny, name: str) -> dict:
    return json.loads((tiny.folder / "results" / f"{name}.json").read_text())


def change(tiny: Tiny, name: str, **values: object) -> None:
    path = tiny.folder / "results" / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_each_content_is_run_once_and_a_killed_run_resumes(made: tuple[Tiny, int]) -> None:
    """The second arm is the first one under another name, so nothing of it is run."""
    tiny, code = made
    assert code == 0, tiny.said
    tries = ["tiny-fulllora-lr1e-5-try", "tiny-fulllora-lr3e-2-try"]
    trained = [name for name, step in tiny.launcher.steps if step == TRAIN]
    assert trained == [tries[0], *tries, *SEEDS], "the first one twice: it was killed"
    assert len(tiny.launcher.steps) == len(trained) + 2 + 2
    assert any("killed by another process" in line for line in tiny.said)
    assert tiny.said[-1].endswith("nothing left")
    assert sorted(path.stem for path in (tiny.folder / "results").glob("*.json")) == sorted([*tries, *SEEDS])


def test_a_result_has_the_verdicts_of_its_adapter(made: tuple[Tiny, int]) -> None:
    """Recomputed by predictions of the adapter beside it, image by image."""
    tiny, _ = made
    for name in SEEDS:
        found = result(tiny, name)
        model = fd.load(str(tiny.folder / "results" / name))
        stream = EvalStream(tiny.folder / "val", batch_size=30, transform=EvalTransform(size=16, crop_pct=1.0))
        (batch,) = stream
        (said,) = found["evaluations"]
        with torch.no_grad():
            right = model(batch.pixels()).argmax(dim=1) == batch.labels
        expected = dict(zip(batch.ids.tolist(), right.tolist(), strict=True))
        assert [mark == "1" for mark in said["attacks"]["clean"]] == [expected[i] for i in from_ranges(said["ids"])]
        assert (found["trainable"], found["rank"]) == (model.report.trainable, 2)
    assert result(tiny, SEEDS[0])["adapter_sha256"] != result(tiny, SEEDS[1])["adapter_sha256"]


def test_killed_it_is_the_uninterrupted_run(made: tuple[Tiny, int], copy: Tiny) -> None:
    name = "tiny-fulllora-lr1e-5-try"
    before = result(copy, name)["adapter_sha256"]
    (copy.folder / "results" / f"{name}.json").unlink()
    shutil.rmtree(copy.folder / "runs")
    assert copy.run(copy.study()) == 0
    assert [step for step in copy.launcher.steps if step[1] == TRAIN] == [(name, TRAIN)]
    assert result(copy, name)["adapter_sha256"] == before


def test_nothing_is_run_again_without_its_folders_or_by_another_name(copy: Tiny) -> None:
    shutil.rmtree(copy.folder / "runs")
    moved = copy.folder / "moved"
    moved.mkdir()
    for name in ("train", "val", "held_out"):
        (copy.folder / name).rename(moved / name)
    config = copy.folder / "config.yaml"
    config.write_text(config.read_text().replace("/train", "/moved/train").replace("/val,", "/moved/val,"))
    text = STUDY.format(folder=copy.folder).replace("name: tiny", "name: other").replace("fulllora:", "renamed:")
    text = text.replace("like: fulllora", "like: renamed").replace("against: fulllora", "against: renamed")
    text = text.replace("/held_out", "/moved/held_out").replace("attacks: [clean, pgd3]", "attacks: [pgd3, clean]")
    assert copy.run(copy.study(text)) == 0
    assert copy.launcher.steps == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs: 2", "epochs: 3", r"tiny-fulllora-lr1e-5-try.json holds another run \(optim.epochs 2.0, now 3.0\)"),
        ("method: n_fgsm", "method: {name: n_fgsm, noise: 1.0}", r"another run \(method.noise 2.0, now 1.0\)"),
    ],
)
def test_other_content_is_not_taken_for_done(copy: Tiny, old: str, new: str, message: str) -> None:
    config = copy.folder / "config.yaml"
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        copy.run(copy.study())
    assert copy.launcher.steps == []


def test_other_images_are_not_taken_for_the_same(copy: Tiny) -> None:
    (copy.folder / "train").unlink()
    (copy.folder / "train").symlink_to((copy.folder / "val").resolve())
    config = copy.folder / "config.yaml"
    config.write_text(config.read_text().replace("/val,", "/held_out,"))
    text = STUDY.format(folder=copy.folder).replace("/held_out", "/elsewhere")
    shutil.copytree((copy.folder / "held_out").resolve(), copy.folder / "elsewhere")
    with pytest.raises(UserError, match=r"data.held_out|holds another run \(other content of data.train\)"):
        copy.run(copy.study(text))


def test_further_evaluations_train_nothing_and_come_one_after_the_other(copy: Tiny) -> None:
    """The first of all runs before the second of any."""
    further = "  - {attacks: [apgd-ce], num_samples: 6}\n  - {attacks: [fgsm], num_samples: 5}\n"
    text = STUDY.format(folder=copy.folder).replace("[clean, pgd3]}\n", "[clean, pgd3]}\n" + further)
    assert copy.run(copy.study(text)) == 0
    assert [name for name, _ in copy.launcher.steps] == [*SEEDS, *SEEDS]
    assert all(step != TRAIN for _, step in copy.launcher.steps)
    assert [line.partition("; ")[2] for line in copy.said if line.startswith("done: ")][:2] == ["2 runs left"] * 2
    for name in SEEDS:
        first, *others = result(copy, name)["evaluations"]
        assert first["attacks"].keys() == {"clean", "pgd3"}
        assert [(part["num_samples"], *part["attacks"]) for part in others] == [(6, "apgd-ce"), (5, "fgsm")]
        assert [len(marks) for part in others for marks in part["attacks"].values()] == [6, 5]
    assert f"; pgd3 on these {100 * np.mean([robust_among_the_few(copy, name) for name in SEEDS]):.1f} |" in page(copy)


def robust_among_the_few(tiny: Tiny, name: str) -> float:
    """Accuracy under PGD-3 on the six images of APGD, by their ids."""
    first, few, _ = result(tiny, name)["evaluations"]
    right = dict(zip(from_ranges(first["ids"]), first["attacks"]["pgd3"], strict=True))
    return sum(right[i] == "1" for i in from_ranges(few["ids"])) / 6


def page(tiny: Tiny) -> str:
    return (tiny.folder / "page.md").read_text()


def test_the_try_is_chosen_on_held_out_images_alone(copy: Tiny) -> None:
    study = copy.study()
    results = Results(study.settings.results_dir)
    tries = {run.values["optim.lr"]: results.find(run) for run in study.tries["fulllora"]}
    right = {lr: found["evaluations"][0]["attacks"]["pgd2"].count("1") for lr, found in tries.items()}
    assert all(found["evaluations"][0]["images"] == "held_out" for found in tries.values())
    assert right["3e-2"] > right["1e-5"]
    assert choice(study, "fulllora", results) == {"optim.lr": "3e-2"}
    evaluations = tries["1e-5"]["evaluations"]
    evaluations[0]["attacks"]["pgd2"] = "1" * 24
    change(copy, "tiny-fulllora-lr1e-5-try", evaluations=evaluations)
    assert choice(study, "fulllora", Results(study.settings.results_dir)) == {"optim.lr": "1e-5"}


def test_a_run_that_fails_stops_no_other(copy: Tiny) -> None:
    for name in SEEDS:
        (copy.folder / "results" / f"{name}.json").unlink()
    adapter = next((copy.folder / "runs").glob(f"{SEEDS[0]}-*/")) / "adapter" / "adapter.safetensors"
    for evaluation in adapter.parents[1].glob("evaluation-*.json"):
        evaluation.unlink()
    adapter.write_bytes(b"damaged")
    assert copy.run(copy.study()) == 1
    assert any(line.startswith(f"failed: {SEEDS[0]}") for line in copy.said)
    assert (copy.folder / "results" / f"{SEEDS[1]}.json").exists()


def test_the_tables_need_the_results_alone(made: tuple[Tiny, int], copy: Tiny) -> None:
    page = copy.folder / "page.md"
    before = page.read_text()
    assert before.startswith("# By hand\n\nWords.\n")
    for name in ("runs", "train", "val", "held_out"):
        path = copy.folder / name
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    page.write_text("# By hand\n\nWords.\n")
    report = Report(copy.study())
    assert not report.is_written()
    report.write()
    assert report.is_written()
    said = page.read_text()
    assert said == before.replace(str(made[0].folder), str(copy.folder))
    assert page.with_name("study_tiny.png").read_bytes()[:4] == b"\x89PNG"
    evaluations = [result(copy, name)["evaluations"][0]["attacks"] for name in SEEDS]
    mean = 100 * np.mean([[mark == "1" for mark in found["pgd3"]] for found in evaluations])
    assert f" {mean:.1f} (" in next(line for line in said.splitlines() if line.startswith("| FullLoRA | "))
    assert "| the same - FullLoRA | pgd3 | 30 | +0.0 (" in said
    assert "| not inferior |" in said
    page.write_text(page.read_text().replace(f"{mean:.1f}", "99.9"))
    assert not report.is_written()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("margin: 0.2", "margin: 0.3"),
        ("seeds: [0, 1]", "seeds: [0]"),
        ("[1e-5, 3e-2]", "[3e-2]"),
        ("attack: pgd2}", "attack: pgd2, prefer_clean: true}"),
        ("[clean, pgd3]}", "[clean, pgd3]}\n  - {attacks: [pgd1], num_samples: 5}"),
    ],
)
def test_what_was_declared_later_is_exploratory(copy: Tiny, old: str, new: str) -> None:
    """All but a further evaluation, on which the comparison does not depend."""
    before = STUDY.format(folder=copy.folder)
    assert "xploratory" not in Report(copy.study()).text()
    assert old in before
    said = Report(copy.study(before.replace(old, new))).text()
    if "pgd1" in new:
        assert "xploratory" not in said
        return
    assert "| not inferior, exploratory |" in said
    renamed = before.replace(old, new).replace("name: tiny", "name: other")
    assert "| not inferior, exploratory |" in Report(copy.study(renamed)).text(), "as another study's"
    assert "\nExploratory: declared or changed when seeds of tiny-fulllora-lr3e-2 were known.\n" in said


def test_what_was_declared_stays_when_a_result_is_given_more(copy: Tiny) -> None:
    """Of the same adapter: the commit and the cost of the training, too."""
    before = result(copy, SEEDS[0])
    change(copy, SEEDS[0], commit="of the training", cost=before["cost"] | {"step_seconds": 7.0})
    text = STUDY.format(folder=copy.folder).replace("margin: 0.2", "margin: 0.3")
    text = text.replace("[clean, pgd3]}\n", "[clean, pgd3]}\n  - {attacks: [fgsm], num_samples: 6}\n")
    assert copy.run(copy.study(text)) == 0
    after = result(copy, SEEDS[0])
    assert (after["commit"], after["cost"]["step_seconds"]) == ("of the training", 7.0)
    assert after["evaluations"][0] == before["evaluations"][0]
    margins = [part["declared"]["comparisons"][0]["margin"] for part in after["evaluations"]]
    assert margins == [0.2, 0.3]
    assert "| not inferior, exploratory |" in Report(copy.study(text)).text()


def test_a_kept_adapter_that_is_not_there_fails_its_run_alone(copy: Tiny) -> None:
    """And the time left is not known, which fails no other."""
    shutil.rmtree(copy.folder / "runs")
    shutil.rmtree(copy.folder / "results" / SEEDS[0])
    text = STUDY.format(folder=copy.folder).replace("[clean, pgd3]}\n", "[clean, pgd3]}\n  - {attacks: [fgsm]}\n")
    with pytest.raises(UserError, match=f"{SEEDS[0]}: the adapter cannot be read"):
        copy.run(copy.study(text))
    study = copy.study(text)
    runner = Runner(study, Options(), copy.said.append, lambda: None, copy.launcher)  # type: ignore[arg-type]
    assert runner.run() == 1
    assert [line for line in copy.said if line.startswith("failed: fulllora")] == [
        f"failed: fulllora optim.lr=3e-2 seed 0: {copy.folder}/results/{SEEDS[0]}: the adapter cannot be read "
        "(No such file or directory)"
    ]
    assert len(result(copy, SEEDS[1])["evaluations"]) == 2


def test_runs_that_no_table_shows_are_named(copy: Tiny) -> None:
    said = "Runs of this study that are in no table: "
    assert said not in Report(copy.study()).text()
    text = STUDY.format(folder=copy.folder).replace("seeds: [0, 1]", "seeds: [0]")
    assert f"{said}{SEEDS[1]}." in Report(copy.study(text)).text()


def test_a_committed_adapter_is_evaluated_on_other_images_without_training(copy: Tiny) -> None:
    """As in a fresh clone: of the study, whose verdicts stay, and of another one that shares its runs. An adapter that
    is not kept is trained anew."""
    shutil.rmtree(copy.folder / "runs")
    plain = STUDY.format(folder=copy.folder)
    part = f"[clean, pgd3]}}\n  - {{attacks: [fgsm], data: {copy.folder}/held_out, num_samples: 9}}\n"
    assert copy.run(copy.study(plain.replace("[clean, pgd3]}\n", part))) == 0
    assert [(name, step == TRAIN) for name, step in copy.launcher.steps] == [(name, False) for name in SEEDS]
    verified = verify(SEEDS[0], str(copy.folder / "results"), call_on(copy.launcher.server))
    assert [(found.n, tuple(found.differing), found.passed) for found in verified] == [
        (30, ("clean", "pgd3"), True),
        (9, ("fgsm",), True),
    ]
    first, second = result(copy, SEEDS[0])["evaluations"]
    assert (first["images"], second["images"]) == ("validation", f"{copy.folder}/held_out")
    assert len(second["attacks"]["fgsm"]) == 9
    assert "; fgsm of 4 of 4 runs on 9 images" in (copy.folder / "page.md").read_text()
    copy.launcher.steps.clear()
    change(copy, SEEDS[0], adapter_kept=False)
    other = plain.replace("name: tiny", "name: other").replace("[clean, pgd3]}", "[pgd1], num_samples: 7}")
    shutil.rmtree(copy.folder / "runs")
    assert copy.run(copy.study(other.replace("attack: pgd3", "attack: pgd1"))) == 0
    trained = [name for name, step in copy.launcher.steps if step == TRAIN]
    assert trained == ["other-fulllora-lr3e-2-seed0"]
    attacks = [list(part["attacks"]) for part in result(copy, SEEDS[0])["evaluations"]]
    assert attacks == [["clean", "pgd3"], ["fgsm"], ["pgd1"]], "trained anew it is the same adapter"


def test_verify_gets_the_committed_verdicts(copy: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    results = str(copy.folder / "results")
    shutil.rmtree(copy.folder / "runs")
    (found,) = verify(SEEDS[0], results, call_on(copy.launcher.server))
    assert found.passed
    assert (found.n, tuple(found.differing)) == (30, ("clean", "pgd3"))
    evaluations = result(copy, SEEDS[0])["evaluations"]
    marks = evaluations[0]["attacks"]["pgd3"]
    evaluations[0]["attacks"]["pgd3"] = marks[:7] + "10"[int(marks[7])] + marks[8:]
    change(copy, SEEDS[0], evaluations=evaluations)
    (found,) = verify(SEEDS[0], results, call_on(copy.launcher.server))
    assert found.differing == {"clean": [], "pgd3": [7]}
    with pytest.raises(UserError, match=r"its adapter was not kept \(a try, or over max_adapter_mb\)"):
        verify("tiny-fulllora-lr3e-2-try", results)
    shutil.copy(copy.folder / "results" / SEEDS[1] / "adapter.safetensors", copy.folder / "results" / SEEDS[0])
    with pytest.raises(UserError, match="not the one that was evaluated"):
        verify(SEEDS[0], results)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 1]", "seeds: [0, 100]", r"seeds: must be different, and none choose.seed=100, got \[0, 100\]"),
        ("like: fulllora", "like: lora", "arms.again.like: must be an arm before it, got lora"),
        ("like: fulllora}", "like: fulllora, tries: {{optim.lr: [1e-3]}}}", "as many tries, got fulllora 2, again 1"),
        ("[1e-5, 3e-2]", "[1e-5, 1e-5]", "arms.fulllora.tries.optim.lr: must be different values"),
        ("[1e-5, 3e-2]", "[1e-5, -1]", "arms.fulllora: command line: optim.lr: .* greater than 0"),
        ("attack: pgd3, margin", "attack: pgd4, margin", "comparisons.0.attack: must be one of clean, pgd3, got pgd4"),
        ("margin: 0.2,\n", "", "comparisons.0: margin and power belong together"),
        ("attacks: [clean, pgd3]", "attacks: [clean, pgd3, pgb20]", "unknown attack 'pgb20'"),
        ("label: FullLoRA,", "label: FullLoRA, overrides: [run.seed=3],", "run.seed is set by the study; remove it"),
        ("attack: pgd2}", "attack: clean, prefer_clean: true}", "choose.prefer_clean: must be false where attack is"),
        ("name: tiny", "nome: tiny", "unknown setting nome; did you mean name"),
        ("label: FullLoRA,", "label: FullLoRA, lable: x,", "unknown setting arms.fulllora.lable; did you mean label"),
        ("{folder}/config.yaml", "{folder}/none.yaml", "none.yaml does not exist"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(copy: Tiny, old: str, new: str, message: str) -> None:
    assert old in STUDY
    with pytest.raises(UserError, match=message) as refused:
        copy.study(STUDY.replace(old, new).format(folder=copy.folder))
    assert str(refused.value).startswith(copy.path)
    assert "\n" not in str(refused.value)


def test_more_images_than_there_are_is_refused_before_any_run(copy: Tiny) -> None:
    text = STUDY.format(folder=copy.folder).replace("[clean, pgd3]}", "[clean, pgd3], num_samples: 31}")
    with pytest.raises(UserError, match=r"study.yaml: .*val: evaluation.num_samples must be between 1 and the 30"):
        copy.run(copy.study(text))


def test_a_file_that_is_no_result_is_refused(copy: Tiny) -> None:
    (copy.folder / "results" / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json is not a result of a study"):
        Report(copy.study())


def test_ranges() -> None:
    for ids in ([0], [0, 1, 2], [3, 5, 6, 7, 20], list(range(0, 50, 7))):
        assert from_ranges(as_ranges(ids)) == ids
    assert as_ranges([0, 1, 2, 9]) == "0-2,9"


@pytest.mark.parametrize(
    ("low", "high", "margin", "said"),
    [
        (-0.02, 0.01, 0.025, "not inferior"),
        (-0.03, 0.01, 0.025, "undecided"),
        (-0.05, -0.03, 0.025, "inferior"),
        (-0.04, -0.01, 0.025, "worse"),
        (0.01, 0.02, 0.025, "better"),
        (-0.02, 0.01, None, "no difference shown"),
        (-0.02, -0.01, None, "worse"),
    ],
)
def test_what_an_interval_says(low: float, high: float, margin: float | None, said: str) -> None:
    assert verdict({"value": (low + high) / 2, "low": low, "high": high, "per_seed": []}, margin) == said


@pytest.mark.parametrize(
    ("name", "arms", "tries", "images"),
    [
        ("imagenette", {"full", "fulllora", "lora"}, 3, 1000),
        ("imagenette_fresh", {"full", "fulllora", "lora", "full_high", "clean_share"}, 3, 2000),
        ("imagenette_layer_norm", {"fulllora", "lora"}, 1, 500),
    ],
)
def test_a_study_in_the_repository_is_well_formed(
    name: str, arms: set[str], tries: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    study = Study(f"configs/studies/{name}.yaml")
    assert study.tries.keys() == arms
    assert {len(runs) for runs in study.tries.values()} == {tries}
    assert study.images("pgd20") == images


def test_a_dry_run_makes_no_data_and_says_that_the_study_would(copy: Tiny) -> None:
    missing = copy.folder / "not_yet"
    copy.study(STUDY.format(folder=copy.folder) + f"shards: [{copy.folder}/images {missing}]\n")
    with pytest.raises(UserError, match=f"shards: {missing} is not there yet; without --dry-run the study makes it"):
        study_main([copy.path, "--dry-run"])
    assert not missing.exists()


def test_a_folder_that_is_complete_is_only_read(copy: Tiny) -> None:
    """As after a kill between the last step of a run and its result: of the last try, too, which the seeds wait for."""
    for path in (copy.folder / "results").glob("*.json"):
        path.unlink()
    assert copy.run(copy.study()) == 0
    assert copy.launcher.steps == []
    assert copy.said[-1].endswith("nothing left")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "adapter/adapter.json",
            ("training", {"data": {"index": "other"}}),
            "has an adapter of other images than .*/train",
        ),
        ("evaluation-*.json", ("data", "other"), "json is of other images than .*/val has now; delete it"),
        ("evaluation-*.json", ("adapter_sha256", "other"), "json is of another adapter than "),
    ],
)
def test_a_folder_of_other_data_is_refused(copy: Tiny, file: str, change: tuple[str, Any], message: str) -> None:
    """As after the shards were made anew and the result was deleted."""
    (copy.folder / "results" / f"{SEEDS[0]}.json").unlink()
    (path,) = next((copy.folder / "runs").glob(f"{SEEDS[0]}-*/")).glob(file)
    path.write_text(json.dumps(json.loads(path.read_text()) | dict([change])))
    with pytest.raises(UserError, match=message):
        copy.run(copy.study())
    assert copy.launcher.steps == []


def test_the_threads_that_a_run_had_are_recorded(copy: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy.folder / "results" / f"{SEEDS[0]}.json"
    for given, expected in (("3", 3), ("", len(os.sched_getaffinity(0)))):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        path.unlink()
        assert copy.run(copy.study()) == 0
        assert result(copy, SEEDS[0])["cost"]["threads"] == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(UserError, match="OMP_NUM_THREADS must be a number, got 'many'"):
        copy.run(copy.study())


def test_a_run_is_as_nice_as_its_study(made: tuple[Tiny, int], tmp_path: Path) -> None:
    """In a session of its own, where its own nice value alone would change nothing."""
    group = Path("/proc/self/autogroup")
    if not group.exists():
        pytest.skip("no autogroup in this kernel")
    (tmp_path / "script.py").write_text(
        "import pathlib, sys, time\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "while not (place / 'started').exists(): time.sleep(0.01)\n"
        f"(place / 'found').write_text(pathlib.Path('{group}').read_text())\n"
    )
    run = dataclasses.replace(made[0].study().tries["fulllora"][0], output_dir=str(tmp_path / "out"))
    pid = os.fork()
    if pid == 0:
        os.nice(5)
        job = start(run, TRAIN, [str(tmp_path / "script.py"), str(tmp_path)], 1, dict(os.environ))
        (tmp_path / "started").touch()
        os._exit(job.process.wait())
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "found").read_text().split()[-1] == str(os.nice(0) + 5)


def test_a_run_whose_study_is_killed_is_asked_to_save(copy: Tiny) -> None:
    script, saved = copy.folder / "script.py", copy.folder / "saved"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_): pathlib.Path(sys.argv[1], 'saved').touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path(sys.argv[1], 'started').touch()\n"
        "time.sleep(60)\n"
    )
    run = dataclasses.replace(copy.study().tries["fulllora"][0], output_dir=str(copy.folder / "out"))
    pid = os.fork()
    if pid == 0:
        start(run, TRAIN, [str(script), str(copy.folder)], 1, dict(os.environ))
        while not (copy.folder / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 20
    while not saved.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_arms_of_the_page_can_be_added_to_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    _, arms = re.findall(r"```yaml\n(.*?)```", (root / "docs" / "studies.md").read_text(), re.DOTALL)
    text = (
        (root / "configs" / "studies" / "imagenette.yaml").read_text().replace("config: ..", f"config: {root}/configs")
    )
    (tmp_path / "study.yaml").write_text(text.replace("\ncomparisons:", f"\n{arms}\ncomparisons:"))
    study = Study(str(tmp_path / "study.yaml"))
    first, second = study.waves()
    assert (first, len(second)) == (["full", "fulllora", "lora"], 12)
