"""What a study takes for the same run and the same images, from results that are written here: nothing is trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from fulllora_dist.config.load import load_config
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.settings import RUNNING
from fulllora_dist.studies.choice import choice
from fulllora_dist.studies.content import content, folder_key, inputs_of, read_by
from fulllora_dist.studies.plan import HELD_OUT, VALIDATION, Run, Study
from fulllora_dist.studies.report import Report
from fulllora_dist.studies.results import FORMAT, Results
from tests.studies.conftest import CONFIG, STUDY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG.format(data=tmp_path))
    (tmp_path / "results").mkdir()
    return tmp_path


def study(folder: Path, *changes: tuple[str, str]) -> Study:
    text = STUDY.format(folder=folder)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "study.yaml").write_text(text)
    return Study(str(folder / "study.yaml"))


def write(folder: Path, run: Run, config: dict[str, Any] | None = None, **found: Any) -> None:
    """A result of `run`, right on every image under all attacks unless `attacks` says otherwise."""
    evaluation = {
        "images": HELD_OUT if run.is_try else VALIDATION,
        "num_samples": None,
        "data": "d",
        "eps": run.config.threat.eps,
        "norm": "linf",
        "precision": "fp32",
        "batch_size": 10,
        "seed": 0,
        "study": "tiny",
        "declared": {"arms": {}, "choose": {}, "seeds": [], "evaluations": [], "comparisons": []},
        "commit": None,
        "ids": "0-3",
        "attacks": dict.fromkeys(("clean", "pgd2", "pgd3"), "1111"),
    }
    values = {
        **{"format": FORMAT, "name": run.name, "study": "tiny", "arm": run.arm, "values": dict(run.values)},
        **{"seed": run.seed, "is_try": run.is_try, "commit": None, "inputs": {"data.train": "t"}},
        **{"config": run.config.model_dump(mode="json") if config is None else config},
        **{"environment": {}, "shards": [], "adapter_sha256": "", "adapter_kept": False},
        **{"trainable": 1, "trainable_share": 0.1, "rank": 2},
        "cost": {"batches": 1, "updates": 1, "flops": 1, "step_seconds": 1.0, "ranks": 1, "threads": 1, "parallel": 1},
        "evaluations": [evaluation | found],
    }
    (folder / "results" / f"{run.name}.json").write_text(json.dumps(values))


def test_a_setting_that_came_later_was_at_its_default(folder: Path) -> None:
    run = study(folder).tries["fulllora"][0]
    config = run.config.model_dump(mode="json")
    del config["method"]["clean_fraction"]
    write(folder, run, config)
    assert Results(str(folder / "results")).find(run) is not None
    other = study(folder, ("label: FullLoRA,", "label: FullLoRA, overrides: [method.clean_fraction=0.5],"))
    with pytest.raises(UserError, match=r"holds another run \(method.clean_fraction 0.0, now 0.5\)"):
        Results(str(folder / "results")).find(other.tries["fulllora"][0])


def test_another_methods_settings_are_a_difference(folder: Path) -> None:
    write(folder, study(folder).tries["fulllora"][0])
    other = study(folder, ("label: FullLoRA,", "label: FullLoRA, overrides: [method=fgsm_rs],"))
    with pytest.raises(UserError, match=r"method.name n_fgsm, now fgsm_rs, method.noise 2.0, now unset"):
        Results(str(folder / "results")).find(other.tries["fulllora"][0])


def test_a_setting_that_is_no_more_is_named(folder: Path) -> None:
    """Where the result has the run's name; any other result with it is no hindrance."""
    first, second = study(folder).tries["fulllora"]
    config = first.config.model_dump(mode="json")
    config["optim"]["nesterov"] = True
    write(folder, first, config)
    results = Results(str(folder / "results"))
    assert results.find(second) is None
    with pytest.raises(UserError, match=r"lr1e-5-try.json: config: unknown setting optim.nesterov, .* remove the sett"):
        results.find(first)


def test_the_folder_of_a_run_depends_on_what_is_not_at_its_default(folder: Path) -> None:
    def config(*overrides: str) -> Config:
        return load_config(str(folder / "config.yaml"), [*overrides, "run.output_dir=unset"])

    plain = folder_key(config())
    assert folder_key(config("method.clean_fraction=0.0", "run.seed=0", "data.num_workers=3")) == plain
    kinds = ("method.clean_fraction=0.5", "run.seed=1", "optim.lr=2e-3", "method=fgsm_rs", "method=pgd")
    phases = [f"phases=[{{fraction: 1, method: {name}}}]" for name in ("n_fgsm", "pgd")]
    keys = [folder_key(config(override)) for override in (*kinds, *phases)]
    assert len({plain, *keys}) == 1 + len(keys)

    class Later(Config):
        """Of a version with one more setting."""

        later: int = 3

    values = config().model_dump()
    assert folder_key(Later.model_validate(values)) == plain != folder_key(Later.model_validate(values | {"later": 4}))


def test_what_may_change_on_resume_does_not_count(folder: Path) -> None:
    values = {"num_workers": 7, "max_bad_samples": 7, "connections": 7, "read_ahead_mb": 7, "request_timeout_s": 7}
    values |= {"retry_timeout_s": 7, "cache_dir": "elsewhere", "cache_gb": 7}
    assert values.keys() == {*RUNNING}
    path = str(folder / "config.yaml")
    contents = [
        content(load_config(path, ["run.output_dir=unset", *overrides]).model_dump(mode="json"))
        for overrides in ([], [f"data.{key}={value}" for key, value in values.items()])
    ]
    assert contents[0] == contents[1]


def test_plugins_count_by_their_content_and_held_out_images_where_a_guard_may_roll_back(
    folder: Path, made: tuple[Any, int]
) -> None:
    for place in ("here", "there"):
        (folder / place).mkdir()
        (folder / place / "counted_plugin.py").write_text("")
    data = made[0].folder
    (folder / "config.yaml").write_text(CONFIG.format(data=data))

    def config(place: str, *overrides: str) -> Config:
        base = load_config(str(folder / "config.yaml"), [f"data.held_out={data}/held_out", "run.output_dir=unset"])
        values = base.model_dump() | {"plugins": (str(folder / place / "counted_plugin.py"),)}
        values["guard"] |= dict(override.split("=") for override in overrides)
        return Config.model_validate(values)

    here, there = config("here"), config("there")
    assert content(here.model_dump(mode="json")) == content(there.model_dump(mode="json"))
    assert inputs_of(here) == inputs_of(there)
    (folder / "there" / "counted_plugin.py").write_text("# changed")
    assert inputs_of(here) != inputs_of(there)
    assert "data.held_out" not in inputs_of(here)
    assert "data.held_out" in inputs_of(config("here", "on_collapse=rollback"))
    assert len({read_by(config(*a)) for a in (["here"], ["there"], ["here", "on_collapse=rollback"])}) == 3


@pytest.mark.parametrize(
    ("tries", "message"),
    [
        ("run.seed: [1, 2]", "arms.fulllora.tries: run.seed is set by the study; remove it"),
        ("evaluation.num_samples: [1, 2]", "arms.fulllora.tries: evaluation.num_samples is set by the study"),
        ("run.log_every: [1, 2]", "arms.fulllora.tries: 1 and 2 make the same run; remove one"),
        ("optim.lr: [1e-3, 0.001]", "arms.fulllora.tries: 1e-3 and 0.001 make the same run; remove one"),
        ("threat.eps: [2/255, 4/255]", "threat.eps must be the same for all, as each try is attacked in its own ball"),
    ],
)
def test_tries_that_cannot_be_chosen_from_are_refused(folder: Path, tries: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        study(folder, ("optim.lr: [1e-5, 3e-2]", tries))
    assert str(refused.value).startswith(str(folder / "study.yaml"))


def test_any_value_makes_a_name_for_a_file(folder: Path) -> None:
    first, second = study(folder, ("optim.lr: [1e-5, 3e-2]", "guard.rollback_eps: [1/255, 2/255]")).tries["fulllora"]
    assert (first.name, second.name) == ("tiny-fulllora-rollback_eps1_255-try", "tiny-fulllora-rollback_eps2_255-try")
    assert (Path(first.output_dir).parent, first.values) == (folder / "runs", {"guard.rollback_eps": "1/255"})
    tries = ("optim.lr: [1e-5, 3e-2]", "model.checkpoint_key: [a/b, a_b]")
    of_a_file = (
        "label: FullLoRA,",
        "label: FullLoRA, overrides: ['model={checkpoint_path: x.pth, pretrained: true}'],",
    )
    with pytest.raises(UserError, match="a/b and a_b make the same name; remove one"):
        study(folder, tries, of_a_file)


def test_tries_are_chosen_on_as_many_images_as_are_asked_for(folder: Path) -> None:
    """Of verdicts on 2 images, another's are on 4."""
    asked = ("attack: pgd2}", "attack: pgd2, num_samples: 4}")
    first, second = study(folder).tries["fulllora"]
    write(folder, first, num_samples=4)
    write(folder, second, num_samples=2, ids="0-1", attacks={"clean": "11", "pgd2": "11"})
    results = Results(str(folder / "results"))
    assert choice(study(folder, asked), "fulllora", results) is None
    write(folder, second, num_samples=4, attacks={"clean": "1111", "pgd2": "1110"})
    results = Results(str(folder / "results"))
    assert choice(study(folder, asked), "fulllora", results) == {"optim.lr": "1e-5"}
    write(folder, second, num_samples=4, data="other")
    with pytest.raises(
        UserError, match=r"the tries of fulllora were evaluated on different images \(tiny-fulllora-lr1e"
    ):
        choice(study(folder, asked), "fulllora", Results(str(folder / "results")))


@pytest.mark.parametrize(
    ("clean", "lost", "won", "most_accurate", "chosen"),
    [
        (160, 9, 4, "1e-5", "3e-2"),
        (160, 20, 4, "1e-5", "1e-5"),
        (140, 9, 4, "1e-5", "1e-5"),
        (140, 4, 9, "3e-2", "1e-5"),
        (140, 4, 20, "3e-2", "3e-2"),
    ],
)
def test_tries_that_cannot_be_told_apart_may_be_chosen_by_clean_accuracy(
    folder: Path, clean: int, lost: int, won: int, most_accurate: str, chosen: str
) -> None:
    """Of 200 images the first try has 150 right, and 100 under attack; the second one `clean`, and under attack `lost`
    of these 100 less and `won` others. 13 that differ as 9 to 4 are chance, 24 as 20 to 4 are not."""
    ids, more = "0-199", ("attack: pgd2}", "attack: pgd2, prefer_clean: true}")
    first, second = study(folder).tries["fulllora"]
    write(folder, first, ids=ids, attacks={"clean": "1" * 150 + "0" * 50, "pgd2": "1" * 100 + "0" * 100})
    pgd2 = "0" * lost + "1" * (100 - lost + won) + "0" * (100 - won)
    write(folder, second, ids=ids, attacks={"clean": "1" * clean + "0" * (200 - clean), "pgd2": pgd2})
    results = Results(str(folder / "results"))
    assert choice(study(folder), "fulllora", results) == {"optim.lr": most_accurate}
    assert choice(study(folder, more), "fulllora", results) == {"optim.lr": chosen}


def test_arms_that_saw_other_images_are_not_compared(folder: Path) -> None:
    change = ("like: fulllora", "like: fulllora, overrides: [adapter.rank=1]")
    made = study(folder, change)
    for arm in ("fulllora", "again"):
        for run in made.tries[arm]:
            write(folder, run)
        for run in made.seeds(arm, {"optim.lr": "1e-5"}):
            write(folder, run)
    assert "| the same - FullLoRA | pgd3 | 4 | +0.0" in Report(made).text()
    said = "Not compared: the same - FullLoRA under pgd3, as their runs were evaluated on different images"
    assert said not in Report(made).text()
    for run in made.seeds("again", {"optim.lr": "1e-5"}):
        write(folder, run, data="other")
    assert said in Report(made).text()
    assert "| the same - FullLoRA | pgd3 |" not in Report(made).text()
    asked = ("[clean, pgd3]}", "[clean, pgd3], num_samples: 2}")
    assert "+0.0" not in Report(study(folder, change, asked)).text(), "on all, where two are asked for"
